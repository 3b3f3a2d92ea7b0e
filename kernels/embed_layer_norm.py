"""dropout(LayerNorm(word + segment + position rows)), the embedding of packed tokens.

Forward reads the three rows of each token and writes y; backward reads them again with dy and
writes the gradient of their sum. Separate operations move three times as much. The table gradients
are then sums of its rows in fp32: of each segment in registers, of each word and position in the
order that a stable sort of all their indices gives. The same bits every time, where scattered
additions race. A program takes 64 sorted places, whatever their indices, and sums runs of equal
ones by a product with zeros and ones: [MASK] alone has a run of thousands of rows, some 45 µs (an
estimate) for one program to walk through in a micro-batch of 16 384 tokens.
"""

import torch
import torch.nn.functional as F

from .dispatch import operation, use_triton
from .dropout_mask import dropout, keys, threshold
from .language import (
    PROGRAMS,
    column_sums,
    jit,
    layer_norm,
    layer_norm_gradient,
    power_of_two,
    row_blocks,
    tl,
    upcast,
)

RUN = 64  # sorted places of a program that sums runs


@jit
def _embed(
    tokens_ptr, segments_ptr, positions_ptr, word_ptr, segment_ptr, position_ptr, row, rows,
    H: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Sum of the three table rows of tokens row [R]; where the result lies; what of it exists."""
    column = tl.arange(0, BH)
    inside = (row < rows)[:, None] & (column < H)[None, :]
    token = tl.load(tokens_ptr + row, row < rows, 0).to(tl.int64)[:, None] * H
    segment = tl.load(segments_ptr + row, row < rows, 0)[:, None] * H
    position = tl.load(positions_ptr + row, row < rows, 0)[:, None] * H
    z = upcast(tl.load(word_ptr + token + column[None, :], inside, 0.0))
    z += upcast(tl.load(segment_ptr + segment + column[None, :], inside, 0.0))
    z += upcast(tl.load(position_ptr + position + column[None, :], inside, 0.0))
    return z, row.to(tl.int64)[:, None] * H + column[None, :], inside


@jit
def _forward(
    tokens_ptr, segments_ptr, positions_ptr, word_ptr, segment_ptr, position_ptr,
    weight_ptr, bias_ptr, seed_ptr, y_ptr, mean_ptr, rstd_ptr,
    rows, H: tl.constexpr, BH: tl.constexpr, R: tl.constexpr, THRESHOLD: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    z, at, inside = _embed(
        tokens_ptr, segments_ptr, positions_ptr, word_ptr, segment_ptr, position_ptr, row, rows,
        H, BH,
    )  # fmt: skip
    y = layer_norm(z, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, row, rows, H, BH, EPS)
    y = dropout(y, keys(seed_ptr, 0), row, BH, THRESHOLD)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@jit
def _backward(
    dy_ptr, tokens_ptr, segments_ptr, positions_ptr, word_ptr, segment_ptr, position_ptr,
    weight_ptr, seed_ptr, mean_ptr, rstd_ptr, dz_ptr, sums_ptr,
    rows, H: tl.constexpr, BH: tl.constexpr, R: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BH)
    weight = upcast(tl.load(weight_ptr + column, column < H, 0.0))
    d_weight = tl.zeros([R, BH], mean_ptr.dtype.element_ty)
    d_bias = tl.zeros([R, BH], mean_ptr.dtype.element_ty)
    d_first = tl.zeros([R, BH], mean_ptr.dtype.element_ty)
    d_second = tl.zeros([R, BH], mean_ptr.dtype.element_ty)
    mask = keys(seed_ptr, 0)
    for start in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = start + tl.arange(0, R)
        z, at, inside = _embed(
            tokens_ptr, segments_ptr, positions_ptr, word_ptr, segment_ptr, position_ptr, row,
            rows, H, BH,
        )  # fmt: skip
        dy = upcast(tl.load(dy_ptr + at, inside, 0.0))
        dy = dropout(dy, mask, row, BH, THRESHOLD)
        dz, normed = layer_norm_gradient(dy, z, weight, mean_ptr, rstd_ptr, row, rows, H)
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), inside)
        second = tl.load(segments_ptr + row, row < rows, 0)[:, None] == 1
        d_weight += dy * normed
        d_bias += dy
        d_first += tl.where(second, 0.0, dz)
        d_second += tl.where(second, dz, 0.0)
    sums_ptr += tl.program_id(0) * 4 * H + column
    tl.store(sums_ptr, tl.sum(d_weight, 0), column < H)
    tl.store(sums_ptr + H, tl.sum(d_bias, 0), column < H)
    tl.store(sums_ptr + 2 * H, tl.sum(d_first, 0), column < H)
    tl.store(sums_ptr + 3 * H, tl.sum(d_second, 0), column < H)


@jit
def _run_sums(
    dz_ptr, sorted_ptr, order_ptr, d_table_ptr, pieces_ptr, rows, tokens,
    H: tl.constexpr, BC: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Sums of each run of one index among N sorted places: gradients, or pieces of longer runs.

    dz has `tokens` rows, once or twice over. A piece goes to row 0 of the program's own two if its
    run began before, else to row 1.
    """
    place = tl.program_id(0) * N + tl.arange(0, N)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    index = tl.load(sorted_ptr + place, place < rows, -1)
    row = tl.load(order_ptr + place, place < rows, 0)
    row = tl.where(row < tokens, row, row - tokens)
    inside = (place < rows)[:, None] & (column < H)[None, :]
    dz = tl.load(dz_ptr + row[:, None] * H + column[None, :], inside, 0.0)
    same = tl.where(index[:, None] == index[None, :], 1.0, 0.0).to(dz.dtype)
    ACC: tl.constexpr = pieces_ptr.dtype.element_ty
    sums = tl.dot(same, dz, input_precision="ieee", out_dtype=ACC)

    before = tl.load(sorted_ptr + place - 1, (place > 0) & (place < rows), -1)
    first = tl.program_id(0) * N
    begun = tl.load(sorted_ptr + first - 1, first > 0, -1) == index
    goes_on = tl.load(sorted_ptr + first + N, first + N < rows, -1) == index
    whole = (index != before) & ~goes_on
    at = index.to(tl.int64)[:, None] * H + column[None, :]
    tl.store(d_table_ptr + at, sums.to(d_table_ptr.dtype.element_ty), inside & whole[:, None])
    piece = ((place == first) & begun) | ((index != before) & goes_on)
    at = (2 * tl.program_id(0) + tl.where(begun, 0, 1))[:, None] * H + column[None, :]
    tl.store(pieces_ptr + at, sums, inside & piece[:, None])


@jit
def _join_pieces(
    pieces_ptr, sorted_ptr, d_table_ptr, rows, H: tl.constexpr, BC: tl.constexpr, N: tl.constexpr
):
    """Gradient of the index whose run begins in a program of `_run_sums` and leaves it, if any."""
    block = tl.program_id(0)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    index = tl.load(sorted_ptr + (block + 1) * N)
    begun = tl.load(sorted_ptr + block * N - 1, block > 0, -1) == index
    if (tl.load(sorted_ptr + (block + 1) * N - 1) == index) & (not begun):
        total = tl.load(pieces_ptr + (2 * block + 1) * H + column, column < H, 0.0)
        block += 1
        while tl.load(sorted_ptr + block * N, block * N < rows, -1) == index:
            more = block + tl.arange(0, 32)
            mine = tl.load(sorted_ptr + more * N, more * N < rows, -1) == index
            at = 2 * more[:, None] * H + column[None, :]
            total += tl.sum(tl.load(pieces_ptr + at, mine[:, None] & (column < H)[None, :], 0.0), 0)
            block += 32
        at = index.to(tl.int64) * H + column
        tl.store(d_table_ptr + at, total.to(d_table_ptr.dtype.element_ty), column < H)


@operation("embed_layer_norm")
def forward(
    tokens: torch.Tensor,
    segments: torch.Tensor,
    positions: torch.Tensor,
    word: torch.Tensor,
    segment: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ y [T, E], mean [T], 1/deviation [T]."""
    outputs = _forward_outputs(tokens, segments, positions, word)
    constants, warps = row_blocks(word.shape[1])
    _forward[(-(-tokens.shape[0] // constants["R"]),)](
        tokens, segments, positions, word, segment, position, weight, bias, seed, *outputs,
        tokens.shape[0], THRESHOLD=threshold(p), EPS=eps, **constants, num_warps=warps,
    )  # fmt: skip
    return outputs


def _forward_outputs(tokens, segments, positions, word, *_):
    rows = tokens.shape[0]
    mean = word.new_empty(rows, dtype=torch.promote_types(word.dtype, torch.float32))
    return word.new_empty(rows, word.shape[1]), mean, torch.empty_like(mean)


@operation("embed_layer_norm_backward")
def backward(
    dy: torch.Tensor,
    tokens: torch.Tensor,
    segments: torch.Tensor,
    positions: torch.Tensor,
    word: torch.Tensor,
    segment: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor,
    seed: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ gradients of word and position as one [V + P, E]; of weight, bias and segment as [4, E]."""
    dz = torch.empty_like(dy)
    constants, warps = row_blocks(word.shape[1])
    programs = min(PROGRAMS, -(-dy.shape[0] // constants["R"]))
    sums = mean.new_empty(programs, 4, word.shape[1])
    _backward[(programs,)](
        dy, tokens, segments, positions, word, segment, position, weight, seed, mean, rstd, dz,
        sums, dy.shape[0], THRESHOLD=threshold(p), **constants, num_warps=warps,
    )  # fmt: skip
    indices = torch.cat([tokens, positions + len(word)])  # as of one table: one sort, not two
    d_tables = _sum_rows(dz, indices, len(word) + len(position))
    return d_tables, column_sums(sums, torch.promote_types(segment.dtype, weight.dtype))


def _sum_rows(dz, indices, size):
    """Gradient of a table [size, E] of which rows were taken at indices [T], or [2 T] of two each,
    T places from each other, for dz [T, E]."""
    d_table = dz.new_zeros(size, dz.shape[1])
    narrow = indices.short() if size <= 2**15 else indices  # sorted in half the passes
    ordered, order = torch.sort(narrow, stable=True)
    rows, width = len(indices), dz.shape[1]
    columns = min(128 // dz.element_size(), max(16, power_of_two(width)))  # 128 bytes: a line
    constants = {"H": width, "BC": columns, "N": RUN}
    blocks, parts = -(-rows // RUN), -(-width // columns)
    statistics = torch.promote_types(dz.dtype, torch.float32)
    pieces = dz.new_empty(blocks, 2, width, dtype=statistics)
    _run_sums[(blocks, parts)](dz, ordered, order, d_table, pieces, rows, len(dz), **constants)
    if blocks > 1:
        _join_pieces[(blocks - 1, parts)](pieces, ordered, d_table, rows, **constants)
    return d_table


@backward.register_fake
def _(dy, tokens, segments, positions, word, segment, position, weight, *_):
    dtype = torch.promote_types(segment.dtype, weight.dtype)
    sums = word.new_empty(4, word.shape[1], dtype=dtype)
    return word.new_empty(len(word) + len(position), word.shape[1]), sums


def _save(ctx, inputs, output):
    *saved, _, ctx.p, seed, _ = inputs
    ctx.sizes = [len(saved[3]), len(saved[5])]
    ctx.save_for_backward(*saved, seed, *output[1:])


def _differentiate(ctx, dy):
    d_tables, sums = backward(dy, *ctx.saved_tensors, ctx.p)
    d_word, d_position = d_tables.split(ctx.sizes)
    return None, None, None, d_word, sums[2:], d_position, sums[0], sums[1], None, None, None


forward.register_fake(_forward_outputs)
forward.register_autograd(_differentiate, _save)


def embed_layer_norm(
    tokens: torch.Tensor,
    segments: torch.Tensor,
    positions: torch.Tensor,
    word: torch.Tensor,
    segment: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    eps: float = 1e-12,
) -> torch.Tensor:
    """Rows of three tables, added, LayerNorm, dropout → [T, E].

    tokens, segments, positions [T] int32: rows of word [V, E], segment [2, E], position [P, E].
    weight, bias [E]: of the LayerNorm. p: dropped share, 0 = none. seed [1] int64: of the mask.
    """
    tables = word, segment, position, weight, bias
    arguments = tokens, segments, positions, *tables, p, seed, eps
    if use_triton(word):
        return forward(*arguments)[0]
    return embed_layer_norm_reference(*arguments)


def embed_layer_norm_reference(
    tokens, segments, positions, word, segment, position, weight, bias, p, seed, eps=1e-12
):
    """`embed_layer_norm` in plain PyTorch; the mask comes from torch's generator."""
    rows = F.embedding(tokens, word) + F.embedding(segments, segment)
    rows = rows + F.embedding(positions, position)
    rows = F.layer_norm(rows, weight.shape, weight, bias, eps)
    return F.dropout(rows, p) if p else rows
