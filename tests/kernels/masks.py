"""The dropout masks in numpy, and attention as PyTorch writes it under such a mask."""

import numpy as np
import torch

U32 = np.uint32
FACTORS = np.array([0xC2B2AE35, 0x27D4EB2F, 0x165667B1, 0xD3A2646D], U32)


def spread(x):
    """How a key is made of what it is for."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 0x9E3779B1)):
        x = (x ^ x >> shift) * factor % 2**32
    return x


def numbers(place, which, seed, stream):
    """The 32-bit number of each element: of its counter's place, as one of four."""
    start = spread((seed + stream * 0x9E3779B1) % 2**32)
    first_key = spread(start ^ seed >> 32)
    second_key = spread((first_key + 0x9E3779B1) % 2**32)
    x = np.asarray(place, np.int64).astype(U32) * U32(0x9E3779B1) + U32(start)
    x = (x ^ (x >> U32(16)) ^ U32(first_key)) * U32(0x85EBCA6B)
    return (x ^ (x >> U32(15)) ^ U32(second_key)) * FACTORS[which]


def scaled(numbers, p):
    """What dropout of a share p multiplies by."""
    threshold = int(p * 2**32)
    return torch.from_numpy((numbers >= threshold) / (1 - threshold / 2**32))


def mask(rows, width, block, p, seed):
    """What dropout multiplies by [rows, width], where a row takes `block` numbers."""
    column = np.arange(width)
    place = np.arange(rows)[:, None] * block + (column & ~3)
    return scaled(numbers(place, column & 3, seed, 0), p)


def attention_numbers(first, length, stride, seed, head):
    """The number of each query and key [length, length] of a sequence that begins there."""
    query, key = np.arange(length)[:, None], np.arange(length)
    place = (first + (query & ~8)) * stride + (key & ~8)
    return numbers(place, query >> 2 & 2 | key >> 3 & 1, seed, head)


def masked_attention(qkv, boundaries, longest, p, seed):
    """qkv [T, 3, heads, d] → [T, heads, d], sequence by sequence."""
    stride = max(16, 1 << (longest - 1).bit_length())
    parts = []
    for first, last in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        q, k, v = qkv[first:last].transpose(0, 2).unbind(1)
        probabilities = (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).softmax(2)
        each = [attention_numbers(first, last - first, stride, seed, h) for h in range(len(q))]
        kept = scaled(np.stack(each), p).to(qkv)
        parts.append(((probabilities * kept) @ v).transpose(0, 1))
    return torch.cat(parts)
