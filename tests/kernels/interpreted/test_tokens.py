"""The integer side of the step: gathering, replacing, counting."""

import kernel_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastelectra import kernels


@settings(max_examples=12, deadline=None, derandomize=True)
@given(rows=st.integers(0, 1200), padding=st.integers(0, 40), seed=st.integers(0, 99))
def test_replace_tokens_is_the_reference(rows, padding, seed):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, (rows,), generator=g, dtype=torch.int32)
    positions = kernel_cases.chosen_positions(g, rows, padding)
    sampled = torch.randint(0, 7, positions.shape, generator=g, dtype=torch.int32)
    expected = kernels.replace_tokens_reference(tokens, positions, sampled)
    for a, e in zip(kernels.replace_tokens(tokens, positions, sampled), expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


def test_replace_tokens_opcheck():
    tokens = torch.arange(9, dtype=torch.int32)
    places = torch.tensor([1, 4, 9], dtype=torch.int32)
    torch.library.opcheck(torch.ops.fastelectra.replace_tokens.default, (tokens, places, places))


def test_gathering_ignores_what_lies_beyond_and_gives_it_no_gradient():
    hidden = torch.randn(6, 5, requires_grad=True)
    positions = torch.tensor([0, 5, 6, 6], dtype=torch.int32)
    rows = kernels.masked_gather(hidden, positions)
    assert torch.equal(rows, torch.cat([hidden[[0, 5]], torch.zeros(2, 5)]))
    rows.backward(torch.ones_like(rows))
    assert hidden.grad.sum(1).tolist() == [5, 0, 0, 0, 0, 5]


def loss_inputs(logits, replaced, real):
    """Inputs of which the logits are those given: one unit, gelu(x) ≈ x for large x."""
    hidden = logits[:, None] + 100
    one = torch.ones(1)
    real = torch.tensor(real, dtype=torch.int32)
    return hidden, torch.zeros(1), one, -100 * one, replaced, real


def test_histogram_counts_each_real_row_once():
    logits = torch.tensor([-40.0, -16.0, -1e-3, 0.0, 0.04, 15.99, 16.0, 40.0, 3.0])
    replaced = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 1], dtype=torch.int32)
    _, histogram = kernels.replaced_token_loss(*loss_inputs(logits, replaced, real=8))
    expected = torch.zeros(2, 1024)
    for row, bin in ((0, 0), (0, 0), (0, 511), (1, 512), (1, 513), (1, 1023), (1, 1023), (0, 1023)):
        expected[row, bin] += 1
    assert torch.equal(histogram, expected)


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
