"""Triton interprets or compiles, never both in a process.

executed/ runs the kernels: on a GPU where there is one, else in Triton's interpreter, which takes a
process of its own with TRITON_INTERPRET=1. compiled/ takes minutes and needs no GPU: it is left to
machines that have none.
"""

import kernel_cases
import pytest
import torch

executes = kernel_cases.INTERPRETED or kernel_cases.ON_GPU
collect_ignore = ["compiled"] if executes else ["executed"]


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """So many of torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
