"""What a run tells the world: a progress line, metrics.jsonl, TensorBoard, wandb, curves.png."""

import errno
import importlib.util
import json
import math
import os
from datetime import timedelta
from pathlib import Path

from fastelectra.config import Config
from fastelectra.errors import FastElectraError

BARS = "▁▂▃▄▅▆▇█"
SKETCHED = {
    "mlm_loss": "generator loss",
    "mlm_accuracy": "generator accuracy",
    "disc_loss": "discriminator loss",
    "prior_loss": "of a constant guess",
    "auc": "AUC of the replaced",
}


def check_outputs(config: Config) -> None:
    """Make the run folder and see that it can be written; rank 0 calls it before training.

    Raises FastElectraError for a folder without permission, or for wandb asked for and missing.
    """
    if config.training.wandb_project and importlib.util.find_spec("wandb") is None:
        raise FastElectraError(
            "training.wandb_project is set but wandb is not installed: pip install wandb"
        )
    run = Path(config.training.output_dir)
    if not config.training.output_dir:
        raise FastElectraError("training.output_dir is not set: name the folder of this run")
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        _replace(run / "config.json", text)
    except OSError as error:
        raise FastElectraError(
            f"cannot write training.output_dir {run}: {error.strerror}"
        ) from None


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
            f"{title:>22}  {sparkline([record[name] for record in evaluations])}"
            for name, title in SKETCHED.items()
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
        f"mlm {record['mlm_loss']:.3f}",
        f"disc {record['disc_loss']:.4f} (H {record['prior_loss']:.4f})",
        f"fake {100 * record['fake_rate']:.1f}%",
        f"auc {record['auc']:.3f}",
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
    return "  ".join([
        f"eval {record['step']:>{len(f'{steps:,}')},}/{steps:,}",
        f"mlm {record['mlm_loss']:.3f}",
        f"accuracy {100 * record['mlm_accuracy']:.1f}%",
        f"sampled {100 * record['sampled_accuracy']:.1f}%",
        f"disc {record['disc_loss']:.4f} (H {record['prior_loss']:.4f}, gain"
        f" {100 * record['gain']:.1f}%)",
        f"fake {100 * record['fake_rate']:.1f}%",
        f"auc {record['auc']:.3f}",
        f"precision {record['precision']:.2f}",
        f"recall {record['recall']:.2f}",
    ]).replace("nan", "–")  # fmt: skip


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
            if record["step"] <= step:
                records.append(record)
        except (ValueError, TypeError, KeyError):  # cut short when the run was, or damaged
            continue
    _replace(path, "".join(json.dumps(r) + "\n" for r in records))
    return records


def _replace(path: Path, text: str) -> None:
    """Write a file whole, or leave it as it was."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _tensorboard(run: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the package is optional
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)


def _wandb(run: Path, config: Config):
    import wandb

    wandb.init(
        project=config.training.wandb_project, name=run.name, dir=run, config=config.to_dict()
    )
    return wandb
