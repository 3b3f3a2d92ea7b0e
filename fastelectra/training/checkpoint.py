"""Checkpoint folders: what is in one, written whole or not at all. Needs no DeepSpeed.

    RUN/checkpoints/step-00001000/
        model.safetensors       fp32 weights by the names of Electra.named_parameters()
        optimizer.safetensors   fp32 Adam moments: {name}.exp_avg, {name}.exp_avg_sq
        tokenizer/              the corpus's tokenizer, loadable by Hugging Face
        state.json              step, data position, configuration, fingerprint of the corpus, and
                                with fp16 the loss scale
        SHA256SUMS              of all these; `sha256sum -c SHA256SUMS` checks them too

Several ranks write a file each, of whole tensors: model-00001-of-00008.safetensors and so on. A
folder made by `fastelectra import` has no moments and is at step 0. What is in the tensors does not
depend on the number of ranks, the ZeRO stage or the precision of the run.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastelectra.data import vocabulary
from fastelectra.data.shards import file_sha256
from fastelectra.errors import FastElectraError

Tensors = dict[str, torch.Tensor]  # by parameter name
T = TypeVar("T")

FORMAT = 1
KEYS = {  # of state.json, and the type of each
    "step": int,
    "position": dict | None,
    "config": dict,
    "vocab_size": int,
    "special_tokens": dict,
    "fingerprint": str,
    "skipped": int,
    "loss_scale": dict,
}
WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"
STATE, TOKENIZER, SUMS = "state.json", "tokenizer", "SHA256SUMS"
USED = (".safetensors", *vocabulary.FILES)  # endings of what must have a checksum
SCALE_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # as DeepSpeed's
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
    aside = aside_of(target)
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


def aside_of(target: Path) -> Path:
    """Where write_folder has it filled."""
    return target.parent / f"{_ASIDE}{target.name}"


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


def write_checkpoint(target: Path, weights: Tensors, tokenizer_dir: Path, **state) -> None:
    """Write a checkpoint without moments atomically; the weights are contiguous fp32 CPU tensors.

    `state` holds what KEYS lists. Raises FastElectraError (full disk, no permission, `target`
    exists).
    """
    with reported(target), write_folder(target) as folder:
        write_share(folder, weights, None)
        write_rest(folder, tokenizer_dir, state)


@contextmanager
def reported(target: Path) -> Iterator[None]:
    """Raise what keeps a checkpoint from being written as a FastElectraError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the second wraps the first
        reason = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]
        raise FastElectraError(f"cannot write the checkpoint {target}: {reason}") from None


def write_share(
    folder: Path, weights: Tensors, moments: Tensors | None, rank: int = 0, world: int = 1
) -> None:
    """Write and sync one rank's tensors. Raises OSError or SafetensorError."""
    part = f"-{rank + 1:05d}-of-{world:05d}" if world > 1 else ""
    for name, tensors in ((WEIGHTS, weights), (MOMENTS, moments)):
        if tensors is not None:
            path = folder / name.replace(".", f"{part}.")
            save_file(tensors, path)
            _sync(path)


def write_rest(folder: Path, tokenizer_dir: Path, state: dict) -> None:
    """Write all but the tensors, checksums last. Raises OSError."""
    (folder / TOKENIZER).mkdir()  # with our permissions: the corpus may be read-only
    vocabulary.copy(tokenizer_dir, folder / TOKENIZER)
    text = json.dumps({"format": FORMAT, **state}, indent=2)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")
    write_sums(folder)


def write_sums(folder: Path) -> None:
    """Write the checksums of all other files. Raises OSError."""
    files = sorted(_files(folder).items())
    sums = [f"{file_sha256(file)}  {name}\n" for name, file in files if name != SUMS]
    (folder / SUMS).write_text("".join(sums), encoding="utf-8")


def _files(folder: Path) -> dict[str, Path]:
    """The files in a folder by their names relative to it."""
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def verify(folder: Path) -> None:
    """Compare every file with its checksum; names in SHA256SUMS are looked up, never opened.

    Raises FastElectraError naming the first file that is missing or differs.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        files = _files(folder)
        for name in {STATE, *sums, *(n for n in files if n.endswith(USED))}:
            if name not in files or name not in sums:
                raise FastElectraError(f"{folder / SUMS if name in files else folder} lacks {name}")
            if file_sha256(files[name]) != sums[name]:
                raise FastElectraError(f"{folder / name} does not match its checksum")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"{SUMS} is not a list of checksums"
        raise FastElectraError(f"cannot check {folder}: {reason}") from None


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in a run folder."""
    return run / "checkpoints" / f"step-{step:08d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first; not checked for damage."""
    return [path for path in _step_folders(run) if _is_checkpoint(path)]


