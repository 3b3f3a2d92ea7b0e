"""Inputs for every differentiable op, and what any two implementations of it are compared on."""

import functools
from contextlib import contextmanager

import pytest
import torch
from fastelectra.kernels import chunked_cross_entropy, flash_cross_entropy
from fastelectra.kernels.dispatch import INTERPRETED

from fastelectra import kernels

ON_GPU = torch.cuda.is_available() and not INTERPRETED  # where executed/ runs
# what fp64 shows exactly is shown in fp32 on a GPU, where not all kernels compile for fp64
EXACT = torch.float32 if ON_GPU else torch.float64
CLOSE = {"rtol": 2e-4, "atol": 5e-5} if ON_GPU else {"rtol": 1e-9, "atol": 1e-9}

device = "cpu"  # of the inputs; executed/ sets it


@contextmanager
def in_threads(count):
    """So many of torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def placed(*tensors):
    """The tensors, where the kernels take them."""
    return [tensor.to(device) for tensor in tensors]


def shapes(examples, **bounds):
    """Decorator of a test of whole numbers, each within (low, high).

    Drawn by hypothesis; on a GPU, where every other width takes seconds to compile, two examples.
    """
    if ON_GPU:
        inner = [high - (high - low) // 3 for low, high in bounds.values()]
        return pytest.mark.parametrize(
            tuple(bounds), [tuple(low for low, _ in bounds.values()), tuple(inner)]
        )
    from hypothesis import given, settings
    from hypothesis import strategies as st

    drawn = given(**{name: st.integers(*ends) for name, ends in bounds.items()})
    settled = settings(max_examples=examples, deadline=None, derandomize=True)
    return lambda test: settled(drawn(test))


def _normal(generator, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def _integers(generator, high, *shape, low=0):
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


def chosen_positions(generator, rows, padding):
    """About a quarter of `rows` positions, ascending, then `padding` sentinels."""
    chosen = (torch.rand(rows, generator=generator) < 0.25).nonzero()[:, 0].int()
    return torch.cat([chosen, chosen.new_full((padding,), rows)])


def bias_gelu(g, rows, width):
    return [_normal(g, rows, width, scale=2), _normal(g, width)]


def bias_gelu_layer_norm(g, rows, width):
    return [*bias_gelu(g, rows, width), 1 + _normal(g, width, scale=0.1), _normal(g, width), 1e-12]


def dropout_add_layer_norm(g, rows, width):
    x, residual = _normal(g, rows, width), _normal(g, rows, width)
    weight, bias = 1 + _normal(g, width, scale=0.1), _normal(g, width)
    return [x, _normal(g, width), residual, weight, bias, 0.0, torch.tensor([7]), 1e-12]


def embed_layer_norm(g, rows, width):
    tokens, segments = _integers(g, 40, rows).square() // 40, _integers(g, 2, rows)
    positions = torch.arange(rows, dtype=torch.int32) % 11
    tables = [_normal(g, size, width) for size in (40, 2, 13)]
    weight, bias = 1 + _normal(g, width, scale=0.1), _normal(g, width)
    seed = torch.tensor([7])
    return [tokens, segments, positions, *tables, weight, bias, 0.0, seed, 1e-12]


def masked_gather(g, rows, width):
    return [_normal(g, rows, width), chosen_positions(g, rows, padding=min(rows, 3))]


def replaced_token_loss(g, rows, width):
    vectors = _normal(g, width), _normal(g, width, scale=width**-0.5), _normal(g, 1)
    real = torch.tensor(rows * 4 // 5, dtype=torch.int32)
    return [_normal(g, rows, width), *vectors, _integers(g, 2, rows), real]


def split_qkv(g, rows, width):
    return [_normal(g, rows, 3, 1, width), _normal(g, 3 * width)]


def joined(function):
    """Several outputs as one, weighted: no gradient of one is another's."""

    def call(*inputs):
        return torch.cat([(i + 1) * part for i, part in enumerate(function(*inputs))], 1)

    return call


def biased(function):
    """The same of products and their bias."""

    def call(products, bias, *others):
        return function(products + bias.detach().view(products.shape[1:]), bias, *others)

    return call


def packed_attention(g, rows, width):
    """Sequences of short and long lengths from 0 up, of two heads, in `rows` rows."""
    lengths, left = [], rows
    while left:
        lengths.append(min(left, len(lengths) * 17 % 90))
        left -= lengths[-1]
    qkv, boundaries = _normal(g, rows, 3, 2, width, scale=2), torch.tensor([0, *lengths])
    bias = _normal(g, 6 * width, scale=0.1)
    return [qkv, bias, boundaries.cumsum(0).int(), 90, 0.0, torch.tensor([7])]


def linear_cross_entropy_sample(g, rows, width):
    vocabulary = 100 + 5 * width  # one to four tiles, the last one not full
    hidden, weight = _normal(g, rows, width), _normal(g, vocabulary, width, scale=0.4)
    labels = _integers(g, vocabulary, rows, low=-1)
    return [hidden, weight, _normal(g, vocabulary), labels, torch.rand(rows, generator=g), 0.7]


