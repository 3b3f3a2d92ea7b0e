"""Checkpoints are written beside training: it waits for the copy alone; no error is lost."""

import threading
import time

import pytest
import torch
from engines import engine_of
from launching import tiny_config

from fastelectra.config import config_from_dict
from fastelectra.data.shards import open_corpus
from fastelectra.errors import FastElectraError
from fastelectra.training import checkpoint
from fastelectra.training.saver import Saver


@pytest.fixture
def saver(process, corpus, step_batches, tmp_path):
    """saver.at(step) saves; a slow disk waits until `saver.disk` is set."""
    engine = engine_of(process, corpus, None, "fp32", 1)
    for batch in step_batches[0]:
        engine.backward(engine(batch)[0])
        engine.step()
    opened, config = open_corpus(corpus), config_from_dict(tiny_config(corpus, tmp_path))
    saver = Saver(config.training, process)
    saver.disk = threading.Event()

    def save(step, last=False):
        saver.save(
            engine, opened.tokenizer_dir, last, step=step, position={}, config={}, vocab_size=1,
            special_tokens={}, fingerprint="", skipped=0,
        )  # fmt: skip
        return engine

    saver.at = save
    yield saver
    saver.disk.set()


@pytest.fixture
def slow_disk(saver, monkeypatch):
    write = checkpoint.write_share

    def wait_and_write(*arguments):
        saver.disk.wait()
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_share", wait_and_write)


def test_training_goes_on_while_the_disk_is_slow(saver, slow_disk, tmp_path):
    engine = saver.at(1)
    before = engine.module.embeddings.word.detach().clone()
    with torch.no_grad():
        engine.module.embeddings.word.add_(1)  # the next updates
    assert checkpoint.complete_checkpoints(tmp_path) == []
    second = threading.Thread(target=saver.at, args=(2,))
    second.start()
    time.sleep(0.3)
    assert second.is_alive()  # one at a time
    saver.disk.set()
    second.join()
    saver.wait()
    steps = [path.name for path in checkpoint.complete_checkpoints(tmp_path)]
    assert steps == ["step-00000001", "step-00000002"]
    written = checkpoint.read_weights(checkpoint.checkpoint_folder(tmp_path, 1))
    assert torch.equal(written["embeddings.word"], before)  # as it was when saving began


@pytest.mark.parametrize("stops", [True, False])
def test_what_the_thread_could_not_do_is_told(saver, monkeypatch, tmp_path, capsys, stops):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    saver.training.stop_when_not_saved = stops
    monkeypatch.setattr(checkpoint, "write_rest", refuse)
    saver.at(1)
    if stops:
        while not saver.failed:
            time.sleep(0.01)
        with pytest.raises(FastElectraError, match=r"cannot write .*step-00000001: Permission den"):
            saver.at(2)
    else:
        saver.at(2)
    saver.wait()
    assert not saver.failed
    saver.at(3, last=True)
    with pytest.raises(FastElectraError, match="step-00000003"):
        saver.wait()
    told = capsys.readouterr().out.count("Permission denied; training goes on")
    assert told == (0 if stops else 2)
    assert list((tmp_path / "checkpoints").iterdir()) == []
