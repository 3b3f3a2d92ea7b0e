"""For numba where it is not installed: what it would compile runs as Python, far slower."""

import types
import warnings

warnings.filterwarnings("ignore", "overflow encountered")  # uint64 arithmetic modulo 2^64

config = types.SimpleNamespace(CPU_NAME="none known", DISABLE_JIT=True, CACHE_DIR="")


def njit(**_):
    """Leave the function as it is."""
    return lambda function: function
