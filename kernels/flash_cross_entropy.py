"""The vocabulary head for narrow embeddings: no [M, V] matrix, forward or backward.

A tile is the product of a block of rows with rows of the table, in forward 128, and lives in
registers only. Forward leaves the maximum and the sum of exponentials of every (row, tile). From
these follow the loss and the tile a row's uniform number falls into; its 128 logits, computed once
more, give the token. That is one random number a row, where Gumbel noise on every logit costs 5.7
times the instructions. Backward computes the products twice again, once for the gradient of the
rows and once for that of the table; each program owns what it writes: no atomics, the same bits
every time.

5 products of [M, D] by [D, V] instead of 3, and no traffic of M · V: the 4 D more operations an
element cost as much as the 10 bytes saved (16-bit logits written, turned into gradients in place,
read by two products) at D = 660 on an H100 (263 operations a byte); at D = 128 a fifth of it.

How the work is cut changes neither tiles nor logits, only the order of sums: the samples of two
cuts differ only where a uniform number lies within rounding, about 1e-6, of a step of the
cumulative distribution.
"""

import torch

from .dispatch import operation
from .language import (
    BELOW_ONE,
    LOG2_E,
    NEGLIGIBLE,
    column_sums,
    jit,
    power_of_two,
    tl,
    upcast,
)

TILE = 128  # tokens; the finer level of the cumulative distribution
SLOTS = 264  # programs at work at once: two for each SM of an H100


@jit
def _rows(matrix_ptr, row, rows, D: tl.constexpr, BD: tl.constexpr):
    """Rows row [·] of a [rows, D] matrix, zeros beyond the last.

    Offsets in 32 bits: 64 cost registers that the backward kernels do not have.
    """
    d = tl.arange(0, BD)
    at = row[:, None] * D + d[None, :]
    return tl.load(matrix_ptr + at, (row < rows)[:, None] & (d < D)[None, :], 0.0)


@jit
def _logits(hidden, weight, bias_ptr, token, vocabulary, ACC: tl.constexpr):
    """hidden · weightᵀ + bias [·, BV]; -inf beyond the vocabulary."""
    z = tl.dot(hidden, tl.trans(weight), input_precision="ieee", out_dtype=ACC)
    bias = tl.load(bias_ptr + token, token < vocabulary, -float("inf"))
    return z + bias.to(ACC)[None, :]


