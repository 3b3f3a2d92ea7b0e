"""numba for functions of numbers and arrays."""

from collections.abc import Callable

from fastelectra.processor import numba


def njit(function: Callable) -> Callable:
    """Compile `function`; kept on disk where this user may write, else for this process only."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no place for a cache
        return numba.njit(nogil=True)(function)
