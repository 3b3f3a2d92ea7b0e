"""What must hold of every op's Triton kernels, whatever they compute."""

import importlib

import kernel_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

every_op = pytest.mark.parametrize("name", kernel_cases.CASES)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_pytorch(name, dtype):
    low = kernel_cases.make(name, 24, 72, dtype)
    exact = [kernel_cases.convert(value, torch.float64) for value in low]
    truth = kernel_cases.with_gradients(kernel_cases.reference(name), exact)
    plain = kernel_cases.with_gradients(kernel_cases.reference(name), low)
    fused = kernel_cases.with_gradients(kernel_cases.operation(name), low)
    for place, (t, p, f) in enumerate(zip(truth, plain, fused, strict=True)):
        assert f.dtype == p.dtype
        allowed = 2 * (p.double() - t).norm() + 1e-6 * t.norm()
        assert (f.double() - t).norm() <= allowed, f"output {place}"


@every_op
@settings(max_examples=10, deadline=None, derandomize=True)
@given(rows=st.integers(0, 45), width=st.integers(1, 80))
def test_any_shape(name, rows, width):
    inputs = kernel_cases.make(name, rows, width)
    fused = kernel_cases.with_gradients(kernel_cases.operation(name), inputs)
    plain = kernel_cases.with_gradients(kernel_cases.reference(name), inputs)
    for f, p in zip(fused, plain, strict=True):
        torch.testing.assert_close(f, p, rtol=1e-9, atol=1e-9)


@every_op
def test_gradcheck(name):
    inputs = kernel_cases.make(name, 5, 6)
    assert torch.autograd.gradcheck(kernel_cases.operation(name), inputs, fast_mode=True)


@every_op
def test_two_runs_are_bitwise_equal(name):
    inputs = kernel_cases.make(name, 25, 24, torch.float32)
    once = kernel_cases.with_gradients(kernel_cases.operation(name), inputs)
    twice = kernel_cases.with_gradients(kernel_cases.operation(name), inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("name", sorted(set(kernel_cases.CASES) - set(kernel_cases.WAYS)))
def test_opcheck(name):
    forward = importlib.import_module(f"fastelectra.kernels.{name}").forward.custom_op
    torch.library.opcheck(forward, kernel_cases.make(name, 6, 10, torch.float32))


@every_op
def test_compiles_without_a_graph_break(name):
    inputs = kernel_cases.make(name, 20, 16, torch.float32)
    compiled = torch.compile(kernel_cases.operation(name), backend="aot_eager", fullgraph=True)
    eager = kernel_cases.with_gradients(kernel_cases.operation(name), inputs)
    for c, e in zip(kernel_cases.with_gradients(compiled, inputs), eager, strict=True):
        assert torch.equal(c, e)


@every_op
def test_inputs_need_not_be_contiguous(name):
    inputs = kernel_cases.make(name, 10, 12)
    strided = [
        torch.stack([value, value], -1)[..., 0].detach().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.dim()
        else value
        for value in inputs
    ]
    eager = kernel_cases.with_gradients(kernel_cases.operation(name), inputs)
    again = kernel_cases.with_gradients(kernel_cases.operation(name), strided)
    assert all(torch.equal(a, b) for a, b in zip(again, eager, strict=True))
