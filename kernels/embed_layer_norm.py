"""dropout(LayerNorm(word + segment + position rows)), the embedding of packed tokens.

Forward reads the three rows of each token and writes y; backward reads them again with dy and
writes the gradient of their sum. Separate operations move three times as much. The table gradients
are sums of its rows in fp32: a segment's on the way, the others as `embedding_gradient` says.
PyTorch's on a CPU adds rows of bf16 in bf16: of thousands, the last ones are lost (torch 2.13.0).
"""

import numpy as np
import torch
import torch.nn.functional as F

from . import cpu
from .cpu import loop
from .cpu_layer_norm import ROWS, centre, project
from .cpu_numbers import ZERO, drop, flush, narrow, widen, widened
from .dispatch import fused, operation, use_triton
from .dropout_mask import dropout, dropping, keys, make_keys, row_numbers, threshold
from .embedding_gradient import embedding_gradient
from .language import (
    PROGRAMS,
    column_sums,
    jit,
    layer_norm,
    layer_norm_gradient,
    row_blocks,
    tl,
    upcast,
)


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


@loop
def _add_rows(first, rows, tokens, segments, positions, word, segment, position, z, means):
    """Sums of the three table rows of tokens from `first` on → z [rows, E], means [rows]."""
    size = z.shape[1]
    for i in range(rows):
        row, total = first + i, ZERO
        token, kind, place = tokens[row], segments[row], positions[row]
        for j in range(size):
            z[i, j] = widen(word[token, j]) + widen(segment[kind, j]) + widen(position[place, j])
            total += z[i, j]
        means[i] = total / np.float32(size)


@loop
def _forward_loop(part, start, stop, tokens, segments, positions, word, segment, position, weight,
                  bias, seed, y, mean, rstd, width, threshold, scale, eps):  # fmt: skip
    size, mask = y.shape[1], make_keys(seed, 0)
    weight, bias = widened(weight), widened(bias)
    z, bits = np.empty((ROWS, size), np.float32), np.empty(width, np.uint32)
    tables = word, segment, position
    for first in range(start, stop, ROWS):
        rows = min(ROWS, stop - first)
        means, deviations = mean[first : first + rows], rstd[first : first + rows]
        _add_rows(first, rows, tokens, segments, positions, *tables, z, means)
        centre(z, rows, means, deviations, eps)
        for i in range(rows):
            row, deviation = first + i, deviations[i]
            for j in range(size):
                z[i, j] = z[i, j] * deviation * weight[j] + bias[j]
            if threshold:
                row_numbers(row, mask, bits)
                for j in range(size):
                    z[i, j] = drop(z[i, j], bits[j], threshold, scale)
            for j in range(size):
                y[row, j] = narrow(z[i, j], y)


@loop
def _backward_loop(part, start, stop, dy, tokens, segments, positions, word, segment, position,
                   weight, seed, mean, rstd, dz, sums, width, threshold, scale):  # fmt: skip
    size, mask, weight = dz.shape[1], make_keys(seed, 0), widened(weight)
    z, bits = np.empty((ROWS, size), np.float32), np.empty(width, np.uint32)
    slopes, (means, totals, alongs) = np.empty_like(z), np.empty((3, ROWS), np.float32)
    d_weight, d_bias, d_first, d_second = np.zeros((4, size), np.float32)
    tables = word, segment, position
    for first in range(start, stop, ROWS):
        rows = min(ROWS, stop - first)
        _add_rows(first, rows, tokens, segments, positions, *tables, z, means)
        for i in range(rows):
            row = first + i
            for j in range(size):
                slopes[i, j] = widen(dy[row, j])
            if threshold:
                row_numbers(row, mask, bits)
                for j in range(size):
                    slopes[i, j] = drop(slopes[i, j], bits[j], threshold, scale)
        project(z, slopes, rows, mean[first:], rstd[first:], weight, totals, alongs)
        for i in range(rows):
            for j in range(size):
                d_weight[j] += slopes[i, j] * z[i, j]
                d_bias[j] += slopes[i, j]
        for i in range(rows):
            row, total, along, deviation = first + i, totals[i], alongs[i], rstd[first + i]
            d_segment = d_second if segments[row] == 1 else d_first
            for j in range(size):
                slope = (slopes[i, j] * weight[j] - total - z[i, j] * along) * deviation
                dz[row, j] = slope
                d_segment[j] += slope
        if first // ROWS % 8 == 7 or first + rows == stop:
            flush(d_weight, sums[part, 0])
            flush(d_bias, sums[part, 1])
            flush(d_first, sums[part, 2])
            flush(d_second, sums[part, 3])


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
    if not use_triton(word):
        _check(tokens, segments, positions, word, segment, position, weight, bias)
        inputs = tokens, segments, positions, word, segment, position, weight, bias, cpu.seed(seed)
        others = constants["BH"], *dropping(p), np.float32(eps)
        cpu.run(_forward_loop, len(tokens), *inputs, *outputs, *others)
        return outputs
    _forward[(-(-tokens.shape[0] // constants["R"]),)](
        tokens, segments, positions, word, segment, position, weight, bias, seed, *outputs,
        tokens.shape[0], THRESHOLD=threshold(p), EPS=eps, **constants, num_warps=warps,
    )  # fmt: skip
    return outputs


def _check(tokens, segments, positions, *tables_and_vectors):
    """Raise what PyTorch would of what loops would not notice."""
    word = tables_and_vectors[0]
    if not len(tokens) == len(segments) == len(positions):
        raise ValueError("tokens, segments and positions are not of one length")
    if any(values.shape[-1] != word.shape[1] for values in tables_and_vectors):
        raise ValueError("the tables and LayerNorm's weight and bias are not of one width")
    for indices, table in zip((tokens, segments, positions), tables_and_vectors, strict=False):
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(table):
            raise IndexError(f"an index is not one of the {len(table)} rows of its table")


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
    inputs = tokens, segments, positions, word, segment, position, weight
    constants, warps = row_blocks(word.shape[1])
    dtype = torch.promote_types(segment.dtype, weight.dtype)
    if use_triton(word):
        dz = torch.empty_like(dy)
        programs = min(PROGRAMS, -(-dy.shape[0] // constants["R"]))
        sums = mean.new_empty(programs, 4, word.shape[1])
        _backward[(programs,)](
            dy, *inputs, seed, mean, rstd, dz, sums, dy.shape[0], THRESHOLD=threshold(p),
            **constants, num_warps=warps,
        )  # fmt: skip
        sums = column_sums(sums, dtype)
    else:
        dz = torch.empty_like(dy, dtype=torch.float32)
        sums = torch.zeros(cpu.parts(), 4, word.shape[1], dtype=torch.float64)
        others = constants["BH"], *dropping(p)
        outputs = dz, sums
        cpu.run(_backward_loop, len(dy), dy, *inputs, cpu.seed(seed), mean, rstd, *outputs, *others)
        sums = sums.sum(0).to(dtype)
    indices = torch.cat([tokens, positions + len(word)])  # as of one table: one sort, not two
    return embedding_gradient(dz, indices, len(word) + len(position), word.dtype), sums


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
    if fused(word):
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
