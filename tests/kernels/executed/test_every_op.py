"""What must hold of every op's Triton kernels, whatever they compute."""

import importlib

import kernel_cases
import pytest
import torch
from fastelectra.kernels import language
from torch.utils.checkpoint import checkpoint

every_op = pytest.mark.parametrize("name", kernel_cases.CASES)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_pytorch(name, dtype):
    kernel_cases.assert_error_is_small(name, 24, 40, dtype)


@every_op
@kernel_cases.shapes(10, rows=(0, 45), width=(1, 80))
def test_any_shape(name, rows, width):
    if kernel_cases.ON_GPU:
        width += 3  # the deviation of few numbers may be next to 0: rounding is then everything
    elif name.endswith("layer_norm"):
        width += 1  # and that of one number is 0
    compare(name, kernel_cases.make(name, rows, width, kernel_cases.EXACT))


def compare(name, inputs):
    """Output and gradients are those of plain PyTorch."""
    fused = kernel_cases.with_gradients(kernel_cases.operation(name), inputs)
    plain = kernel_cases.with_gradients(kernel_cases.reference(name), inputs)
    for f, p in zip(fused, plain, strict=True):
        torch.testing.assert_close(f, p, **kernel_cases.CLOSE)


@pytest.mark.parametrize(
    "name", sorted(set(kernel_cases.CASES) - {*kernel_cases.WAYS, "packed_attention"})
)
def test_a_program_takes_many_blocks_of_rows(name, monkeypatch):
    module = importlib.import_module(f"fastelectra.kernels.{name}")
    if hasattr(module, "PROGRAMS"):
        monkeypatch.setattr(module, "PROGRAMS", 2)
    compare(name, kernel_cases.make(name, 300, 200, kernel_cases.EXACT))


@pytest.mark.parametrize("rows", [16, 17, 48, 1040])  # blocks of 16, shared by 32 programs
def test_gelu_takes_all_blocks_from_the_last(rows, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastelectra.kernels.bias_gelu"), "PROGRAMS", 2)
    compare("bias_gelu", kernel_cases.make("bias_gelu", rows, 200, kernel_cases.EXACT))


def test_column_sums_of_many_rows():
    x = torch.randn(2500, 3, 70, generator=torch.Generator().manual_seed(0))
    (x,) = kernel_cases.placed(x)
    torch.testing.assert_close(
        language.column_sums(x, torch.float32), x.double().sum(0).float(), rtol=1e-5, atol=1e-4
    )


def test_narrow_head_with_tiles_of_wide_rows():
    kernel_cases.assert_error_is_small("flash_cross_entropy", 70, 200, torch.bfloat16)


@pytest.mark.skipif(kernel_cases.ON_GPU, reason="needs fp64")
@every_op
def test_gradcheck(name):
    inputs = kernel_cases.make(name, 5, 6)
    assert torch.autograd.gradcheck(kernel_cases.operation(name), inputs, fast_mode=True)


@every_op
def test_two_runs_are_bitwise_equal(name):
    inputs = kernel_cases.make(name, 25, 40, torch.float32)
    once = kernel_cases.with_gradients(kernel_cases.operation(name), inputs)
    twice = kernel_cases.with_gradients(kernel_cases.operation(name), inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@every_op
def test_checkpointing_gives_what_is_saved_once(name):
    inputs = kernel_cases.make(name, 25, 40, torch.float32)
    operation = kernel_cases.operation(name)

    def again(*arguments):
        return checkpoint(operation, *arguments, use_reentrant=False)

    once, twice = (kernel_cases.with_gradients(way, inputs) for way in (operation, again))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize(
    "name", sorted(set(kernel_cases.CASES) - {*kernel_cases.WAYS, "split_qkv"})
)
def test_opcheck(name):
    forward = importlib.import_module(f"fastelectra.kernels.{name}").forward.custom_op
    torch.library.opcheck(forward, kernel_cases.make(name, 6, 40, torch.float32))


@every_op
def test_compiles_without_a_graph_break(name):
    inputs = kernel_cases.make(name, 20, 40, torch.float32)
    torch._dynamo.reset()  # else all ops share the few recompilations that a function may take
    compiled = torch.compile(kernel_cases.operation(name), backend="aot_eager", fullgraph=True)
    eager = kernel_cases.with_gradients(kernel_cases.operation(name), inputs)
    for c, e in zip(kernel_cases.with_gradients(compiled, inputs), eager, strict=True):
        assert torch.equal(c, e)


@every_op
def test_inputs_need_not_be_contiguous(name):
    inputs = kernel_cases.make(name, 10, 40, torch.float32)
    strided = [
        torch.stack([value, value], -1)[..., 0].detach().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.dim()
        else value
        for value in inputs
    ]
    eager = kernel_cases.with_gradients(kernel_cases.operation(name), inputs)
    again = kernel_cases.with_gradients(kernel_cases.operation(name), strided)
    assert all(torch.equal(a, b) for a, b in zip(again, eager, strict=True))
