"""The dropout mask of attention in numpy, and attention as PyTorch writes it under that mask."""

import numpy as np
import philox
import torch


def random_numbers(first, queries, keys, stride, seed, head):
    """The 32-bit number of each query and key [queries, keys] of a sequence that begins there."""
    u32 = np.uint32
    start, first_mix, second_mix, _ = philox.philox(seed, head).astype(u32)
    query, key = np.arange(queries, dtype=u32)[:, None], np.arange(keys, dtype=u32)[None]
    counter = (u32(first) + (query & ~u32(8))) * u32(stride) + (key & ~u32(8))
    x = counter * u32(0x9E3779B1) + start
    x ^= (x >> u32(16)) ^ first_mix
    x *= u32(0x85EBCA6B)
    x ^= (x >> u32(15)) ^ second_mix
    factors = np.array([[0xC2B2AE35, 0x27D4EB2F], [0x165667B1, 0xD3A2646D]], u32)
    return x * factors[query >> u32(3) & u32(1), key >> u32(3) & u32(1)]


def masked_attention(qkv, boundaries, longest, p, seed):
    """qkv [T, 3, heads, d] → [T, heads, d], sequence by sequence."""
    stride = max(16, 1 << (longest - 1).bit_length())
    threshold = int(p * 2**32)
    parts = []
    for first, last in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        q, k, v = qkv[first:last].transpose(0, 2).unbind(1)
        probabilities = (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).softmax(2)
        length = last - first
        numbers = [random_numbers(first, length, length, stride, seed, h) for h in range(len(q))]
        kept = torch.from_numpy(np.stack(numbers) >= np.uint32(threshold))
        mask = kept.to(qkv) * (2**32 / (2**32 - threshold))
        parts.append(((probabilities * mask) @ v).transpose(0, 1))
    return torch.cat(parts)
