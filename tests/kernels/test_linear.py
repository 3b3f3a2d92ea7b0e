"""Products with a weight, whose gradient is made in tiles on a CPU that has them."""

import os
import subprocess
import sys
from importlib import import_module

import kernel_cases
import pytest
import torch
import torch.nn.functional as F
from fastelectra.kernels import cpu

from fastelectra import kernels

linear = import_module("fastelectra.kernels.linear")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
in_tiles = pytest.mark.skipif(not cpu.HAS_AMX, reason="this CPU has no AMX")


def inputs(rows, outputs, width, seed=0):
    """x, weight and the gradient of their product, in bf16."""
    g = torch.Generator().manual_seed(seed)
    sizes = (rows, width), (outputs, width), (rows, outputs)
    x, weight, dy = (torch.randn(*size, generator=g).bfloat16() for size in sizes)
    return x.requires_grad_(), weight.requires_grad_(), dy


def gradients(function, x, weight, dy):
    return torch.autograd.grad(function(x, weight), (x, weight), dy)


def is_ours(output):
    return type(output.grad_fn).__name__ == "_LinearBackward"


@in_tiles
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 600), st.integers(1, 9), st.integers(1, 9))
def test_weights_gradient_is_as_exact_as_rounding_allows(rows, high, wide):
    x, weight, dy = inputs(rows, 32 * high, 32 * wide)
    assert is_ours(kernels.linear(x, weight))
    dx, gradient = gradients(kernels.linear, x, weight, dy)
    exact = dy.double().t() @ x.double()
    assert gradient.dtype == torch.bfloat16
    assert (gradient.double() - exact).norm() <= 2 * (exact.bfloat16() - exact).norm() + 1e-6
    assert torch.equal(dx, gradients(F.linear, x, weight, dy)[0])


@in_tiles
def test_weights_gradient_has_the_same_bits_in_any_number_of_threads(threads):
    for sizes in ((700, 96, 32), (700, 32, 160), (700, 32, 32)):
        found = gradients(kernels.linear, *inputs(*sizes))[1]
        with kernel_cases.in_threads(1):
            assert torch.equal(found, gradients(kernels.linear, *inputs(*sizes))[1])


@in_tiles
def test_weights_gradient_passes_on_what_is_not_a_number():
    x, weight, dy = inputs(70, 32, 64)
    dy[69, 3] = torch.nan
    found = gradients(kernels.linear, x, weight, dy)[1].isnan()
    assert found[3].all()
    assert found.sum() == 64


@in_tiles
def test_rows_and_columns_of_any_layout():
    x, weight, _ = inputs(70, 64, 96)
    turned = torch.randn(96, 70).bfloat16().t()
    for given in (x, turned.detach().requires_grad_(), torch.cat([x, x], 1).detach()[:, 5:101]):
        output = kernels.linear(given, weight)
        assert is_ours(output)
        (found,) = torch.autograd.grad(output.sum(), weight)  # a gradient of one number
        exact = given.detach().double().sum(0).expand(64, 96)
        assert (found.double() - exact).norm() <= 2 * (exact.bfloat16() - exact).norm()


@in_tiles
def test_more_rows_than_are_taken_at_a_time():
    x, weight, dy = inputs(40, linear.TALL + 64, 32)
    exact = dy.double().t() @ x.double()
    found = gradients(kernels.linear, x, weight, dy)[1]
    assert (found.double() - exact).norm() <= 2 * (exact.bfloat16() - exact).norm()


@in_tiles
def test_only_gradients_that_are_wanted_are_made(monkeypatch):
    x, weight, dy = inputs(40, 64, 32)
    kernels.linear(x.detach(), weight).backward(dy)
    assert weight.grad is not None
    monkeypatch.setattr(linear, "_weight_gradient", None)
    kernels.linear(x, weight.detach()).backward(dy)
    assert torch.equal(x.grad, dy @ weight)


@pytest.mark.parametrize("outputs", [64, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bias_is_added_and_gets_no_gradient(outputs, dtype):
    x, weight = (value.detach().to(dtype).requires_grad_() for value in inputs(40, outputs, 32)[:2])
    bias = torch.randn(outputs).to(dtype).requires_grad_()
    for given in (x, x[:0], torch.cat([x, x], 1)[:, 5:37], torch.randn(32, 40).to(dtype).t()):
        output = kernels.linear(given, weight, bias)
        exact = given.double() @ weight.double().t() + bias.double()
        assert output.dtype == dtype
        assert (output - exact).norm() <= 2 * (exact.to(dtype) - exact).norm() + 1e-6 * exact.norm()
        assert torch.autograd.grad(output.sum(), bias, allow_unused=True) == (None,)


@pytest.mark.parametrize("layout", ["apart", "one number", "no dimension", "two", "a bias a row"])
def test_a_bias_of_any_layout(layout):
    x, weight, _ = inputs(40, 64, 32)
    bias = {
        "apart": torch.randn(64, 2).bfloat16()[:, 0],
        "one number": torch.randn(1).bfloat16().expand(64),
        "no dimension": torch.randn(()).bfloat16(),
        "two": torch.randn(1, 64).bfloat16(),
        "a bias a row": torch.randn(40, 64).bfloat16(),
    }[layout]
    output = kernels.linear(x, weight, bias)
    assert torch.equal(output, F.linear(x, weight, bias))
    assert not is_ours(output)


@pytest.mark.parametrize("sizes", [(32, 40), (40, 32)])
def test_other_widths_are_pytorchs(sizes):
    x, weight, dy = inputs(50, *sizes)
    assert not is_ours(kernels.linear(x, weight))
    ways = (gradients(function, x, weight, dy) for function in (kernels.linear, F.linear))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*ways, strict=True))


def test_what_does_not_fit_is_pytorchs():
    x, weight, _ = inputs(50, 32, 32)
    for dtype in (torch.float32, torch.float16):
        assert not is_ours(kernels.linear(x.to(dtype), weight.to(dtype)))
    assert not is_ours(kernels.linear(x.view(5, 10, 32), weight))
    with pytest.raises(RuntimeError, match="dtype"):
        kernels.linear(x, weight, torch.randn(32))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_ours(kernels.linear(x, weight.float()))
    kernels.set_backend("torch")
    try:
        assert not is_ours(kernels.linear(x, weight))
    finally:
        kernels.set_backend("auto")


@in_tiles
def test_many_threads_take_pytorchs():
    x, weight, _ = inputs(50, 32, 32)
    for count in (4, 5):
        with kernel_cases.in_threads(count):
            assert is_ours(kernels.linear(x, weight)) == (count == 4)


@in_tiles
def test_without_tiles_it_is_pytorchs():
    code = (
        "import torch; from fastelectra import kernels; x = torch.zeros(32, 32).bfloat16();"
        " print(kernels.linear(x, x.clone().requires_grad_()).grad_fn)"
    )
    for cpu_name in ("", "generic"):
        run = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True,
            env={**os.environ, "NUMBA_CPU_NAME": cpu_name},
        )  # fmt: skip
        assert ("_LinearBackward" in run.stdout) == (not cpu_name), run.stdout
