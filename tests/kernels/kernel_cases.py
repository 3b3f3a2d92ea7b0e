"""Inputs for every differentiable op, and what any two implementations of it are compared on."""

import functools

import torch

from fastelectra import kernels


def _normal(generator, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def _integers(generator, high, *shape, low=0):
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


def chosen_positions(generator, rows, padding):
    """About a quarter of `rows` positions, ascending, then `padding` sentinels."""
    chosen = (torch.rand(rows, generator=generator) < 0.25).nonzero()[:, 0].int()
    return torch.cat([chosen, chosen.new_full((padding,), rows)])


def bias_gelu(g, rows, width):
    return [_normal(g, rows, width, scale=2), _normal(g, width)]


def dropout_add_layer_norm(g, rows, width):
    x, residual = _normal(g, rows, width), _normal(g, rows, width)
    weight, bias = 1 + _normal(g, width, scale=0.1), _normal(g, width)
    return [x, _normal(g, width), residual, weight, bias, 0.0, torch.tensor([7]), 1e-12]


CASES = {make.__name__: make for make in (bias_gelu, dropout_add_layer_norm)}


def make(name, rows, width, dtype=torch.float64, seed=0):
    """Inputs of an op; those to differentiate are floating-point and require a gradient."""
    inputs = CASES[name](torch.Generator().manual_seed(seed), rows, width)
    return [convert(value, dtype) for value in inputs]


def convert(value, dtype):
    """A differentiable input in another precision; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.dim():
        return value.detach().to(dtype).requires_grad_()
    return value


def operation(name):
    """The op's first output, as a function of its inputs."""
    return functools.partial(_first, getattr(kernels, name))


def reference(name):
    """The same of its plain PyTorch form."""
    return functools.partial(_first, getattr(kernels, f"{name}_reference"))


def _first(function, *inputs):
    output = function(*inputs)
    return output[0] if isinstance(output, tuple) else output


def with_gradients(function, inputs, seed=1):
    """[output, gradient of each differentiable input], for a fixed random output gradient."""
    output = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    d_output = _normal(generator, *output.shape).bfloat16().to(output.dtype)
    wanted = [value for value in inputs if isinstance(value, torch.Tensor) and value.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, d_output)]
