"""Checkpoint folders: what is in one, written whole or not at all. Needs no DeepSpeed.

    RUN/checkpoints/step-00001000/
        model.safetensors       fp32 weights by the names of Electra.named_parameters()
        optimizer.safetensors   fp32 Adam moments: {name}.exp_avg, {name}.exp_avg_sq
        tokenizer/              the corpus's tokenizer, loadable by Hugging Face
        state.json              step, data position, configuration, fingerprint of the corpus

A folder made by `fastelectra import` is the same without optimizer.safetensors, at step 0.
Nothing in it depends on the number of ranks, the ZeRO stage or the precision of the run.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastelectra.errors import FastElectraError

Tensors = dict[str, torch.Tensor]  # by parameter name

FORMAT = 1
KEYS = (
    "step",
    "position",
    "config",
    "vocab_size",
    "special_tokens",
    "fingerprint",
)  # of state.json
WEIGHTS, MOMENTS, STATE, TOKENIZER = (
    "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer")  # fmt: skip
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_ASIDE = ".tmp-"  # prefix of a folder that is still being written


@contextmanager
def write_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill; on leaving it is synced to disk and renamed to `target`.

    When anything fails nothing is left: `target` exists complete or not at all.
    Raises FastElectraError if `target` already holds something, OSError if writing fails.
    """
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FastElectraError(f"{target} already exists: remove it or name another folder")
    aside = target.parent / f"{_ASIDE}{target.name}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for path in [*aside.rglob("*"), aside]:
            _open_to_others(path)
            _sync(path)
        aside.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _open_to_others(path: Path) -> None:
    """Give the usual permissions: safetensors makes its files readable by their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _sync(path: Path) -> None:
    """Make sure a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(
    target: Path,
    weights: Tensors,
    tokenizer_dir: Path,
    *,
    step: int,
    position: dict | None,
    config: dict,
    vocab_size: int,
    special_tokens: dict[str, int],
    fingerprint: str,
    moments: Tensors | None = None,
) -> None:
    """Write a checkpoint folder atomically; weights and moments are contiguous fp32 CPU tensors.

    Raises FastElectraError (full disk, no permission, `target` exists).
    """
    state = {
        "format": FORMAT,
        "step": step,
        "position": position,
        "config": config,
        "vocab_size": vocab_size,
        "special_tokens": special_tokens,
        "fingerprint": fingerprint,
    }
    try:
        with write_folder(target) as folder:
            save_file(weights, folder / WEIGHTS)
            if moments is not None:
                save_file(moments, folder / MOMENTS)
            (folder / TOKENIZER).mkdir()  # with our permissions: the corpus may be read-only
            for file in tokenizer_dir.iterdir():
                shutil.copyfile(file, folder / TOKENIZER / file.name)
            (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:  # the second wraps the first
        reason = getattr(error, "strerror", None) or error
        raise FastElectraError(f"cannot write the checkpoint {target}: {reason}") from None


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in a run folder."""
    return run / "checkpoints" / f"step-{step:08d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    folders = (run / "checkpoints").glob("step-*") if (run / "checkpoints").is_dir() else ()
    steps = {path: _STEP_FOLDER.fullmatch(path.name) for path in folders}
    found = [path for path, match in steps.items() if match and _is_checkpoint(path)]
    return sorted(found, key=lambda path: int(steps[path][1]))


def _is_checkpoint(path: Path) -> bool:
    return (path / STATE).is_file() and (path / WEIGHTS).is_file()


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that `path` names: itself, or the newest complete one of a run.

    Raises FastElectraError when there is none.
    """
    path = Path(path)
    if _is_checkpoint(path):
        return path
    found = complete_checkpoints(path)
    if not found:
        raise FastElectraError(
            f"no checkpoint in {path}: expected a folder with {WEIGHTS} and {STATE},"
            " or a run folder with complete checkpoints"
        )
    return found[-1]


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint. Raises FastElectraError if it is damaged or of a newer format."""
    path = Path(folder) / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        form = state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FastElectraError(f"cannot read the checkpoint's {path}: {error!r}") from None
    if form != FORMAT:
        raise FastElectraError(f"{path} has format {form}, this version reads format {FORMAT}")
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise FastElectraError(f"the checkpoint's {path} lacks {missing[0]}")
    return state


def read_weights(folder: Path) -> Tensors:
    """fp32 weights by parameter name. Raises FastElectraError if the file is damaged."""
    return _load_tensors(Path(folder) / WEIGHTS)


def read_moments(folder: Path) -> Tensors:
    """fp32 Adam moments by {parameter name}.exp_avg / .exp_avg_sq. Raises FastElectraError."""
    return _load_tensors(Path(folder) / MOMENTS)


def _load_tensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FastElectraError(f"cannot read {path}: {error}") from None


def tidy(run: Path, keep_last: int) -> None:
    """Keep the newest `keep_last` checkpoints; remove older, unfinished and incomplete ones."""
    kept = complete_checkpoints(run)[-keep_last:]
    for path in (run / "checkpoints").glob("*"):
        ours = path.name.startswith(_ASIDE) or _STEP_FOLDER.fullmatch(path.name)
        if ours and path not in kept:
            shutil.rmtree(path)
