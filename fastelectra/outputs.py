"""The folder that a command writes and comes back to: nobody else's, and one run's at a time."""

import fcntl
from pathlib import Path
from typing import BinaryIO

from fastelectra.errors import FastElectraError


def claim(folder: Path, command: str, option: str, ours: bool = False) -> BinaryIO:
    """Make `folder`; until the result is closed, or the process ends, keep other runs out of it.

    The lock's file stays, and tells later runs that the folder is the command's own; `ours` says
    that it is without. Raises FastElectraError, with nothing written, for a folder with anything
    else in it, or where another run is at work, and OSError.
    """
    path = folder / f"{command}.lock"
    folder.mkdir(parents=True, exist_ok=True)
    if not ours and not path.exists() and any(folder.iterdir()):
        raise FastElectraError(
            f"{option} {folder} holds files that `fastelectra {command}` has not made: name a new"
            " or empty folder"
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
