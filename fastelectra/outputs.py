"""The folder that a command writes and comes back to: nobody else's, and one run's at a time."""

import fcntl
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from fastelectra.errors import FastElectraError


def claim(path: Path, option: str, names: Sequence[str]) -> BinaryIO:
    """Make the folder of the lock's file `path`, and keep other runs out of it until the result is
    closed or the process ends.

    The file stays, and tells later runs that the folder is the command's own. Raises
    FastElectraError, with nothing written, for another with one of `names` in it, or where another
    run is at work, and OSError. option: which names the folder.
    """
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    foreign = () if path.exists() else [name for name in names if (folder / name).exists()]
    if foreign:
        raise FastElectraError(
            f"{option} {folder} has {foreign[0]}, which this command has not made: name another"
            " folder"
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
