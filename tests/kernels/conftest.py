"""Triton interprets or compiles, never both in a process.

executed/ runs the kernels: on a GPU where there is one, else in Triton's interpreter, which takes a
process of its own with TRITON_INTERPRET=1. compiled/ takes minutes and needs no GPU: it is left to
machines that have none.
"""

import kernel_cases
import pytest

executes = kernel_cases.INTERPRETED or kernel_cases.ON_GPU
collect_ignore = ["compiled"] if executes else ["executed"]


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """The number of torch's threads that the test runs in."""
    with kernel_cases.in_threads(request.param) as count:
        yield count
