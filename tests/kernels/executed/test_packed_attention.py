"""Triton's attention over packed sequences: its dropout mask, many blocks, scores of any size."""

import kernel_cases
import numpy as np
import pytest
import torch
from masks import attention_numbers, masked_attention

from fastelectra import kernels

LENGTHS = (18, 0, 7, 130, 66, 64)  # one block of 16 bit and more, whole and cut
BOUNDARIES, LONGEST = torch.tensor([0, *LENGTHS]).cumsum(0).int(), 140
HEADS, SIZE = 2, 12


def with_mask(p, seed):
    def call(qkv, bias):
        qkv = qkv + bias.view(qkv.shape[1:])
        return masked_attention(qkv, BOUNDARIES, LONGEST, p, seed)

    return call


def ours(p, seed):
    boundaries, seeds = kernel_cases.placed(BOUNDARIES, torch.tensor([seed]))

    def call(qkv, bias):
        products = qkv + bias.detach().view(qkv.shape[1:])
        return kernels.packed_attention(products, bias, boundaries, LONGEST, p, seeds)

    return call


def inputs(dtype):
    g = torch.Generator().manual_seed(0)
    shapes = (sum(LENGTHS), 3, HEADS, SIZE), (3 * HEADS * SIZE,)
    made = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return [kernel_cases.convert(value.requires_grad_(), dtype) for value in made]


@pytest.mark.parametrize(("p", "seed"), [(0.1, 3), (0.5, 2**40 + 11), (0.9, 2**62)])
def test_drops_what_the_numbers_say(p, seed):
    made = inputs(kernel_cases.EXACT)
    for a, e in zip(
        kernel_cases.with_gradients(ours(p, seed), made),
        kernel_cases.with_gradients(with_mask(p, seed), made),
        strict=True,
    ):
        torch.testing.assert_close(a, e, **kernel_cases.CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_error_in_16_bits_is_at_most_twice_that_of_pytorch(p, dtype):
    made = inputs(dtype)
    exact = [kernel_cases.convert(value, torch.float64) for value in made]
    found = (
        kernel_cases.with_gradients(way(p, 5), values)
        for way, values in ((with_mask, exact), (with_mask, made), (ours, made))
    )
    for truth, plain, fused in zip(*found, strict=True):
        allowed = 2 * (plain.double() - truth).norm() + 1e-6 * truth.norm()
        assert (fused.double() - truth).norm() <= allowed


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_numbers_are_independent(p):
    """Shares and pairs of neighbours, of the four of one counter, of heads and of seeds."""
    drops, size = [], 1024
    for seed, head in ((1, 0), (1, 1), (2, 0)):
        drops.append(attention_numbers(0, size, size, seed, head) < np.uint32(int(p * 2**32)))
    error = 5 * (p * (1 - p) / drops[0].size) ** 0.5
    assert all(abs(drop.mean() - p) < error for drop in drops)
    pairs = [(drops[0], other) for other in drops[1:]]
    for down in range(10):
        for right in range(-9, 10):
            if (down, right) > (0, 0):
                there = drops[0][down:, max(0, right) : size + min(0, right)]
                here = drops[0][: size - down, max(0, -right) : size - max(0, right)]
                pairs.append((here, there))
    four = drops[0].reshape(64, 2, 8, 64, 2, 8)
    places = [(a, b) for a in range(2) for b in range(2)]
    together = [four[:, a, :, :, b] for a, b in places]
    pairs += [(x, y) for n, x in enumerate(together) for y in together[:n]]
    for x, y in pairs:
        both = (x & y).mean()
        assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / x.size) ** 0.5


def test_scores_of_any_size():
    """A row whose scores are all far below 0 is no row of zeros: those lie beyond the sequence."""
    (boundaries,) = kernel_cases.placed(torch.tensor([0, 4, 9], dtype=torch.int32))
    qkv = torch.zeros(9, 3, 1, 16, dtype=kernel_cases.EXACT)
    qkv[:, 0, 0, 0] = 100
    qkv[:4, 1, 0, 0] = torch.tensor([-100.0, 0.0, 100.0, 99.99])
    qkv[4:, 1, 0, 0] = torch.tensor([-100.0, -99.99, -120.0, -99.98, -99.99])
    qkv[:, 2, 0] = torch.arange(9 * 16).view(9, 16) / 100
    (qkv,) = kernel_cases.placed(qkv)
    bias, (seed,) = qkv.new_zeros(48), kernel_cases.placed(torch.tensor([0]))
    qkv.requires_grad_()
    for p in (0.0, 0.1):
        out = kernels.packed_attention(qkv, bias, boundaries, 5, p, seed)
        (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
        assert gradient.isfinite().all()
    out = kernels.packed_attention(qkv, bias, boundaries, 5, 0.0, seed)
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
    expected = kernels.packed_attention_reference(qkv, bias, boundaries, 5, 0.0, None)
    (theirs,) = torch.autograd.grad(expected.square().sum(), qkv)
    torch.testing.assert_close(out, expected, **kernel_cases.CLOSE)
    torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_passes_on_what_is_not_a_number(which):
    qkv, bias = inputs(torch.float32)
    with torch.no_grad():
        qkv[30, which, 0, 0] = torch.nan  # of the fourth sequence
    out = ours(0.1, 3)(qkv, bias)
    rows = {0: slice(30, 31), 1: slice(25, 155), 2: slice(25, 155)}[which]
    wrong = out.isnan().flatten(1).any(1)
    assert wrong[rows].all()
    assert wrong.sum() == len(wrong[rows])
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
    assert gradient[25:155].isnan().flatten(1).any(1).all()
    assert gradient[:25].isfinite().all()
    assert gradient[155:].isfinite().all()


def test_a_block_without_weight_leaves_the_others_theirs():
    qkv, bias = inputs(torch.float32)
    qkv = qkv.detach()
    qkv[:, 0], qkv[:, 1] = 1, 0
    qkv[25 : 25 + 64, 1, :, 0] = -torch.inf  # scores of whole blocks
    boundaries, seed = kernel_cases.placed(BOUNDARIES, torch.tensor([0]))
    out = kernels.packed_attention(qkv, bias, boundaries, LONGEST, 0.0, seed)
    assert out.isfinite().all()
    torch.testing.assert_close(out[25], qkv[25 + 64 : 155, 2].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    not kernel_cases.ON_GPU or torch.cuda.get_device_properties(0).total_memory < 2e10,
    reason="needs a GPU and 10 GB of its memory",
)
def test_more_elements_than_32_bits_count():
    length, count, heads = 128, 2048, 48
    qkv = torch.randn(length * count, 3, heads, 64, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    boundaries, seed = kernel_cases.placed(
        torch.arange(0, len(qkv) + 1, length, dtype=torch.int32), torch.tensor([0])
    )
    bias = qkv.new_zeros(3 * heads * 64)
    out = kernels.packed_attention(qkv, bias, boundaries, length, 0.0, seed)
    last = kernels.packed_attention(qkv[-length:], bias, boundaries[:2], length, 0.0, seed)
    assert torch.equal(out[-length:], last)
