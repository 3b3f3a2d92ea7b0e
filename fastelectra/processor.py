"""numba, set to use the whole of this CPU's vectors, and what it compiles kept for other processes.

numba reads its settings when the first function is decorated, and they hold for all that it
compiles in the process: so whatever decorates takes numba from here.
"""

import fcntl
import hashlib
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numba

# of what numba compiles for; none are known where it has been asked for another CPU than this
FEATURES = frozenset()
if not (numba.config.CPU_NAME or numba.config.CPU_FEATURES):
    from numba.core.codegen import get_host_cpu_features

    FEATURES = frozenset(get_host_cpu_features().split(","))
    if "+avx512f" in FEATURES:  # LLVM takes half of a vector on Intel's CPUs unless told
        numba.config.CPU_FEATURES = ",".join([*sorted(FEATURES), "-prefer-256-bit"])


def cache_folder(sources: Path, state: bytes = b"") -> str:
    """Where what is compiled from this folder's sources is kept; empty for nowhere.

    One for each state of the sources: numba looks at the file of a function, not at those of the
    functions it calls. state: what else the code depends on.
    """
    if numba.config.DISABLE_JIT:
        return ""
    texts = [path.read_bytes() for path in sorted(sources.glob("*.py"))]
    name = hashlib.sha256(b"".join([*texts, state])).hexdigest()[:16]
    try:
        folder = Path(numba.config.CACHE_DIR or Path.home() / ".cache/fastelectra/loops") / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""


def compiled(function: Callable, cache: str, **options) -> Callable:
    """numba.njit, with its code in the folder `cache`, or kept nowhere if that is empty."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, cache
    try:
        code = numba.njit(cache=bool(cache), nogil=True, **options)(function)
    finally:
        numba.config.CACHE_DIR = before
    if cache:
        code._cache.save_overload = _alone(code._cache.save_overload, cache)
    return code


def _alone(save: Callable, cache: str) -> Callable:
    """Save compiled code while no other process does: two at once, for other types or another CPU,
    could leave one's code under the other's name.
    """

    def save_alone(*arguments):
        try:
            with open(Path(cache, "lock"), "w") as lock:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
                save(*arguments)
        except OSError as error:
            warnings.warn(f"{cache}: {error.strerror}: loops compiled now are compiled again at the"
                          " next start", stacklevel=2)  # fmt: skip

    return save_alone
