"""The dropout mask, bit for bit, against Philox written in numpy."""

import kernel_cases
import numpy as np
import pytest
import torch

from fastelectra import kernels

ROUNDS = 7


def philox(seed, counter):
    """The four 32-bit outputs of Philox 4x32 for each counter (Salmon et al. 2011) [..., 4]."""
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


def mask(rows, width, p, seed):
    """What `dropout` multiplies by [rows, width]."""
    block = max(16, 1 << (width - 1).bit_length())
    bits = philox(seed, np.arange(rows * block // 4)).reshape(rows, block)[:, :width]
    threshold = int(p * 2**32)
    return torch.from_numpy((bits >= threshold) / (1 - threshold / 2**32))


@pytest.mark.parametrize(("p", "seed"), [(0.1, 3), (0.5, 2**40 + 11), (0.9, 2**62)])
@pytest.mark.parametrize("name", ["dropout_add_layer_norm", "embed_layer_norm"])
def test_drops_what_philox_says(name, p, seed):
    *inputs, _, _, eps = kernel_cases.make(name, 37, 44)
    scale = mask(37, 44, p, seed)

    def expected(*inputs):
        if name == "embed_layer_norm":
            return scale * kernels.embed_layer_norm_reference(*inputs, 0.0, None, eps)
        x, x_bias, residual, *rest = inputs
        x, x_bias = (x + x_bias) * scale, torch.zeros_like(x_bias)
        return kernels.dropout_add_layer_norm_reference(x, x_bias, residual, *rest, 0.0, None, eps)

    def actual(*inputs):
        return getattr(kernels, name)(*inputs, p, torch.tensor([seed]), eps)

    for a, e in zip(
        kernel_cases.with_gradients(actual, inputs),
        kernel_cases.with_gradients(expected, inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_share_and_independence_of_neighbours():
    kept = mask(2000, 64, 0.1, 5) > 0
    share = kept.double().mean().item()
    assert abs(share - 0.9) < 4 * (0.09 / kept.numel()) ** 0.5
    both = (kept[:, 1:] & kept[:, :-1]).double().mean().item()
    assert abs(both - 0.81) < 0.005
    assert not torch.equal(mask(20, 64, 0.1, 5), mask(20, 64, 0.1, 6))
