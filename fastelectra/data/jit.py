"""numba for functions of numbers and arrays."""

from collections.abc import Callable
from pathlib import Path

from fastelectra.processor import cache_folder, compiled

CACHE = cache_folder(Path(__file__).parent)


def njit(function: Callable) -> Callable:
    """Compile `function`; kept on disk where this user may write, else for this process only."""
    return compiled(function, CACHE)
