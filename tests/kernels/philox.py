"""Philox 4x32 in numpy (Salmon et al. 2011): what the dropout masks of the kernels must be."""

import numpy as np
import torch

ROUNDS = 7


def philox(seed, counter):
    """The four 32-bit outputs for each counter [..., 4]."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    zero = np.zeros_like(np.asarray(counter, np.uint64))
    c0, c1, c2, c3 = zero + np.asarray(counter, np.uint64), zero, zero, zero
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(ROUNDS):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (b >> shift) ^ c1 ^ np.uint64(k0), b & mask
        c2, c3 = (a >> shift) ^ c3 ^ np.uint64(k1), a & mask
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1)


def mask(rows, width, block, p, seed):
    """What dropout multiplies by [rows, width], where a row takes `block` random numbers."""
    bits = philox(seed, np.arange(rows * block // 4)).reshape(rows, block)[:, :width]
    threshold = int(p * 2**32)
    return torch.from_numpy((bits >= threshold) / (1 - threshold / 2**32))
