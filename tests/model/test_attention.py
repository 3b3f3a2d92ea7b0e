"""Attention over packed rows: the CPU's numbers, and which GPU implementation is called how."""

import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastelectra.errors import FastElectraError
from fastelectra.model import attention
from fastelectra.model.attention import choose, layout_of

SEED = torch.tensor([7])


def reference(qkv, cu_seqlens):
    """Sequence by sequence, written out."""
    out = 0 * qkv[:, 0]
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = qkv[start:end].unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out


@pytest.mark.parametrize("lengths", [[7], [3, 0, 9, 1, 0], [4, 4, 4], [0, 0], []])
@pytest.mark.parametrize("padding", [0, 5])
def test_cpu_equals_a_loop_over_sequences(lengths, padding):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    real = sum(lengths)
    shape = (real + padding, 3, 2, 4)
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    qkv.requires_grad_()
    bias = torch.zeros(24, dtype=torch.float64, requires_grad=True)
    layout = layout_of(cu_seqlens, len(qkv), max([4, *lengths]))
    out = attention.attention(qkv, layout, 0.0, SEED, bias)
    assert out.shape == (real + padding, 2, 4)
    assert out.isfinite().all()  # padding too: nothing may leak a NaN into a matrix product
    torch.testing.assert_close(out[:real], reference(qkv, cu_seqlens)[:real])
    gradient = torch.randn(real, 2, 4, generator=torch.Generator().manual_seed(1)).double()
    ours, of_bias = torch.autograd.grad(out[:real], (qkv, bias), gradient)
    (theirs,) = torch.autograd.grad(reference(qkv, cu_seqlens)[:real], qkv, gradient)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(of_bias, theirs.sum(0).flatten())


def test_layout_covers_padding_with_sequences_of_bounded_length():
    layout = layout_of(torch.tensor([0, 5, 9, 9], dtype=torch.int32), 24, 6)
    assert layout.cu_seqlens.tolist() == [0, 5, 9, 9, 15, 21, 24, 24]
    assert layout.cu_seqlens.dtype == torch.int32


def test_dropout_keeps_the_expectation():
    torch.manual_seed(0)
    copies, length = 2000, 6
    qkv = torch.randn(length, 3, 2, 4).repeat(copies, 1, 1, 1)
    layout = layout_of(torch.arange(0, len(qkv) + 1, length, dtype=torch.int32), len(qkv), length)
    draws = attention.attention(qkv, layout, 0.5, SEED, torch.zeros(24))
    draws = draws.view(copies, length, 2, 4)
    exact = attention.attention(qkv, layout, 0.0, SEED, torch.zeros(24))[:length]
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0), exact, atol=0.1, rtol=0)


BOTH = frozenset({"flash-attn 2", "flash-attn 4"})


@pytest.mark.parametrize(
    ("capability", "dtype", "dropout", "packages", "expected"),
    [
        (None, torch.float32, True, BOTH, "packed"),
        (None, torch.bfloat16, False, BOTH, "packed"),
        ((9, 0), torch.float32, False, BOTH, "memory-efficient"),
        ((7, 5), torch.float16, True, BOTH, "memory-efficient"),
        ((9, 0), torch.bfloat16, True, BOTH, "Triton"),
        ((8, 0), torch.bfloat16, True, frozenset(), "torch flash"),
        ((10, 0), torch.bfloat16, True, BOTH, "flash-attn 2"),
        ((9, 0), torch.bfloat16, False, frozenset(), "torch flash"),
        ((9, 0), torch.bfloat16, False, BOTH, "flash-attn 4"),
        ((10, 0), torch.float16, False, BOTH, "flash-attn 4"),
        ((8, 0), torch.bfloat16, False, BOTH, "torch flash"),
        ((12, 0), torch.bfloat16, False, BOTH, "torch flash"),
    ],
)
def test_choice_of_implementation(capability, dtype, dropout, packages, expected):
    assert choose(capability, dtype, 64, dropout, "auto", packages) == expected
    assert expected in {*attention.OURS, *attention.BACKENDS}
    asked = choose(capability, dtype, 64, dropout, "triton", packages)
    assert asked == (expected if expected in ("packed", "memory-efficient") else "Triton")
    assert choose(capability, dtype, 64, dropout, "torch", packages) != "Triton"


