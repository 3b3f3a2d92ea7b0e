"""Every test here runs the Triton kernels: on a GPU, or on CPU tensors in Triton's interpreter.

Uninitialised memory is NaN: an element that a kernel forgets to write is found by any comparison.
"""

import kernel_cases
import pytest
import torch

from fastelectra import kernels

if kernel_cases.INTERPRETED:
    import triton_interpreter  # noqa: F401


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setattr(kernel_cases, "device", "cuda" if kernel_cases.ON_GPU else "cpu")
    # fills uninitialised memory with NaN; PyTorch's own operations may be what they are on a GPU
    torch.use_deterministic_algorithms(True, warn_only=kernel_cases.ON_GPU)
    kernels.set_backend("triton")
    yield
    kernels.set_backend("auto")
    torch.use_deterministic_algorithms(False)
