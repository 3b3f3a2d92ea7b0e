"""Attention within each of the packed sequences: `flash_attention` on GPUs, loops here on a CPU.

PyTorch's way on a CPU pads the sequences to rows of one length, holds the [L, L] probabilities of
each head several times over, and draws the dropout mask one number after another. Here a head's
keys and values are copied to the cache once and some rows of scores at a time never leave it: no
padding, nothing of size L² kept, the mask drawn again in backward. Scores are fp32, as
FlashAttention's.
"""

import numpy as np
import torch
import torch.nn.functional as F

from . import cpu, flash_attention
from .cpu import fetch, loop
from .cpu_matmul import add_product, set_product
from .cpu_numbers import LOG2_E, ONE, ZERO, exp2, largest, narrow
from .cpu_operands import (
    as_down,
    clear,
    end_along,
    entries,
    operand,
    take_along,
    take_down,
    take_transposed,
)
from .dispatch import fused, operation, use_triton
from .dropout_mask import dropping, factor_of, make_keys, mixed, step
from .split_qkv import split_qkv_reference

ROWS = 64  # of scores at a time


@loop
def _columns(length):
    """Of each key: what it adds to a counter, and its factor in a near and in a far row."""
    steps, factors = np.empty(length, np.uint32), np.empty((2, length), np.uint32)
    for j in range(length):
        steps[j] = step(j & -9)
        factors[0, j], factors[1, j] = factor_of(0, j & 8), factor_of(1, j & 8)
    return steps, factors


@loop
def _draw(numbers, rows, length, first, place, mask, columns, stride):
    """Fill numbers [rows, length] with those that flash_attention._kept compares to a threshold.

    first: of the sequence; place: of the first query in it, a multiple of 16.
    """
    steps, factors = columns
    for i in range(rows):
        if not i & 8:
            counter = mask[0] + step((first + place + i) * stride)
            near, far = numbers[i], numbers[i + 8]
            for j in range(length):
                x = mixed(counter + steps[j], mask[1], mask[2])
                near[j], far[j] = np.uint32(x * factors[0, j]), np.uint32(x * factors[1, j])


@loop
def _weigh(scores, rows, length, factor, numbers, threshold, weights, tops, totals):
    """Fill weights [rows, length] with 2^(score · factor - top), but 0 where dropped.

    tops and totals [rows] become top, the largest of a row, and the sum with those dropped.
    """
    for i in range(rows):
        top, total = largest(scores[i], length) * factor, ZERO
        if threshold:
            for j in range(length):
                weight = exp2(scores[i, j] * factor - top)
                weights[i, j] = narrow(weight if numbers[i, j] >= threshold else ZERO, weights)
                total += weight
        else:
            for j in range(length):
                weight = exp2(scores[i, j] * factor - top)
                weights[i, j] = narrow(weight, weights)
                total += weight
        tops[i], totals[i] = top, total


@loop
def _differentiate(
    scores, products, rows, length, factor, lse, scale, numbers, threshold, weights, ds
):
    """From products of d_out and values, [rows, length]: weights without their scale, d_scores."""
    for i in range(rows):
        shift, delta = lse[i], ZERO
        if threshold:
            for j in range(length):
                p, kept = exp2(scores[i, j] * factor - shift), numbers[i, j] >= threshold
                dp = products[i, j] * scale if kept else ZERO
                scores[i, j], products[i, j] = p, dp
                weights[i, j] = narrow(p if kept else ZERO, weights)
                delta += p * dp
        else:
            for j in range(length):
                p = exp2(scores[i, j] * factor - shift)
                scores[i, j] = p
                weights[i, j] = narrow(p, weights)
                delta += p * products[i, j]
        for j in range(length):
            ds[i, j] = narrow(scores[i, j] * (products[i, j] - delta), ds)


@loop
def _write(out, x, rows, columns, first, column, scale):
    """x[:rows, :columns] · scale into out, from a row and a column on."""
    for i in range(rows):
        row = out[first + i, column : column + columns]
        for j in range(columns):
            row[j] = narrow(x[i, j] * scale, out)


@loop
def _add_rows(x, rows, columns, column, scale, sums):
    """Add the sums of x[:rows, :columns] · scale to sums [3 heads d] from a column on."""
    total = np.zeros(columns, np.float32)
    fours = rows // 4 * 4  # each addition to a total waits for the one before
    for i in range(0, fours, 4):
        for j in range(columns):
            total[j] += (x[i, j] + x[i + 1, j]) + (x[i + 2, j] + x[i + 3, j])
    for i in range(fours, rows):
        for j in range(columns):
            total[j] += x[i, j]
    for j in range(columns):
        sums[column + j] += total[j] * scale


@loop
def _longest(boundaries):
    """Length of the longest sequence."""
    longest = 0
    for i in range(1, len(boundaries)):
        longest = max(longest, boundaries[i] - boundaries[i - 1])
    return longest


