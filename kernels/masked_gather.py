"""Rows of the hidden states at the chosen positions.

Separate operations index, then scatter into a matrix filled with zeros before. Here backward writes
each of the T rows once: the gradient of its place among the positions, found by binary search, or
zeros. No atomics, no pass that fills.
"""

import torch

from .dispatch import operation, use_triton
from .language import find, jit, row_blocks, tl


@jit
def _forward(
    hidden_ptr, positions_ptr, gathered_ptr,
    rows, chosen, H: tl.constexpr, BH: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, BH)
    row = tl.load(positions_ptr + place, place < chosen, rows)
    inside = (column < H)[None, :]
    at = row.to(tl.int64)[:, None] * H + column[None, :]
    gathered = tl.load(hidden_ptr + at, (row < rows)[:, None] & inside, 0.0)
    at = place.to(tl.int64)[:, None] * H + column[None, :]
    tl.store(gathered_ptr + at, gathered, (place < chosen)[:, None] & inside)


@jit
def _backward(
    d_gathered_ptr, positions_ptr, d_hidden_ptr,
    rows, chosen, steps, H: tl.constexpr, BH: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, BH)
    place, found = find(positions_ptr, row, chosen, steps)
    inside = (column < H)[None, :]
    at = place.to(tl.int64)[:, None] * H + column[None, :]
    d_hidden = tl.load(d_gathered_ptr + at, found[:, None] & inside, 0.0)
    at = row.to(tl.int64)[:, None] * H + column[None, :]
    tl.store(d_hidden_ptr + at, d_hidden, (row < rows)[:, None] & inside)


@operation("masked_gather")
def forward(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """→ rows [M, H]."""
    gathered = _forward_output(hidden, positions)
    constants, warps = row_blocks(hidden.shape[1])
    sizes = hidden.shape[0], positions.shape[0]
    grid = (-(-sizes[1] // constants["R"]),)
    _forward[grid](hidden, positions, gathered, *sizes, **constants, num_warps=warps)
    return gathered


def _forward_output(hidden, positions):
    return hidden.new_empty(positions.shape[0], hidden.shape[1])


@operation("masked_gather_backward")
def backward(d_gathered: torch.Tensor, positions: torch.Tensor, rows: int) -> torch.Tensor:
    """→ gradient of hidden [T, H]."""
    d_hidden = _backward_output(d_gathered, positions, rows)
    chosen = positions.shape[0]
    constants, warps = row_blocks(d_hidden.shape[1])
    _backward[(-(-rows // constants["R"]),)](
        d_gathered, positions, d_hidden, rows, chosen, chosen.bit_length(), **constants,
        num_warps=warps,
    )  # fmt: skip
    return d_hidden


def _backward_output(d_gathered, positions, rows):
    return d_gathered.new_empty(rows, d_gathered.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.rows = inputs[0].shape[0]


forward.register_fake(_forward_output)
backward.register_fake(_backward_output)
forward.register_autograd(
    lambda ctx, d_gathered: (backward(d_gathered, *ctx.saved_tensors, ctx.rows), None),
    _save,
)


def masked_gather(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows of hidden [T, H] at positions [M] int32 → [M, H].

    Positions ascend without repetition, then any number of T: those give zero rows and no gradient.
    """
    if use_triton(hidden):
        return forward(hidden, positions)
    return masked_gather_reference(hidden, positions)


def masked_gather_reference(hidden, positions):
    """`masked_gather` in plain PyTorch."""
    padding = positions >= hidden.shape[0]
    rows = hidden.index_select(0, positions.masked_fill(padding, 0))
    return rows.masked_fill(padding[:, None], 0)
