"""Attention within each of the packed sequences, for the CPU; on GPUs FlashAttention does it.

PyTorch's way pads the sequences to rows of one length, holds the [L, L] probabilities of each head
several times over, and draws the dropout mask one number after another. Here a head's keys and
values are copied to the cache once and four rows of scores at a time never leave it: no padding,
nothing of size L² kept, the mask drawn again in backward. Scores are fp32, as FlashAttention's.
"""

import numpy as np
import torch
import torch.nn.functional as F

from . import cpu
from .cpu import (
    INFINITY,
    LOG2_E,
    ONE,
    ZERO,
    add_product,
    exp2,
    largest,
    loop,
    narrow,
    random_bits,
    set_product,
    widen,
)
from .dispatch import operation, use_loops


@loop
def _take(rows, x, which, first, length, head, scale):
    """`length` rows of a head of x[:, which] from `first` on, times scale."""
    for i in range(length):
        for j in range(x.shape[3]):
            rows[i, j] = widen(x[first + i, which, head, j]) * scale


@loop
def _take_columns(columns, x, which, first, length, head):
    """`_take`, transposed."""
    for i in range(length):
        for j in range(x.shape[3]):
            columns[j, i] = widen(x[first + i, which, head, j])


@loop
def _probabilities(scores, rows, length, lse, first, head, seed, bits, threshold):
    """Base-2 scores [rows, length] → probabilities, those to drop negative.

    An infinite lse is computed.
    """
    for i in range(rows):
        row, scale = first + i, ONE
        if lse[row, head] == INFINITY:
            top, total = largest(scores[i], length), ZERO
            for j in range(length):
                scores[i, j] = exp2(scores[i, j] - top)
                total += scores[i, j]
            lse[row, head], scale = top + np.float32(np.log2(total)), ONE / total
        else:
            shift = lse[row, head]
            for j in range(length):
                scores[i, j] = exp2(scores[i, j] - shift)
        if threshold:
            random_bits(seed, (row * lse.shape[1] + head) * (len(bits) // 4), bits)
            for j in range(length):
                scores[i, j] *= scale if bits[j] >= threshold else -scale
        else:
            for j in range(length):
                scores[i, j] *= scale


@loop
def _room(longest, size):
    """A buffer for so many rows and columns of a product."""
    return np.zeros((-(-longest // 32) * 32, -(-size // 32) * 32), np.float32)


@loop
def _forward_loop(part, start, stop, qkv, boundaries, seed, out, lse, width, threshold, scale):
    """Heads start … stop - 1, counted over all sequences; lse [T, heads] comes in as infinity."""
    heads, size, longest = qkv.shape[2], qkv.shape[3], np.max(np.diff(boundaries))
    queries, values = _room(longest, size), _room(longest, size)
    keys, p, total = _room(size, longest), _room(32, longest), _room(32, size)
    bits = np.empty(width, np.uint32)
    for item in range(start, stop):
        first, head = boundaries[item // heads], item % heads
        length = boundaries[item // heads + 1] - first
        _take(queries, qkv, 0, first, length, head, LOG2_E / np.sqrt(np.float32(size)))
        _take_columns(keys, qkv, 1, first, length, head)
        _take(values, qkv, 2, first, length, head, scale)
        for o in range(0, length, 32):
            rows = min(32, length - o)
            set_product(p, queries, o, False, keys, 0, rows, size, length)
            _probabilities(p, rows, length, lse, first + o, head, seed, bits, threshold)
            for i in range(rows):
                for j in range(length):
                    p[i, j] = p[i, j] if p[i, j] > ZERO else ZERO
            set_product(total, p, 0, False, values, 0, rows, length, size)
            for i in range(rows):
                for j in range(size):
                    out[first + o + i, head, j] = narrow(total[i, j], out)


@loop
def _backward_loop(part, start, stop, d_out, qkv, boundaries, seed, lse, d_qkv,
                   width, threshold, scale):  # fmt: skip
    heads, size, longest = qkv.shape[2], qkv.shape[3], np.max(np.diff(boundaries))
    queries, keys, d_outs = _room(longest, size), _room(longest, size), _room(longest, size)
    d_keys, d_values, d_queries = _room(longest, size), _room(longest, size), _room(32, size)
    key_columns, value_columns = _room(size, longest), _room(size, longest)
    p, ds = _room(32, longest), _room(32, longest)
    bits = np.empty(width, np.uint32)
    root = ONE / np.sqrt(np.float32(size))
    for item in range(start, stop):
        first, head = boundaries[item // heads], item % heads
        length = boundaries[item // heads + 1] - first
        _take(queries, qkv, 0, first, length, head, LOG2_E * root)
        _take(keys, qkv, 1, first, length, head, ONE)
        _take(d_outs, d_out, 0, first, length, head, scale)
        _take_columns(key_columns, qkv, 1, first, length, head)
        _take_columns(value_columns, qkv, 2, first, length, head)
        d_keys[:length] = ZERO
        d_values[:length] = ZERO
        for o in range(0, length, 32):
            rows = min(32, length - o)
            set_product(p, queries, o, False, key_columns, 0, rows, size, length)
            _probabilities(p, rows, length, lse, first + o, head, seed, bits, threshold)
            set_product(ds, d_outs, o, False, value_columns, 0, rows, size, length)
            for i in range(rows):
                along = ZERO
                for j in range(length):
                    kept = p[i, j] if p[i, j] > ZERO else ZERO
                    along += kept * ds[i, j]
                for j in range(length):
                    kept = p[i, j] if p[i, j] > ZERO else ZERO
                    ds[i, j] = kept * ds[i, j] - abs(p[i, j]) * along
                    p[i, j] = kept
            set_product(d_queries, ds, 0, False, keys, 0, rows, length, size)
            for i in range(rows):
                for j in range(size):
                    d_qkv[first + o + i, 0, head, j] = narrow(d_queries[i, j] * root, d_qkv)
            add_product(d_values, p, 0, True, d_outs, o, length, rows, size)
            add_product(d_keys, ds, 0, True, queries, o, length, rows, size)
        for i in range(length):
            for j in range(size):
                d_qkv[first + i, 1, head, j] = narrow(d_keys[i, j] / LOG2_E, d_qkv)
                d_qkv[first + i, 2, head, j] = narrow(d_values[i, j], d_qkv)


@operation("packed_attention")
def forward(
    qkv: torch.Tensor, boundaries: torch.Tensor, p: float, seed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ out [T, heads, d]; log2 of each row's sum of 2^scores [T, heads]."""
    out, lse = _forward_outputs(qkv)
    lse.fill_(torch.inf)
    boundaries = boundaries.unique_consecutive()  # threads share the sequences that have rows
    work = qkv, boundaries, cpu.seed(seed), out, lse, *_dropping(boundaries, p)
    cpu.run(_forward_loop, _heads(qkv, boundaries), *work)
    return out, lse


def _forward_outputs(qkv, *_):
    rows, _, heads, size = qkv.shape
    return qkv.new_empty(rows, heads, size), qkv.new_empty(rows, heads, dtype=torch.float32)


def _heads(qkv, boundaries):
    return (len(boundaries) - 1) * qkv.shape[2]


def _dropping(boundaries, p):
    longest = int(boundaries.diff().max()) if len(boundaries) > 1 else 0
    return cpu.dropping(-(-longest // 4) * 4, p)


@operation("packed_attention_backward")
def backward(
    d_out: torch.Tensor,
    qkv: torch.Tensor,
    boundaries: torch.Tensor,
    seed: torch.Tensor,
    lse: torch.Tensor,
    p: float,
) -> torch.Tensor:
    """→ gradient of qkv [T, 3, heads, d]."""
    d_qkv = qkv.new_empty(qkv.shape)
    boundaries = boundaries.unique_consecutive()
    work = d_out.unsqueeze(1), qkv, boundaries, cpu.seed(seed), lse, d_qkv
    cpu.run(_backward_loop, _heads(qkv, boundaries), *work, *_dropping(boundaries, p))
    return d_qkv


def _save(ctx, inputs, output):
    qkv, boundaries, ctx.p, seed = inputs
    ctx.save_for_backward(qkv, boundaries, seed, output[1])


forward.register_fake(_forward_outputs)
backward.register_fake(lambda d_out, qkv, *_: qkv.new_empty(qkv.shape))
forward.register_autograd(
    lambda ctx, d_out: (backward(d_out, *ctx.saved_tensors, ctx.p), None, None, None),
    _save,
)


def packed_attention(
    qkv: torch.Tensor, boundaries: torch.Tensor, p: float, seed: torch.Tensor
) -> torch.Tensor:
    """softmax(q kᵀ / √d) v within each sequence: qkv [T, 3, heads, d] → [T, heads, d].

    boundaries [N + 1] int32: from 0 to T, ascending; a sequence may be empty. p: dropped share of
    the probabilities, 0 = none. seed [1] int64: of the mask. CPU tensors only.
    """
    if use_loops(qkv):
        return forward(qkv, boundaries, p, seed)[0]
    return packed_attention_reference(qkv, boundaries, p, seed)


def packed_attention_reference(qkv, boundaries, p, seed):
    """`packed_attention` in plain PyTorch; the mask comes from torch's generator."""
    lengths = boundaries.diff().tolist()
    parts = [part.permute(1, 2, 0, 3) for part in qkv.split(lengths) if len(part)]
    out = [F.scaled_dot_product_attention(*part, dropout_p=p).transpose(0, 1) for part in parts]
    return torch.cat(out) if out else qkv[:, 0]