@loop
def _place(item, boundaries, heads):
    """Of an item: the first row and the length of its sequence, and its head."""
    first = boundaries[item // heads]
    return first, boundaries[item // heads + 1] - first, item % heads


@loop
def _fetch(x, item, stop, boundaries, heads, size):
    """Have what an item needs of x [T, heads d or 3 heads d] brought to the cache."""
    if item < stop:
        first, length, head = _place(item, boundaries, heads)
        for column in range(head * size, x.shape[1], heads * size):
            fetch(x, length, size, first, column)


@loop
def _forward_loop(part, start, stop, qkv, boundaries, seed, out, lse, stride, threshold, scale):
    """Heads start … stop - 1, counted over all sequences: qkv [T, 3 heads d] → out [T, heads d].

    lse [heads, T] is filled.
    """
    heads, longest = lse.shape[0], _longest(boundaries)
    width = out.shape[1]
    size = width // heads
    queries, keys = operand(qkv, longest, size), operand(qkv, size, longest)
    values, weights = operand(qkv, longest, size), operand(qkv, ROWS, longest)
    scores, sums = operand(lse, ROWS, longest), operand(lse, ROWS, size)
    columns, numbers = _columns(longest), np.empty((ROWS, longest), np.uint32)
    tops, totals = np.empty((2, ROWS), np.float32)
    factor = LOG2_E / np.sqrt(np.float32(size))
    for item in range(start, stop):
        first, length, head = _place(item, boundaries, heads)
        column = head * size
        mask = make_keys(seed, head)
        take_along(queries, qkv, length, size, first, column)
        take_transposed(keys, qkv, length, size, first, width + column)
        take_down(values, qkv, length, size, first, 2 * width + column)
        _fetch(qkv, item + 1, stop, boundaries, heads, size)
        for o in range(0, length, ROWS):
            rows = min(ROWS, length - o)
            set_product(scores, queries, o, False, keys, 0, rows, size, length)
            if threshold:
                _draw(numbers, rows, length, first, o, mask, columns, stride)
            _weigh(scores, rows, length, factor, numbers, threshold, entries(weights), tops, totals)
            end_along(weights, rows, length)
            set_product(sums, weights, 0, False, values, 0, rows, length, size)
            for i in range(rows):
                lse[head, first + o + i] = tops[i] + np.float32(np.log2(totals[i]))
                for j in range(size):
                    sums[i, j] *= scale / totals[i]
            _write(out, sums, rows, size, first + o, column, ONE)


@loop
def _backward_loop(part, start, stop, d_out, qkv, boundaries, seed, lse, d_qkv, sums,
                   stride, threshold, scale):  # fmt: skip
    heads, longest = lse.shape[0], _longest(boundaries)
    width = d_out.shape[1]
    size = width // heads
    queries, queries_down = operand(qkv, longest, size), operand(qkv, longest, size)
    keys, keys_down = operand(qkv, size, longest), operand(qkv, longest, size)
    d_outs, d_outs_down = operand(qkv, longest, size), operand(qkv, longest, size)
    values, turned = operand(qkv, size, longest), operand(qkv, ROWS, longest)
    weights, ds = operand(qkv, ROWS, longest), operand(qkv, ROWS, longest)
    scores, products = operand(lse, ROWS, longest), operand(lse, ROWS, longest)
    d_queries = operand(lse, ROWS, size)
    d_keys, d_values = operand(lse, longest, size), operand(lse, longest, size)
    columns, numbers = _columns(longest), np.empty((ROWS, longest), np.uint32)
    root = ONE / np.sqrt(np.float32(size))
    for item in range(start, stop):
        first, length, head = _place(item, boundaries, heads)
        column = head * size
        mask = make_keys(seed, head)
        take_along(queries, qkv, length, size, first, column)
        take_down(queries_down, qkv, length, size, first, column)
        take_transposed(keys, qkv, length, size, first, width + column)
        take_down(keys_down, qkv, length, size, first, width + column)
        take_transposed(values, qkv, length, size, first, 2 * width + column)
        take_along(d_outs, d_out, length, size, first, column)
        take_down(d_outs_down, d_out, length, size, first, column)
        _fetch(qkv, item + 1, stop, boundaries, heads, size)
        _fetch(d_out, item + 1, stop, boundaries, heads, size)
        for i in range(length):
            clear(d_keys[i], 0, size)
            clear(d_values[i], 0, size)
        for o in range(0, length, ROWS):
            rows = min(ROWS, length - o)
            set_product(scores, queries, o, False, keys, 0, rows, size, length)
            set_product(products, d_outs, o, False, values, 0, rows, size, length)
            if threshold:
                _draw(numbers, rows, length, first, o, mask, columns, stride)
            _differentiate(
                scores, products, rows, length, root * LOG2_E, lse[head, first + o :],
                scale, numbers, threshold, entries(weights), entries(ds),
            )  # fmt: skip
            end_along(ds, rows, length)
            set_product(d_queries, ds, 0, False, keys_down, 0, rows, length, size)
            _write(d_qkv, d_queries, rows, size, first + o, column, root)
            _add_rows(d_queries, rows, size, column, root, sums[part])
            left = as_down(turned, ds, rows, length)
            add_product(d_keys, left, 0, True, queries_down, o, length, rows, size)
            left = as_down(turned, weights, rows, length)
            add_product(d_values, left, 0, True, d_outs_down, o, length, rows, size)
        for x, factor in ((d_keys, root), (d_values, scale)):
            column += width
            _write(d_qkv, x, length, size, first, column, factor)
            _add_rows(x, length, size, column, factor, sums[part])


@operation("packed_attention")
def forward(
    qkv: torch.Tensor,
    bias: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    p: float,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ out [T, heads, d]; log2 of each row's sum of 2^scores [heads, T]."""
    out, lse = _forward_outputs(qkv)
    if use_triton(qkv):
        flash_attention.forward(qkv, boundaries, longest, p, seed, out, lse)
        return out, lse
    if len(boundaries) > 1 and boundaries.diff().max() > longest:
        raise ValueError(f"a sequence is longer than {longest}")
    boundaries = boundaries.unique_consecutive()  # threads share the sequences that have rows
    work = (
        qkv.flatten(1),
        boundaries,
        cpu.seed(seed),
        out.flatten(1),
        lse,
        flash_attention.stride(longest),
        *dropping(p),
    )
    cpu.run(_forward_loop, _heads(qkv, boundaries), *work)
    return out, lse


def _forward_outputs(qkv, *_):
    rows, _, heads, size = qkv.shape
    lse = qkv.new_empty(heads, rows, dtype=torch.promote_types(qkv.dtype, torch.float32))
    return qkv.new_empty(rows, heads, size), lse


def _heads(qkv, boundaries):
    return (len(boundaries) - 1) * qkv.shape[2]


@operation("packed_attention_backward")
def backward(
    d_out: torch.Tensor,
    qkv: torch.Tensor,
    boundaries: torch.Tensor,
    seed: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    longest: int,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ gradients of qkv [T, 3, heads, d] and bias [3 heads d]."""
    if use_triton(qkv):
        return flash_attention.backward(d_out, qkv, boundaries, longest, p, seed, out, lse)
    d_qkv = qkv.new_empty(qkv.shape)
    sums = torch.zeros(cpu.parts(), qkv.shape[1:].numel(), dtype=torch.float64)
    boundaries = boundaries.unique_consecutive()
    work = (
        d_out.flatten(1),
        qkv.flatten(1),
        boundaries,
        cpu.seed(seed),
        lse,
        d_qkv.flatten(1),
        sums,
        flash_attention.stride(longest),
        *dropping(p),
    )
    cpu.run(_backward_loop, _heads(qkv, boundaries), *work)
    return d_qkv, sums.sum(0).to(qkv.dtype)


def _save(ctx, inputs, output):
    qkv, _, boundaries, ctx.longest, ctx.p, seed = inputs
    ctx.save_for_backward(qkv, boundaries, seed, *output)


forward.register_fake(_forward_outputs)
backward.register_fake(
    lambda d_out, qkv, *_: (qkv.new_empty(qkv.shape), qkv.new_empty(qkv.shape[1:].numel()))
)
forward.register_autograd(
    lambda ctx, d_out: (
        *backward(d_out, *ctx.saved_tensors, ctx.longest, ctx.p),
        *(None,) * 4,
    ),
    _save,
)


def packed_attention(
    qkv: torch.Tensor,
    bias: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    p: float,
    seed: torch.Tensor,
) -> torch.Tensor:
    """softmax(q kᵀ / √d) v within each sequence: qkv [T, 3, heads, d] → [T, heads, d].

    bias [3·heads·d] has been added to qkv, by a product that was given a detached one: it gets its
    gradient here. boundaries [N + 1] int32: from 0 to T, ascending; a sequence may be empty, and
    none has more than `longest` rows: on a GPU, which does not check it, what is beyond stays
    unwritten. p: dropped share of the probabilities, 0 = none. seed [1] int64: of the mask. On a
    GPU d > 64 costs registers that are not there.
    """
    arguments = qkv, bias, boundaries, longest, p, seed
    return forward(*arguments)[0] if fused(qkv) else packed_attention_reference(*arguments)


def packed_attention_reference(qkv, bias, boundaries, longest, p, seed):
    """`packed_attention` in plain PyTorch; the mask comes from torch's generator."""
    lengths = boundaries.diff().tolist()
    qkv = torch.stack(split_qkv_reference(qkv, bias), 1)
    parts = [part.permute(1, 2, 0, 3) for part in qkv.split(lengths) if len(part)]
    out = [F.scaled_dot_product_attention(*part, dropout_p=p).transpose(0, 1) for part in parts]
    return torch.cat(out) if out else qkv[:, 0]
