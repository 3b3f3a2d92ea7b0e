"""What a run tells the world: a progress line, metrics.jsonl, TensorBoard, wandb, curves.png."""

import errno
import importlib.util
import json
import math
import os
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

from fastelectra.config import Config
from fastelectra.data.shards import write_durably
from fastelectra.errors import FastElectraError
from fastelectra.outputs import claim

FILES = ("config.json", "metrics.jsonl", "curves.png")  # in a run folder, besides its folders
BARS = "▁▂▃▄▅▆▇█"
SKETCHED = {
    "mlm_loss": "generator loss",
    "mlm_accuracy": "generator accuracy",
    "disc_loss": "discriminator loss",
    "prior_loss": "of a constant guess",
    "auc": "AUC of the replaced",
    "main_loss": "main network's loss",
    "main_accuracy": "main network's accuracy",
}


def check_outputs(config: Config) -> BinaryIO:
    """Make the run folder and see that it can be written; rank 0 calls it before training.

    Returns what keeps other runs out of the folder, as `claim` does. Raises FastElectraError for a
    folder without permission or that cannot be claimed, or for wandb asked for and missing.
    """
    if config.training.wandb_project and importlib.util.find_spec("wandb") is None:
        raise FastElectraError(
            "training.wandb_project is set but wandb is not installed: pip install wandb"
        )
    run = Path(config.training.output_dir)
    try:
        lock = claim(run / "lock", "training.output_dir", FILES)
        (run / "checkpoints").mkdir(exist_ok=True)
        write_durably(run / "config.json", [json.dumps(config.to_dict(), indent=2), "\n"])
    except OSError as error:
        raise FastElectraError(
            f"cannot write training.output_dir {run}: {error.strerror}"
        ) from None
    return lock


