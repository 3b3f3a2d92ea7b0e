"""The integer side of the step: gathering, replacing, counting."""

import kernel_cases
import pytest
import torch
from fastelectra.kernels.embedding_gradient import embedding_gradient

from fastelectra import kernels


@kernel_cases.shapes(12, rows=(0, 1200), padding=(0, 40), seed=(0, 99))
def test_replace_tokens_is_the_reference(rows, padding, seed):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, (rows,), generator=g, dtype=torch.int32)
    positions = kernel_cases.chosen_positions(g, rows, padding)
    sampled = torch.randint(0, 7, positions.shape, generator=g, dtype=torch.int32)
    tokens, positions, sampled = kernel_cases.placed(tokens, positions, sampled)
    expected = kernels.replace_tokens_reference(tokens, positions, sampled)
    for a, e in zip(kernels.replace_tokens(tokens, positions, sampled), expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


def test_replace_tokens_opcheck():
    tokens, places = kernel_cases.placed(
        torch.arange(9, dtype=torch.int32), torch.tensor([1, 4, 9], dtype=torch.int32)
    )
    torch.library.opcheck(torch.ops.fastelectra.replace_tokens.default, (tokens, places, places))


def test_gathering_ignores_what_lies_beyond_and_gives_it_no_gradient():
    hidden, positions = kernel_cases.placed(
        torch.randn(6, 5), torch.tensor([0, 5, 6, 6], dtype=torch.int32)
    )
    rows = kernels.masked_gather(hidden.requires_grad_(), positions)
    assert torch.equal(rows[:2], hidden[[0, 5]])
    assert not rows[2:].any()
    rows.backward(torch.ones_like(rows))
    assert hidden.grad.sum(1).tolist() == [5, 0, 0, 0, 0, 5]


def loss_inputs(logits, replaced, real):
    """Inputs of which the logits are those given: one unit, gelu(x) ≈ x for large x."""
    hidden = logits[:, None] + 100
    one = torch.ones(1)
    real = torch.tensor(real, dtype=torch.int32)
    return kernel_cases.placed(hidden, torch.zeros(1), one, -100 * one, replaced, real)


def test_histogram_counts_each_real_row_once():
    logits = torch.tensor([-40.0, -16.0, -1e-3, 0.0, 0.04, 15.99, 16.0, 40.0, 3.0])
    replaced = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 1], dtype=torch.int32)
    _, histogram = kernels.replaced_token_loss(*loss_inputs(logits, replaced, real=8))
    expected = torch.zeros(2, 1024)
    for row, bin in ((0, 0), (0, 0), (0, 511), (1, 512), (1, 513), (1, 1023), (1, 1023), (0, 1023)):
        expected[row, bin] += 1
    assert torch.equal(histogram.cpu(), expected)


def test_padding_rows_count_for_nothing_even_if_not_finite():
    inputs = kernel_cases.make("replaced_token_loss", 20, 9, torch.float32)
    clean = kernel_cases.with_gradients(kernel_cases.operation("replaced_token_loss"), inputs)
    with torch.no_grad():
        inputs[0][16:] = torch.nan
    dirty = kernel_cases.with_gradients(kernel_cases.operation("replaced_token_loss"), inputs)
    assert all(torch.equal(c, d) for c, d in zip(clean, dirty, strict=True))
    assert not dirty[1][16:].any()


@pytest.mark.parametrize("real", [0, 7])
def test_loss_of_certain_and_absurd_logits(real):
    logits = torch.tensor([-90.0, -20.0, 0.0, 20.0, 90.0, -1e4, 1e4])
    replaced = torch.tensor([0, 1, 1, 0, 1, 1, 0], dtype=torch.int32)
    inputs = loss_inputs(logits, replaced, real)
    loss, histogram = kernels.replaced_token_loss(*inputs)
    expected, expected_histogram = kernels.replaced_token_loss_reference(*inputs)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(histogram, expected_histogram)


def test_small_losses_of_certain_logits_are_exact():
    logits = torch.tensor([-20.0, 20.0, -12.0, -17.0])
    replaced = torch.tensor([0, 1, 0, 0], dtype=torch.int32)
    for row in range(4):  # one by one: none is lost beside a larger one
        one = slice(row, row + 1)
        inputs = loss_inputs(logits[one], replaced[one], real=1)
        loss, _ = kernels.replaced_token_loss(*inputs)
        expected = torch.log1p(torch.exp(-logits[row].abs().double())).item()
        assert abs(loss.item() / expected - 1) < 1e-5


@pytest.mark.parametrize(
    "lengths",
    [
        [64, 64, 64],  # runs that end where blocks of sorted rows do
        [1, 63, 64, 128, 65, 1, 62, 3],
        [10, 3_000, 200, 500, 7],  # the most that are added at once is 32 blocks of 64
        [1] * 130,
        [129],
    ],
)
@pytest.mark.parametrize("size", [None, 2**15, 2**15 + 1])  # of the table: the least, and large
def test_tables_sum_runs_of_any_length(lengths, size):
    g = torch.Generator().manual_seed(0)
    numbers = torch.randperm(len(lengths), generator=g).int() * 2
    size = size or 2 * len(lengths) + 3
    numbers[-1] = size - 1
    indices = numbers.repeat_interleave(torch.tensor(lengths))
    indices = indices[torch.randperm(len(indices), generator=g)]
    dz = torch.randn(len(indices), 20, generator=g, dtype=torch.float64).to(kernel_cases.EXACT)
    dz, indices = kernel_cases.placed(dz, indices)
    expected = dz.new_zeros(size, 20).index_add_(0, indices.long(), dz)
    found = embedding_gradient(dz, indices, size, dz.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    more = torch.cat([indices, indices.flip(0)])
    expected = expected.index_add_(0, indices.flip(0).long(), dz)
    found = embedding_gradient(dz, more, size, dz.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
