"""Every test here runs the Triton kernels on CPU tensors, in Triton's interpreter.

Uninitialised memory is NaN: an element that a kernel forgets to write is found by any comparison.
"""

import pytest
import torch
import triton_interpreter  # noqa: F401

from fastelectra import kernels


@pytest.fixture(autouse=True)
def triton_path():
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    kernels.set_backend("triton")
    yield
    kernels.set_backend("auto")
    torch.use_deterministic_algorithms(False)