@jit
def _forward(
    hidden_ptr, weight_ptr, bias_ptr, top_ptr, mass_ptr, tempered_ptr, temperature,
    rows, vocabulary, tiles, share,
    TEMPERED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Maximum and mass of each (tile, row) of BM rows and `share` tiles, at temperature 1 and T."""
    ACC: tl.constexpr = top_ptr.dtype.element_ty
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    hidden = _rows(hidden_ptr, row, rows, D, BD)
    first = tl.program_id(1) * share
    for tile in range(first, tl.minimum(first + share, tiles)):
        token = tile * BV + tl.arange(0, BV)
        weight = _rows(weight_ptr, token, vocabulary, D, BD)
        z = _logits(hidden, weight, bias_ptr, token, vocabulary, ACC) * LOG2_E
        top = tl.max(z, 1)
        z -= tl.where(top == -float("inf"), 0.0, top)[:, None]
        at = tile * rows + row
        tl.store(top_ptr + at, top, row < rows)
        tl.store(mass_ptr + at, tl.sum(tl.exp2(z), 1), row < rows)
        if TEMPERED:
            tl.store(tempered_ptr + at, tl.sum(tl.exp2(z / temperature), 1), row < rows)


@jit
def _first_above(mass, uniform):
    """First index at which the cumulative mass exceeds `uniform` of the whole, and what is left.

    What is left of uniform: its place within that index's own mass, in [0, 1). The whole is where
    the cumulative sum ends, not a sum of another order. Negligible mass is never chosen.
    """
    some = mass > tl.max(mass, 0) * NEGLIGIBLE
    cumulative = tl.where(some, tl.cumsum(mass, 0), 0.0)
    goal = uniform * tl.max(cumulative, 0)
    first = tl.argmax((cumulative > goal).to(tl.int32), 0)
    here = tl.arange(0, mass.shape[0]) == first
    beyond = tl.sum(tl.where(here, cumulative, 0.0), 0) - goal
    left = 1 - beyond / tl.sum(tl.where(here, mass, 0.0), 0)
    left = tl.where(left > 0, left, 0.0)
    return first, tl.where(left < BELOW_ONE, left, BELOW_ONE)


@jit
def _finish(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, uniforms_ptr, top_ptr, mass_ptr, tempered_ptr,
    loss_ptr, sampled_ptr, correct_ptr, lse_ptr, temperature,
    rows, vocabulary, tiles,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One row: its loss, hit and sample from its tiles' masses."""
    row = tl.program_id(0)
    tile = tl.arange(0, BT)
    at = tile * rows + row
    tops = tl.load(top_ptr + at, tile < tiles, -float("inf"))
    top = tl.max(tops, 0)
    total = tl.sum(tl.load(mass_ptr + at, tile < tiles, 0.0) * tl.exp2(tops - top), 0)
    lse = top + tl.log2(total)
    tl.store(lse_ptr + row, lse)

    d = tl.arange(0, BD)
    hidden = upcast(tl.load(hidden_ptr + row.to(tl.int64) * D + d, d < D, 0.0))
    label = tl.load(labels_ptr + row)
    own = upcast(tl.load(weight_ptr + label.to(tl.int64) * D + d, (d < D) & (label >= 0), 0.0))
    own_bias = upcast(tl.load(bias_ptr + label, label >= 0, 0.0))
    target = (tl.sum(hidden * own, 0) + own_bias) * LOG2_E
    hit = (label >= 0) & (target >= top - 1e-5 * tl.maximum(tl.abs(top), 1.0))
    tl.store(loss_ptr + row, tl.where(label >= 0, (lse - target) / LOG2_E, 0.0))
    tl.store(correct_ptr + row, hit.to(tl.float32))

    mass = tl.load(tempered_ptr + at, tile < tiles, 0.0) * tl.exp2((tops - top) / temperature)
    chosen, left = _first_above(mass, tl.load(uniforms_ptr + row))
    token = chosen * BV + tl.arange(0, BV)
    z = tl.sum(upcast(_rows(weight_ptr, token, vocabulary, D, BD)) * hidden[None, :], 1)
    z += upcast(tl.load(bias_ptr + token, token < vocabulary, -float("inf")))
    inside = tl.exp2((z * LOG2_E - top) / temperature)
    tl.store(sampled_ptr + row, chosen * BV + _first_above(inside, left)[0])


@jit
def _d_hidden(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, lse_ptr, d_loss_ptr, sums_ptr,
    rows, vocabulary, tiles, share,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradient of BM rows from `share` tiles: softmax - one-hot times the table, 0 if ignored."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    hidden = _rows(hidden_ptr, row, rows, D, BD)
    label = tl.load(labels_ptr + row, row < rows, -1)
    lse = tl.load(lse_ptr + row, (row < rows) & (label >= 0), float("inf"))
    total = tl.zeros([BM, BD], ACC)
    first = tl.program_id(1) * share
    for tile in range(first, tl.minimum(first + share, tiles)):
        token = tile * BV + tl.arange(0, BV)
        weight = _rows(weight_ptr, token, vocabulary, D, BD)
        z = _logits(hidden, weight, bias_ptr, token, vocabulary, ACC)
        p = tl.exp2(z * LOG2_E - lse[:, None])
        p = tl.where(token[None, :] == label[:, None], p - 1, p)
        total = tl.dot(p.to(weight.dtype), weight, total, input_precision="ieee", out_dtype=ACC)
    d = tl.arange(0, BD)
    at = (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * D + d[None, :]
    inside = (row < rows)[:, None] & (d < D)[None, :]
    tl.store(sums_ptr + at, total * tl.load(d_loss_ptr), inside)


@jit
def _d_weight(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, lse_ptr, d_loss_ptr, d_weight_ptr, d_bias_ptr,
    rows, vocabulary, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradient of BV rows of the table, and their biases, from all rows."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    token = tl.program_id(0) * BV + tl.arange(0, BV)
    weight = _rows(weight_ptr, token, vocabulary, D, BD)
    d_weight = tl.zeros([BV, BD], ACC)
    d_bias = tl.zeros([BV], ACC)
    bias = tl.load(bias_ptr + token, token < vocabulary, -float("inf")).to(ACC)
    for start in range(0, rows, BM):
        row = start + tl.arange(0, BM)
        hidden = _rows(hidden_ptr, row, rows, D, BD)
        label = tl.load(labels_ptr + row, row < rows, -1)
        lse = tl.load(lse_ptr + row, (row < rows) & (label >= 0), float("inf"))
        z = tl.dot(weight, tl.trans(hidden), input_precision="ieee", out_dtype=ACC)
        p = tl.exp2((z + bias[:, None]) * LOG2_E - lse[None, :])
        p = tl.where(token[:, None] == label[None, :], p - 1, p)
        d_bias += tl.sum(p, 1)
        p = p.to(hidden.dtype)
        d_weight = tl.dot(p, hidden, d_weight, input_precision="ieee", out_dtype=ACC)
    scale = tl.load(d_loss_ptr)
    d = tl.arange(0, BD)
    at = token[:, None] * D + d[None, :]
    inside = (token < vocabulary)[:, None] & (d < D)[None, :]
    tl.store(d_weight_ptr + at, (d_weight * scale).to(d_weight_ptr.dtype.element_ty), inside)
    d_bias = (d_bias * scale).to(d_bias_ptr.dtype.element_ty)
    tl.store(d_bias_ptr + token, d_bias, token < vocabulary)


def _parts(blocks: int, tiles: int, slots: int, most: int) -> int:
    """How many parts to cut the vocabulary into so that blocks · parts fill rounds of `slots`."""

    def time(parts):
        return -(-blocks * parts // slots) * -(-tiles // parts)

    return min(range(1, min(most, tiles) + 1), key=time)


def _launch(hidden, narrow, wide):
    """Options of a launch from (rows and tokens of a tile, warps, stages), for hidden's width."""
    width = max(16, power_of_two(hidden.shape[1]))
    rows, tokens, warps, stages = narrow if width <= 128 else wide
    return {"D": hidden.shape[1], "BD": width, "BM": rows, "BV": tokens, "num_warps": warps,
            "num_stages": stages}  # fmt: skip


@operation("flash_cross_entropy_sample")
def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ loss [], sampled [M], correct [], and the log2 of the sum of 2^logits of each row [M]."""
    loss, sampled, _, lse = _forward_outputs(hidden)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    tiles = -(-vocabulary // TILE)
    top, mass = loss.new_empty(tiles, rows), loss.new_empty(tiles, rows)
    tempered = mass if temperature == 1 else torch.empty_like(mass)
    launch = _launch(hidden, (128, TILE, 8, 2), (64, TILE, 8, 1))
    blocks = -(-rows // launch["BM"])
    parts = _parts(blocks, tiles, SLOTS, 16)
    _forward[(blocks, parts)](
        hidden, weight, bias, top, mass, tempered, temperature, rows, vocabulary, tiles,
        -(-tiles // parts), TEMPERED=temperature != 1, **launch,
    )  # fmt: skip
    losses, hits = torch.empty_like(lse), torch.empty_like(lse, dtype=torch.float32)
    _finish[(rows,)](
        hidden, weight, bias, labels, uniforms, top, mass, tempered, losses, sampled, hits, lse,
        temperature, rows, vocabulary, tiles, D=launch["D"], BD=launch["BD"],
        BT=power_of_two(tiles), BV=TILE, num_warps=4,
    )  # fmt: skip
    return losses.sum(), sampled, hits.sum(), lse


def _forward_outputs(hidden, *_):
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    rows = hidden.shape[0]
    correct = hidden.new_empty((), dtype=torch.float32)
    return loss, hidden.new_empty(rows, dtype=torch.int32), correct, loss.new_empty(rows)


@operation("flash_cross_entropy_sample_backward")
def backward(
    d_loss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ gradients of hidden [M, D], weight [V, D] and bias [V], in their types."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    launch = _launch(hidden, (64, 32, 4, 3), (64, 64, 8, 1))
    blocks, tiles = -(-rows // launch["BM"]), -(-vocabulary // launch["BV"])
    # two programs of 4 warps share an SM's registers, one of 8 fills them
    parts = _parts(blocks, tiles, SLOTS * 4 // launch["num_warps"], 8)
    sums = lse.new_empty(parts, *hidden.shape)
    inputs = hidden, weight, bias, labels, lse, d_loss
    _d_hidden[(blocks, parts)](
        *inputs, sums, rows, vocabulary, tiles, -(-tiles // parts), **launch
    )  # fmt: skip
    d_weight, d_bias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    launch = _launch(hidden, (32, 64, 4, 3), (32, 64, 8, 2))
    tiles = -(-vocabulary // launch["BV"])
    _d_weight[(tiles,)](*inputs, d_weight, d_bias, rows, vocabulary, **launch)
    return column_sums(sums, hidden.dtype), d_weight, d_bias


@backward.register_fake
def _(d_loss, hidden, weight, bias, *_):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (hidden, weight, bias))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[3])


def _differentiate(ctx, d_loss):
    return *backward(d_loss, *ctx.saved_tensors), None, None, None


forward.register_fake(_forward_outputs)
forward.register_autograd(_differentiate, _save)