class Report:
    """Rank 0's records of a run that starts, or goes on, after `step` updates."""

    def __init__(self, config: Config, step: int):
        self._run = Path(config.training.output_dir)
        self.picture = self._run / "curves.png"
        self._steps = config.training.steps
        self._records = _cut(self._run / "metrics.jsonl", step)
        self._unwritten = ""  # lines for which there was no room yet
        self._warned: set[str] = set()
        self._board = _tensorboard(self._run, step) if config.training.tensorboard else None
        self._wandb = _wandb(self._run, config) if config.training.wandb_project else None

    def write(self, record: dict) -> None:
        """Print one record and add it everywhere. It has a step and a kind: train or eval."""
        line = train_line if record["kind"] == "train" else eval_line
        print(line(record, self._steps), flush=True)
        record = {name: _json_value(value) for name, value in record.items()}
        self._records.append(record)
        self._unwritten += json.dumps(record) + "\n"
        self._attempt(self._append)
        scalars = {
            f"{record['kind']}/{name}": value
            for name, value in record.items()
            if name not in ("step", "kind") and value is not None
        }
        if self._board:
            self._attempt(self._show, scalars, record["step"])
        if self._wandb:
            self._wandb.log({**scalars, "step": record["step"]})

    def draw(self) -> None:
        """Draw the learning curves so far."""
        from fastelectra.training import curves  # a second of matplotlib, on this rank only

        title = f"Learning curves of {self._run.name}"
        self._attempt(curves.draw, self._records, self.picture, title)
        if self._board:
            self._attempt(self._board.flush)

    def _attempt(self, write, *arguments) -> None:
        """Write to disk; training does not end for want of room: say so once, and try again when
        there is more to write."""
        try:
            write(*arguments)
        except OSError as error:
            reason = error.strerror or str(error)
            if reason not in self._warned:
                print(f"warning: cannot write reports to {self._run}: {reason}; training goes on",
                      flush=True)  # fmt: skip
            self._warned.add(reason)

    def _append(self) -> None:
        """Append what is not in metrics.jsonl yet: whole lines or nothing."""
        with open(self._run / "metrics.jsonl", "ab", buffering=0) as file:
            before = file.tell()
            data = self._unwritten.encode()
            try:
                if file.write(data) < len(data):  # there was room for a part
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise
        self._unwritten = ""

    def _show(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def sketch(self) -> str:
        """The held-out curves in characters, one a line, for a terminal."""
        evaluations = [record for record in self._records if record["kind"] == "eval"]
        return "\n".join(
            f"{title:>23}  {sparkline([record[name] for record in evaluations])}"
            for name, title in SKETCHED.items()
            if all(name in record for record in evaluations)
        )

    def close(self) -> None:
        """Finish what other programs read."""
        if self._board:
            self._attempt(self._board.close)
        if self._wandb:
            self._wandb.finish()


def sparkline(values: list[float | None]) -> str:
    """First value, a bar for each, last value: `0.53 ▁▂▅█ 0.87`. Missing values are left out."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    low, span = min(values), max(values) - min(values)
    bars = "".join(BARS[round((len(BARS) - 1) * (v - low) / span)] if span else "▄" for v in values)
    return f"{values[0]:.3f} {bars} {values[-1]:.3f}"


def train_line(record: dict, steps: int) -> str:
    """One line of progress over the steps since the last one."""
    parts = [
        f"step {record['step']:>{len(f'{steps:,}')},}/{steps:,}",
        *_told(record, ("mlm_loss", "disc_loss", "main", "fake_rate", "auc")),
        f"norm {record['grad_norm']:.2f}",
        f"lr {record['lr']:.2e}",
        f"{_count(record['tokens_per_second'])} tok/s",
    ]
    if "mfu" in record:
        parts.append(f"mfu {100 * record['mfu']:.1f}%")
    if record["skipped"]:
        parts.append(f"skipped {record['skipped']:,}")
    parts.append(f"left {timedelta(seconds=round(record['seconds_left']))}")
    return "  ".join(parts).replace("nan", "–")


def eval_line(record: dict, steps: int) -> str:
    """One line for an evaluation on held-out text."""
    names = ("mlm_loss", "mlm_accuracy", "sampled_accuracy", "disc_gain", "main", "fake_rate",
             "auc", "precision", "recall")  # fmt: skip
    head = f"eval {record['step']:>{len(f'{steps:,}')},}/{steps:,}"
    return "  ".join([head, *_told(record, names)]).replace("nan", "–")


TOLD = {  # of a record that has the scores that it names
    "mlm_loss": "mlm {mlm_loss:.3f}",
    "mlm_accuracy": "accuracy {mlm_accuracy:.1%}",
    "sampled_accuracy": "sampled {sampled_accuracy:.1%}",
    "disc_loss": "disc {disc_loss:.4f} (H {prior_loss:.4f})",
    "disc_gain": "disc {disc_loss:.4f} (H {prior_loss:.4f}, gain {gain:.1%})",
    "main": "main {main_loss:.3f}  accuracy {main_accuracy:.1%}",
    "fake_rate": "fake {fake_rate:.1%}",
    "auc": "auc {auc:.3f}",
    "precision": "precision {precision:.2f}",
    "recall": "recall {recall:.2f}",
}


def _told(record: dict, names: tuple[str, ...]) -> list[str]:
    """What TOLD says of these; the scores that the run's objective does not have are left out."""
    told = []
    for name in names:
        with suppress(KeyError):
            told.append(TOLD[name].format(**record))
    return told


def _count(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def _json_value(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut(path: Path, step: int) -> list[dict]:
    """The records up to `step`; what an interrupted run wrote beyond it is removed."""
    if not path.exists():
        return []
    lines, records = path.read_text(encoding="utf-8", errors="replace").splitlines(), []
    for line in lines:
        try:
            record = json.loads(line)
            if record["step"] <= step and _is_sound(record):
                records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):  # cut short, or damaged
            continue
    write_durably(path, (json.dumps(record) + "\n" for record in records))
    return records


def _is_sound(record: dict) -> bool:
    """Whether it can be drawn."""
    values = (value for name, value in record.items() if name != "kind")
    return record["kind"] in ("train", "eval") and all(
        value is None or isinstance(value, int | float) for value in values
    )


def _tensorboard(run: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the package is optional
        return None
    threading.excepthook = _told_later
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)


def _told_later(failed) -> None:
    """TensorBoard's thread ends when the disk is full; `add_scalar` then raises what it met."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)


def _wandb(run: Path, config: Config):
    import wandb

    wandb.init(
        project=config.training.wandb_project, name=run.name, dir=run, config=config.to_dict()
    )
    return wandb