def test_head_sizes_that_no_gpu_takes_are_an_error():
    assert choose((9, 0), torch.bfloat16, 32, False, "auto", BOTH) == "torch flash"  # not 4's
    # not Triton's
    assert choose((9, 0), torch.bfloat16, 96, False, "triton", BOTH) == "flash-attn 4"
    for head_size in (20, 264):
        with pytest.raises(FastElectraError, match=f"head size of {head_size}"):
            choose((8, 0), torch.bfloat16, head_size, True, "auto", frozenset())
        assert choose(None, torch.float32, head_size, True, "auto", frozenset()) == "packed"


def test_description_names_the_implementation_in_use():
    described = attention.describe(torch.device("cpu"), torch.float32, 64, 0.1)
    assert described == "attention: packed"


@pytest.mark.parametrize(
    ("name", "dropout"), [("torch flash", 0.0), ("torch flash", 0.1), ("memory-efficient", 0.1)]
)
def test_torchs_gpu_operators_take_our_call(name, dropout):
    """Forward and backward on the meta device: torch checks arguments, shapes and derivatives."""
    qkv = torch.empty(12, 3, 2, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    layout = layout_of(torch.empty(5, dtype=torch.int32, device="meta"), 12, 6)
    out = attention.BACKENDS[name](*qkv.unbind(1), layout.cu_seqlens, 6, dropout)
    assert out.shape == (12, 2, 64)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_memory_efficient_is_never_told_of_more_rows_than_there_are():
    """Its backward refuses that: a batch of a few short texts."""
    qkv = torch.empty(12, 3, 2, 64, device="meta", requires_grad=True)
    layout = layout_of(torch.empty(3, dtype=torch.int32, device="meta"), 12, 128)
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append((function, args))
            return function(*args, **(kwargs or {}))

    with Calls():
        out = attention.BACKENDS["memory-efficient"](
            *qkv.unbind(1), layout.cu_seqlens, layout.max_length, 0.1
        )
        out.sum().backward()
    bounds = {
        value
        for function, args in calls if "_efficient_attention" in str(function)
        for argument, value in zip(function._schema.arguments, args, strict=False)
        if argument.name.startswith("max_seqlen")
    }  # fmt: skip
    assert bounds == {12}


def test_torchs_gpu_operators_mean_what_we_pass():
    flash = torch.ops.aten._flash_attention_forward.default._schema.arguments
    assert [argument.name for argument in flash[3:10]] == [
        "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask",
    ]  # fmt: skip
    efficient = torch.ops.aten._efficient_attention_forward.default._schema.arguments
    assert [argument.name for argument in efficient[3:11]] == [
        "bias", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p",
        "custom_mask_type", "compute_log_sumexp",
    ]  # fmt: skip


def test_flash_attention_packages_are_called_as_documented(monkeypatch):
    """They cannot be installed without a GPU: functions of their signatures stand in for them."""

    def flash_attn_2(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False,
    ):  # fmt: skip
        assert (max_seqlen_q, max_seqlen_k, dropout_p) == (6, 6, 0.25)
        assert (softmax_scale, causal) == (None, False)
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        return reference(torch.stack([q, k, v], 1), cu_seqlens_q)

    def flash_attn_4(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, softmax_scale=None, causal=False,
    ):  # fmt: skip
        assert (max_seqlen_q, max_seqlen_k, qv, softmax_scale, causal) == (6, 6, None, None, False)
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        return reference(torch.stack([q, k, v], 1), cu_seqlens_q), None

    package, cute = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    package.flash_attn_varlen_func = flash_attn_2
    cute.flash_attn_varlen_func = flash_attn_4
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    qkv = torch.randn(9, 3, 2, 4)
    layout = layout_of(torch.tensor([0, 5, 9], dtype=torch.int32), 9, 6)
    expected = reference(qkv, layout.cu_seqlens)
    for name, dropout in (("flash-attn 2", 0.25), ("flash-attn 4", 0.0)):
        out = attention.BACKENDS[name](*qkv.unbind(1), layout.cu_seqlens, 6, dropout)
        torch.testing.assert_close(out, expected)
