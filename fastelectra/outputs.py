"""The folder that a command writes and comes back to: nobody else's, and one run's at a time."""

import fcntl
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from fastelectra.errors import FastElectraError


def claim(folder: Path, command: str, option: str, names: Sequence[str]) -> BinaryIO:
    """Make `folder`; until the result is closed, or the process ends, keep other runs out of it.

    The lock's file stays, and tells later runs that the folder is the command's own. Raises
    FastElectraError, with nothing written, for another with one of `names` in it, or where another
    run is at work, and OSError.
    """
    path = folder / f"{command}.lock"
    folder.mkdir(parents=True, exist_ok=True)
    foreign = () if path.exists() else [name for name in names if (folder / name).exists()]
    if foreign:
        raise FastElectraError(
            f"{option} {folder} has a {foreign[0]} that `fastelectra {command}` has not made: name"
            " another folder"
        )
    lock = open(path, "ab")  # noqa: SIM115  (the caller closes it)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise FastElectraError(
            f"another run is at work in {folder}: wait until it has ended, or name another {option}"
        ) from None
    except OSError:
        pass  # a file system without locks
    return lock
