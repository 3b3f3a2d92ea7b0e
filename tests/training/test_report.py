"""What a run says when it cannot write its records, on a disk without room or without packages."""

import errno
import json
import shutil
import sys
import threading

import pytest
from launching import tiny_config

from fastelectra.config import config_from_dict
from fastelectra.data.shards import open_corpus
from fastelectra.training import curves
from fastelectra.training.engine import plan_engine
from fastelectra.training.loop import Trainer
from fastelectra.training.opening import opening
from fastelectra.training.report import Report
from fastelectra.training.resume import find_start

EVAL = {"kind": "eval", "mlm_loss": 6.0, "mlm_accuracy": 0.1, "sampled_accuracy": 0.1,
        "disc_loss": 0.4, "prior_loss": 0.4, "gain": 0.0, "fake_rate": 0.1, "auc": 0.5,
        "precision": 0.5, "recall": 0.5}  # fmt: skip


@pytest.fixture
def report(corpus, tmp_path):
    config = config_from_dict(tiny_config(corpus, tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 1}\n{"step": 2, torn\n7\n')
    return Report(config, 5)


def test_training_goes_on_when_logs_cannot_be_written(report, tmp_path, monkeypatch, capsys):
    def steps():
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]

    path = tmp_path / "metrics.jsonl"
    assert steps() == [1]  # damaged lines are gone
    real, room = open, 0

    class Full:
        """A file on a disk with `room` bytes left."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def tell(self):
            return self.file.tell()

        def truncate(self, size):
            self.file.truncate(size)

        def write(self, data):
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:room])

    monkeypatch.setattr("builtins.open", lambda *a, **k: Full(real(*a, **k)) if a[1:] == ("ab",)
                        else real(*a, **k))  # fmt: skip
    monkeypatch.setattr(curves, "draw", lambda *_: Full(None).write(b""))
    report.write({**EVAL, "step": 6})
    report.draw()
    room = 50  # for half a line
    report.write({**EVAL, "step": 7})
    assert steps() == [1]
    room = 10_000
    report.write({**EVAL, "step": 8})
    assert steps() == [1, 6, 7, 8]
    printed = capsys.readouterr().out
    assert printed.count("warning: cannot write reports to") == 1
    assert "No space left on device; training goes on" in printed


@pytest.mark.parametrize(
    "line",
    ['{"kind": "eval", "step": 1, "mlm_loss": "6"}', '{"step": 1}', "[" * 10_000,
     '{"kind": "else", "step": 1}', '{"kind": "train", "step": 1, "auc": [1]}'],
)  # fmt: skip
def test_damaged_records_are_left_out(corpus, tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
    Report(config_from_dict(tiny_config(corpus, tmp_path)), 5)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_records_of_another_version_are_drawn(report, tmp_path):
    """Those of the first line have no scores at all."""
    report.write({**EVAL, "step": 6})
    report.draw()
    report.sketch()
    assert report.picture.exists()


def test_tensorboard_on_a_disk_without_room_is_warned_of_once(
    corpus, tmp_path, capsys, monkeypatch
):
    """Its thread fails; that its folder is gone stands in for the full disk."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not pytest's
    report = Report(config_from_dict(tiny_config(corpus, tmp_path, tensorboard=True)), 5)
    report.write({**EVAL, "step": 6})
    report.draw()
    shutil.rmtree(tmp_path / "tensorboard")
    for step in range(7, 12):
        report.write({**EVAL, "step": step})
        report.draw()
    report.close()
    printed = capsys.readouterr()
    assert printed.out.count("warning: cannot write reports to") == 1
    assert "Traceback" not in printed.err


def test_what_a_run_will_lack_is_said(process, corpus, tmp_path, monkeypatch):
    config = config_from_dict(tiny_config(corpus, tmp_path, tensorboard=True))
    plan = plan_engine(config, process)
    trainer = Trainer(config, open_corpus(corpus), process, plan, find_start(config, corpus))
    before = opening(trainer)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config.optimizer.warmup_steps = config.training.steps
    more = [line for line in opening(trainer) if line not in before]
    assert [line.partition(" = ")[0] for line in more] == [
        "warning: optimizer.warmup_steps",
        "TensorBoard: not installed, so without its files (pip install tensorboard)",
    ]