def flash(*inputs):
    """`linear_cross_entropy_sample` that way, in any precision."""
    return flash_cross_entropy.forward(*inputs)[:3]


def chunked(*inputs):
    """`linear_cross_entropy_sample` that way, at any width."""
    return chunked_cross_entropy.forward(*inputs, True)[:3]


WAYS = {"flash_cross_entropy": flash, "chunked_cross_entropy": chunked}
CASES = (
    {  # name → maker of inputs, operation, the same in plain PyTorch
        make.__name__: (
            make,
            getattr(kernels, make.__name__),
            getattr(kernels, f"{make.__name__}_reference"),
        )
        for make in (
            bias_gelu,
            bias_gelu_layer_norm,
            embed_layer_norm,
            masked_gather,
            replaced_token_loss,
        )
    }
    | {
        "split_qkv": (
            split_qkv,
            joined(biased(kernels.split_qkv)),
            joined(biased(kernels.split_qkv_reference)),
        ),
        "packed_attention": (
            packed_attention,
            biased(kernels.packed_attention),
            biased(kernels.packed_attention_reference),
        ),
        "dropout_add_layer_norm": (
            dropout_add_layer_norm,
            joined(kernels.dropout_add_layer_norm),
            joined(kernels.dropout_add_layer_norm_reference),
        ),
    }
    | {
        name: (linear_cross_entropy_sample, way, kernels.linear_cross_entropy_sample_reference)
        for name, way in WAYS.items()
    }
)


def make(name, rows, width, dtype=torch.float64, seed=0):
    """Inputs of an op; those to differentiate, made in fp64, require a gradient."""
    inputs = CASES[name][0](torch.Generator().manual_seed(seed), rows, width)
    for value in inputs:
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
            value.requires_grad_()
    return [convert(value, dtype) for value in inputs]


def convert(value, dtype):
    """An input on the device, if differentiable in another precision."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.requires_grad:
        return value.detach().to(device, dtype).requires_grad_()
    return value.to(device)


def operation(name):
    """The op's first output, as a function of its inputs."""
    return functools.partial(_first, CASES[name][1])


def reference(name):
    """The same of its plain PyTorch form."""
    return functools.partial(_first, CASES[name][2])


def _first(function, *inputs):
    output = function(*inputs)
    return output[0] if isinstance(output, tuple) else output


def with_gradients(function, inputs, seed=1):
    """[output, gradient of each differentiable input], for a fixed random output gradient."""
    output = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    d_output = _normal(generator, *output.shape).bfloat16().to(output)
    wanted = [value for value in inputs if isinstance(value, torch.Tensor) and value.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, d_output)]


def exact_distribution(hidden, weight, bias, temperature):
    """Cumulative distribution in fp64 [M, V + 1], from 0 to 1."""
    logits = hidden.double() @ weight.double().t() + bias.double()
    steps = (logits / temperature).softmax(1).cumsum(1)
    return torch.cat([steps.new_zeros(steps.shape[0], 1), steps / steps[:, -1:]], 1)


def assert_inverse_of(distribution, uniforms, sampled, tolerance=2e-6):
    """Each sample is the token whose step of the distribution holds the row's uniform number."""
    sampled = sampled.long()[:, None]
    low, high = (distribution.gather(1, sampled + end)[:, 0] for end in (0, 1))
    assert (high > low).all(), "sampled a token of no probability"
    assert ((uniforms > low - tolerance) & (uniforms < high + tolerance)).all()


def assert_follows(distribution, sampled, groups=20):
    """Chi-square over groups of tokens of about equal mass; fails once in 10^5 by chance."""
    distribution, sampled = distribution.cpu(), sampled.cpu()
    steps = distribution.diff()
    share = distribution[:-1] + steps / 2
    group = (share * groups).long().clamp(max=groups - 1)
    expected = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, steps)
    expected *= len(sampled)
    observed = torch.bincount(group[sampled.long()], minlength=groups).double()
    used = expected > 5
    statistic = ((observed - expected)[used].square() / expected[used]).sum()
    freedom = (used.sum() - 1).double()
    assert torch.special.gammaincc(freedom / 2, statistic / 2) > 1e-5


def assert_error_is_small(name, rows, width, dtype, slack_of_sums=1e-6):
    """The 2× rule: errors against fp64 are at most twice PyTorch's in the same precision.

    slack_of_sums: allowed in 16 bit, relative, of a scalar output, whose errors may cancel.
    """
    low = make(name, rows, width, dtype)
    exact = [convert(value, torch.float64) for value in low]
    truth = with_gradients(reference(name), exact)
    plain = with_gradients(reference(name), low)
    fused = with_gradients(operation(name), low)
    for place, (t, p, f) in enumerate(zip(truth, plain, fused, strict=True)):
        assert f.dtype == p.dtype
        slack = 1e-6 if t.ndim or dtype == torch.float32 else slack_of_sums
        allowed = 2 * (p.double() - t).norm() + slack * t.norm()
        assert (f.double() - t).norm() <= allowed, f"output {place}"
