"""Every test here compiles Triton kernels for GPUs that are not here: minutes the first time."""

import os
import sys
import threading
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".cache/fastelectra/triton"))
sys.path.append(str(Path(__file__).parents[3] / "bench"))  # what bench/kernels.py imports

from triton.runtime.jit import JITFunction


@pytest.fixture(autouse=True)
def _parse_in_one_thread_at_a_time(monkeypatch):
    """CPython's parser keeps count of its depth for all threads: python/cpython#106905."""
    lock, parse = threading.Lock(), JITFunction.parse

    def parse_alone(kernel):
        with lock:
            return parse(kernel)

    monkeypatch.setattr(JITFunction, "parse", parse_alone)
