"""LayerNorm(GELU(x + bias)), the generator's transform after its dense layer.

Forward reads x and writes y, backward reads dy and x and writes dx: 2 and 3 [M, E] tensors where
separate operations move 6 and 9. GELU is computed again in backward; the parameter gradients are
summed in registers, always in the same order.
"""

import torch
import torch.nn.functional as F

from .dispatch import operation, use_triton
from .language import (
    PROGRAMS,
    column_sums,
    gelu,
    gelu_slope,
    jit,
    layer_norm,
    layer_norm_gradient,
    row_blocks,
    tl,
    upcast,
)


@jit
def _forward(
    x_ptr, bias_ptr, weight_ptr, ln_bias_ptr, y_ptr, mean_ptr, rstd_ptr,
    rows, H: tl.constexpr, BH: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, BH)
    at = row.to(tl.int64)[:, None] * H + column[None, :]
    inside = (row < rows)[:, None] & (column < H)[None, :]
    x = upcast(tl.load(x_ptr + at, inside, 0.0))
    x += upcast(tl.load(bias_ptr + column, column < H, 0.0))[None, :]
    z = gelu(x, x_ptr.dtype.element_ty.primitive_bitwidth > 16)
    y = layer_norm(z, weight_ptr, ln_bias_ptr, mean_ptr, rstd_ptr, row, rows, H, BH, EPS)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@jit
def _backward(
    dy_ptr, x_ptr, bias_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, sums_ptr,
    rows, H: tl.constexpr, BH: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth > 16
    column = tl.arange(0, BH)
    bias = upcast(tl.load(bias_ptr + column, column < H, 0.0))
    weight = upcast(tl.load(weight_ptr + column, column < H, 0.0))
    d_bias = tl.zeros([R, BH], mean_ptr.dtype.element_ty)
    d_weight = tl.zeros([R, BH], mean_ptr.dtype.element_ty)
    d_ln_bias = tl.zeros([R, BH], mean_ptr.dtype.element_ty)
    for start in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = start + tl.arange(0, R)
        at = row.to(tl.int64)[:, None] * H + column[None, :]
        inside = (row < rows)[:, None] & (column < H)[None, :]
        x = upcast(tl.load(x_ptr + at, inside, 0.0)) + bias[None, :]
        dy = upcast(tl.load(dy_ptr + at, inside, 0.0))
        dz, normed = layer_norm_gradient(
            dy, gelu(x, EXACT), weight, mean_ptr, rstd_ptr, row, rows, H
        )
        dx = dz * gelu_slope(x, EXACT)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), inside)
        d_bias += dx
        d_weight += dy * normed
        d_ln_bias += dy
    sums_ptr += tl.program_id(0) * 3 * H + column
    tl.store(sums_ptr, tl.sum(d_bias, 0), column < H)
    tl.store(sums_ptr + H, tl.sum(d_weight, 0), column < H)
    tl.store(sums_ptr + 2 * H, tl.sum(d_ln_bias, 0), column < H)


@operation("bias_gelu_layer_norm")
def forward(
    x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, ln_bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ y [M, E], mean [M], 1/deviation [M]."""
    outputs = _forward_outputs(x)
    constants, warps = row_blocks(x.shape[1])
    grid = (-(-x.shape[0] // constants["R"]),)
    _forward[grid](
        x, bias, weight, ln_bias, *outputs, x.shape[0], EPS=eps, **constants, num_warps=warps
    )
    return outputs


def _forward_outputs(x, *_):
    rows = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), rows, torch.empty_like(rows)


@operation("bias_gelu_layer_norm_backward")
def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ gradients of x [M, E]; of bias, weight and ln_bias as one [3, E]."""
    dx = x.new_empty(x.shape)
    constants, _ = row_blocks(x.shape[1])
    programs = min(PROGRAMS, -(-x.shape[0] // constants["R"]))
    sums = mean.new_empty(programs, 3, x.shape[1])
    _backward[(programs,)](
        dy, x, bias, weight, mean, rstd, dx, sums, x.shape[0], **constants, num_warps=8
    )
    return dx, column_sums(sums, torch.promote_types(bias.dtype, weight.dtype))


@backward.register_fake
def _(dy, x, bias, weight, *_):
    dtype = torch.promote_types(bias.dtype, weight.dtype)
    return x.new_empty(x.shape), x.new_empty(3, x.shape[1], dtype=dtype)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _differentiate(ctx, dy):
    dx, sums = backward(dy, *ctx.saved_tensors)
    return dx, *sums.unbind(), None


forward.register_fake(_forward_outputs)
forward.register_autograd(_differentiate, _save)


def bias_gelu_layer_norm(
    x: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float = 1e-12,
) -> torch.Tensor:
    """LayerNorm of the erf-GELU of x [M, E] + bias [E] → [M, E].

    weight, ln_bias [E]: of the LayerNorm.
    """
    if use_triton(x):
        return forward(x, bias, weight, ln_bias, eps)[0]
    return bias_gelu_layer_norm_reference(x, bias, weight, ln_bias, eps)


def bias_gelu_layer_norm_reference(x, bias, weight, ln_bias, eps=1e-12):
    """`bias_gelu_layer_norm` in plain PyTorch."""
    return F.layer_norm(F.gelu(x + bias), weight.shape, weight, ln_bias, eps)