def _step_folders(run: Path) -> list[Path]:
    found = (run / "checkpoints").glob("step-*") if (run / "checkpoints").is_dir() else ()
    return sorted((path for path in found if _STEP_FOLDER.fullmatch(path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(_STEP_FOLDER.fullmatch(path.name)[1])


def newest_step(run: Path, without: Collection[Path] = ()) -> int:
    """Of the complete checkpoints but these; 0 if there are none."""
    return max((_step_of(p) for p in complete_checkpoints(run) if p not in without), default=0)


def _is_checkpoint(path: Path) -> bool:
    return (path / STATE).is_file() and (path / SUMS).is_file()


def newest_good(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest undamaged checkpoint of a run, and what is wrong with each newer one.

    (None, {}) if there are none. Raises FastElectraError if all are damaged, or an undamaged one
    cannot be read, as one of a newer version.
    """
    damaged = {}
    for folder in reversed(_step_folders(run)):
        fault = unreadable = None
        try:
            verify(folder)
        except FastElectraError as error:
            fault = str(error)
        else:
            try:
                read_state(folder)
            except FastElectraError as error:
                unreadable = error
        if _is_gone(folder):  # a run at work has a newer one
            return newest_good(run)
        if unreadable:
            raise unreadable
        if fault is None:
            return folder, damaged
        damaged[folder] = fault
    if damaged:
        raise FastElectraError(
            f"all checkpoints of {run} are damaged, the newest: {next(iter(damaged.values()))};"
            f" put one back, or remove {run / 'checkpoints'} to start anew"
        )
    return None, {}


def _is_gone(folder: Path) -> bool:
    """Whether it was removed. A link to nothing, or what cannot be looked into, is still there."""
    try:
        folder.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, to make room for a good one of its step."""
    away = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(away, ignore_errors=True)
    folder.rename(away)


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that `path` names: itself, or the newest undamaged one of a run.

    Warns of damaged ones that it passes over. Raises FastElectraError when there is none.
    """
    path = Path(path)
    if _is_checkpoint(path):
        verify(path)
        read_state(path)
        return path
    found, damaged = newest_good(path)
    for reason in damaged.values():
        print(f"warning: passing over a damaged checkpoint: {reason}", file=sys.stderr)
    if not found:
        raise FastElectraError(
            f"no checkpoint in {path}: expected a folder with {WEIGHTS}, {STATE} and {SUMS},"
            " or a run folder with complete checkpoints (`fastelectra import` makes one of a folder"
            " for Hugging Face)"
        )
    return found


def use(path: str | Path, read: Callable[[Path], T]) -> T:
    """`read` the checkpoint that `path` names; a newer one if a run at work removes it meanwhile.

    Raises FastElectraError as `resolve` and `read` do.
    """
    while True:
        folder = resolve(path)
        try:
            return read(folder)
        except (FastElectraError, OSError):
            if not _is_gone(folder):
                raise


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint. Raises FastElectraError if it is damaged or of a newer format."""
    path = Path(folder) / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        form = state["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FastElectraError(f"cannot read the checkpoint's {path}: {error!r}") from None
    if form != FORMAT:
        raise FastElectraError(
            f"{path} has format {form!r}, this version reads format {FORMAT}: install the version"
            " of fastelectra that wrote it, or move that checkpoint out of the way"
        )
    state = {"skipped": 0, "loss_scale": {}, **state}
    for key, kind in KEYS.items():
        if key not in state:
            raise FastElectraError(f"the checkpoint's {path} lacks {key}")
        if not isinstance(state[key], kind) or (kind is int and not 0 <= state[key] < 2**53):
            raise FastElectraError(f"the checkpoint's {path} has no sound {key}")
    return state


def read_weights(folder: Path) -> Tensors:
    """fp32 weights by parameter name. Raises FastElectraError if a file is damaged."""
    return _load_tensors(Path(folder), WEIGHTS)


def read_moments(folder: Path) -> Tensors:
    """fp32 Adam moments by {parameter name}.exp_avg / .exp_avg_sq. Raises FastElectraError."""
    return _load_tensors(Path(folder), MOMENTS)


def _load_tensors(folder: Path, name: str) -> Tensors:
    """From the one file, or those of several ranks."""
    tensors = {}
    for path in sorted(folder.glob(name.replace(".", "-*-of-*."))) or [folder / name]:
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise FastElectraError(f"cannot read {path}: {error}") from None
    return tensors


def tidy(run: Path, keep_last: int, keep_every: int = 0) -> None:
    """Keep the newest `keep_last` checkpoints and every one of a multiple of `keep_every` steps.

    Other complete, unfinished and incomplete ones are removed. What cannot be removed now, as a
    file that another program reads over NFS, is tried again the next time.
    """
    complete = complete_checkpoints(run)
    kept = {p for p in complete if keep_every and _step_of(p) % keep_every == 0}
    kept.update(complete[-keep_last:])
    for path in list((run / "checkpoints").glob("*")):
        if path.is_symlink():
            continue
        if _STEP_FOLDER.fullmatch(path.name) and path not in kept:
            with suppress(OSError):  # who reads it finds all of it, or nothing
                path.rename(aside_of(path))
            shutil.rmtree(aside_of(path), ignore_errors=True)
        elif path.name.startswith(_ASIDE):
            shutil.rmtree(path, ignore_errors=True)
