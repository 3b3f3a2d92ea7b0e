"""The dropout mask, bit for bit, against numpy."""

import kernel_cases
import masks
import pytest
import torch

from fastelectra import kernels


def mask(rows, width, p, seed):
    block = max(16, 1 << (width - 1).bit_length())
    (scale,) = kernel_cases.placed(masks.mask(rows, width, block, p, seed))
    return scale.to(kernel_cases.EXACT)


@pytest.mark.parametrize(("p", "seed"), [(0.1, 3), (0.5, 2**40 + 11), (0.9, 2**62)])
@pytest.mark.parametrize("name", ["dropout_add_layer_norm", "embed_layer_norm"])
def test_drops_what_the_numbers_say(name, p, seed):
    *inputs, _, _, eps = kernel_cases.make(name, 37, 44, kernel_cases.EXACT)
    scale = mask(37, 44, p, seed)

    def expected(*inputs):
        if name == "embed_layer_norm":
            return scale * kernels.embed_layer_norm_reference(*inputs, 0.0, None, eps)
        x, x_bias, residual, *rest = inputs
        inputs = (x + x_bias) * scale, torch.zeros_like(x_bias), residual, *rest
        return kernels.dropout_add_layer_norm_reference(*inputs, 0.0, None, eps)[0]

    def actual(*inputs):
        seeds = kernel_cases.placed(torch.tensor([seed]))
        out = getattr(kernels, name)(*inputs, p, *seeds, eps)
        return out[0] if isinstance(out, tuple) else out

    for a, e in zip(
        kernel_cases.with_gradients(actual, inputs),
        kernel_cases.with_gradients(expected, inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, e, **kernel_cases.CLOSE)


def test_share_and_independence_of_neighbours():
    kept = mask(2000, 64, 0.1, 5) > 0
    share = kept.double().mean().item()
    assert abs(share - 0.9) < 4 * (0.09 / kept.numel()) ** 0.5
    both = (kept[:, 1:] & kept[:, :-1]).double().mean().item()
    assert abs(both - 0.81) < 0.005
    assert not torch.equal(mask(20, 64, 0.1, 5), mask(20, 64, 0.1, 6))
