"""LayerNorm(dropout(x + x_bias) + residual), the end of each half of a post-LN layer.

Separate operations move ten [T, H] tensors forward and more backward. Here forward reads x and the
residual and writes y, backward reads both again with dy and writes their gradients: 3 and 5. Only
a mean and a scale a row are kept for backward, which draws the dropout mask again from the seed.
The three parameter gradients are summed in registers over the rows of a program, then over the
programs, always in the same order.
"""

import numpy as np
import torch
import torch.nn.functional as F

from . import cpu
from .cpu import loop
from .cpu_layer_norm import ROWS, centre, project
from .cpu_numbers import ZERO, drop, flush, narrow, widen, widened
from .dispatch import fused, operation, use_triton
from .dropout_mask import dropout, dropping, keys, make_keys, row_numbers, threshold
from .language import (
    ELEMENTS,
    PROGRAMS,
    column_sums,
    jit,
    layer_norm,
    layer_norm_gradient,
    power_of_two,
    tl,
    upcast,
)


@jit
def _sum_before_norm(
    x_ptr, x_bias, residual_ptr, mask, row, rows,
    H: tl.constexpr, BH: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """dropout(x + x_bias) + residual of rows row [R]; where it lies; what of it exists."""
    column = tl.arange(0, BH)
    at = row.to(tl.int64)[:, None] * H + column[None, :]
    inside = (row < rows)[:, None] & (column < H)[None, :]
    x = upcast(tl.load(x_ptr + at, inside, 0.0)) + x_bias[None, :]
    x = dropout(x, mask, row, BH, THRESHOLD)
    return x + upcast(tl.load(residual_ptr + at, inside, 0.0)), at, inside


@jit
def _forward(
    x_ptr, x_bias_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, mean_ptr, rstd_ptr,
    rows, H: tl.constexpr, BH: tl.constexpr, R: tl.constexpr, THRESHOLD: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, BH)
    mask = keys(seed_ptr, 0)
    x_bias = upcast(tl.load(x_bias_ptr + column, column < H, 0.0))
    z, at, inside = _sum_before_norm(x_ptr, x_bias, residual_ptr, mask, row, rows, H, BH, THRESHOLD)
    y = layer_norm(z, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, row, rows, H, BH, EPS)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@jit
def _backward(
    dy_ptr, more_ptr, x_ptr, x_bias_ptr, residual_ptr, weight_ptr, seed_ptr, mean_ptr, rstd_ptr,
    dx_ptr, d_residual_ptr, sums_ptr,
    rows, H: tl.constexpr, BH: tl.constexpr, R: tl.constexpr, THRESHOLD: tl.constexpr,
    MORE: tl.constexpr,
):  # fmt: skip
    column, mask = tl.arange(0, BH), keys(seed_ptr, 0)
    weight = upcast(tl.load(weight_ptr + column, column < H, 0.0))
    x_bias = upcast(tl.load(x_bias_ptr + column, column < H, 0.0))
    d_x_bias = tl.zeros([R, BH], mean_ptr.dtype.element_ty)
    d_weight = tl.zeros([R, BH], mean_ptr.dtype.element_ty)
    d_bias = tl.zeros([R, BH], mean_ptr.dtype.element_ty)
    step = tl.num_programs(0) * R
    STAGES: tl.constexpr = 3 if BH <= 2048 else 1  # shared memory for wider rows is not everywhere
    for start in tl.range(tl.program_id(0) * R, rows, step, num_stages=STAGES):
        row = start + tl.arange(0, R)
        z, at, inside = _sum_before_norm(
            x_ptr, x_bias, residual_ptr, mask, row, rows, H, BH, THRESHOLD
        )
        dy = upcast(tl.load(dy_ptr + at, inside, 0.0))
        if MORE:
            dy += upcast(tl.load(more_ptr + at, inside, 0.0))
        dz, normed = layer_norm_gradient(dy, z, weight, mean_ptr, rstd_ptr, row, rows, H)
        dx = dropout(dz, mask, row, BH, THRESHOLD)
        tl.store(d_residual_ptr + at, dz.to(d_residual_ptr.dtype.element_ty), inside)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), inside)
        d_x_bias += dx
        d_weight += dy * normed
        d_bias += dy
    sums_ptr += tl.program_id(0) * 3 * H + column
    tl.store(sums_ptr, tl.sum(d_x_bias, 0), column < H)
    tl.store(sums_ptr + H, tl.sum(d_weight, 0), column < H)
    tl.store(sums_ptr + 2 * H, tl.sum(d_bias, 0), column < H)


@loop
def _sum_rows(x, x_bias, residual, first, rows, mask, bits, threshold, scale, z, means):
    """Rows of dropout(x + x_bias) + residual from `first` on → z [rows, H], means [rows]."""
    size = z.shape[1]
    for i in range(rows):
        row, total = first + i, ZERO
        if threshold:
            row_numbers(row, mask, bits[i])
            for j in range(size):
                kept = drop(widen(x[row, j]) + x_bias[j], bits[i, j], threshold, scale)
                z[i, j] = kept + widen(residual[row, j])
                total += z[i, j]
        else:
            for j in range(size):
                z[i, j] = widen(x[row, j]) + x_bias[j] + widen(residual[row, j])
                total += z[i, j]
        means[i] = total / np.float32(size)


@loop
def _forward_loop(part, start, stop, x, x_bias, residual, weight, bias, seed, y, mean, rstd,
                  width, threshold, scale, eps):  # fmt: skip
    size, mask = x.shape[1], make_keys(seed, 0)
    x_bias, weight, bias = widened(x_bias), widened(weight), widened(bias)
    z, bits = np.empty((ROWS, size), np.float32), np.empty((ROWS, width), np.uint32)
    for first in range(start, stop, ROWS):
        rows = min(ROWS, stop - first)
        means, deviations = mean[first : first + rows], rstd[first : first + rows]
        _sum_rows(x, x_bias, residual, first, rows, mask, bits, threshold, scale, z, means)
        centre(z, rows, means, deviations, eps)
        for i in range(rows):
            row, deviation = first + i, deviations[i]
            for j in range(size):
                y[row, j] = narrow(z[i, j] * deviation * weight[j] + bias[j], y)


@loop
def _backward_loop(part, start, stop, dy, more, x, x_bias, residual, weight, seed, mean, rstd, dx,
                   d_residual, sums, width, threshold, scale):  # fmt: skip
    size, mask = x.shape[1], make_keys(seed, 0)
    x_bias, weight = widened(x_bias), widened(weight)
    z, bits = np.empty((ROWS, size), np.float32), np.empty((ROWS, width), np.uint32)
    slopes, (totals, alongs) = np.empty_like(z), np.empty((2, ROWS), np.float32)
    d_x_bias, d_weight, d_bias = np.zeros((3, size), np.float32)
    for first in range(start, stop, ROWS):
        rows = min(ROWS, stop - first)
        _sum_rows(x, x_bias, residual, first, rows, mask, bits, threshold, scale, z, totals)
        for i in range(rows):
            row = first + i
            for j in range(size):
                slopes[i, j] = widen(dy[row, j])
            if len(more):
                for j in range(size):
                    slopes[i, j] += widen(more[row, j])
        project(z, slopes, rows, mean[first:], rstd[first:], weight, totals, alongs)
        for i in range(rows):
            for j in range(size):
                d_weight[j] += slopes[i, j] * z[i, j]
                d_bias[j] += slopes[i, j]
        for i in range(rows):
            row, total, along, deviation = first + i, totals[i], alongs[i], rstd[first + i]
            for j in range(size):
                dz = (slopes[i, j] * weight[j] - total - z[i, j] * along) * deviation
                d_residual[row, j] = narrow(dz, d_residual)
                dz = drop(dz, bits[i, j], threshold, scale) if threshold else dz
                dx[row, j] = narrow(dz, dx)
                d_x_bias[j] += dz
        if first // ROWS % 8 == 7 or first + rows == stop:
            flush(d_x_bias, sums[part, 0])
            flush(d_weight, sums[part, 1])
            flush(d_bias, sums[part, 2])


def _blocks(width: int, backward: bool) -> tuple[dict, int]:
    """Constants of a block of whole rows, and its warps: of those tried the fastest on an H100.

    So is the number of backward's programs, each of which loads its next block while it works on
    one (torch 2.11.0, triton 3.6.0).
    """
    columns = max(16, power_of_two(width))
    elements = ELEMENTS // 4 if backward else ELEMENTS // 2
    constants = {"H": width, "BH": columns, "R": max(1, elements // columns)}
    if columns <= 512:
        return constants, 1 if backward else 2
    return constants, 4 if columns <= 1024 else 8


@operation("dropout_add_layer_norm", uses=2)
def forward(
    x: torch.Tensor,
    x_bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ y [T, H], mean [T], 1/deviation [T]."""
    outputs = _forward_outputs(x)
    constants, warps = _blocks(x.shape[1], backward=False)
    if not use_triton(x):
        inputs = x, x_bias, residual, weight, bias, cpu.seed(seed)
        others = constants["BH"], *dropping(p), np.float32(eps)
        cpu.run(_forward_loop, x.shape[0], *inputs, *outputs, *others)
        return outputs
    grid = (-(-x.shape[0] // constants["R"]),)
    _forward[grid](
        x, x_bias, residual, weight, bias, seed, *outputs, x.shape[0],
        THRESHOLD=threshold(p), EPS=eps, **constants, num_warps=warps,
    )  # fmt: skip
    return outputs


def _forward_outputs(x, *_):
    rows = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), rows, torch.empty_like(rows)


@operation("dropout_add_layer_norm_backward")
def backward(
    dy: torch.Tensor,
    more: torch.Tensor | None,
    x: torch.Tensor,
    x_bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    seed: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ gradients of x [T, H] and residual [T, H]; of x_bias, weight and bias as one [3, H].

    more: a second gradient of y, to add to the first.
    """
    dx, d_residual = x.new_empty(x.shape), x.new_empty(x.shape)
    constants, warps = _blocks(x.shape[1], backward=True)
    if not use_triton(x):
        sums = torch.zeros(cpu.parts(), 3, x.shape[1], dtype=torch.float64)
        more = x.new_empty(0, x.shape[1]) if more is None else more
        inputs = dy, more, x, x_bias, residual, weight, cpu.seed(seed), mean, rstd
        others = constants["BH"], *dropping(p)
        cpu.run(_backward_loop, x.shape[0], *inputs, dx, d_residual, sums, *others)
        return dx, d_residual, sums.sum(0).to(torch.promote_types(x_bias.dtype, weight.dtype))
    programs = 2 * PROGRAMS if constants["BH"] <= 512 else 3 * PROGRAMS // 2
    programs = min(programs, -(-x.shape[0] // constants["R"]))
    sums = mean.new_empty(programs, 3, x.shape[1])
    _backward[(programs,)](
        dy, dy if more is None else more, x, x_bias, residual, weight, seed, mean, rstd,
        dx, d_residual, sums, x.shape[0],
        THRESHOLD=threshold(p), MORE=more is not None, **constants, num_warps=warps,
    )  # fmt: skip
    return dx, d_residual, column_sums(sums, torch.promote_types(x_bias.dtype, weight.dtype))


@backward.register_fake
def _(dy, more, x, x_bias, residual, weight, *_):
    sums = x.new_empty(3, x.shape[1], dtype=torch.promote_types(x_bias.dtype, weight.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), sums


def _save(ctx, inputs, output):
    x, x_bias, residual, weight, _, ctx.p, seed, _ = inputs
    ctx.save_for_backward(x, x_bias, residual, weight, seed, *output[1:])


def _differentiate(ctx, dy, more):
    if dy is None:
        dy, more = more, None
    dx, d_residual, sums = backward(dy, more, *ctx.saved_tensors, ctx.p)
    d_x_bias, d_weight, d_bias = sums.unbind()
    return dx, d_x_bias, d_residual, d_weight, d_bias, None, None, None


forward.register_fake(_forward_outputs)
forward.register_autograd(_differentiate, _save)


def dropout_add_layer_norm(
    x: torch.Tensor,
    x_bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    eps: float = 1e-12,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm of dropout(x [T, H] + x_bias [H]) + residual [T, H] → [T, H], twice.

    The two are one tensor, for the product that follows and for the residual after it, whose
    gradients are added here. weight, bias [H]: of the LayerNorm. p: dropped share, 0 = none. seed
    [1] int64: of the mask.
    """
    arguments = x, x_bias, residual, weight, bias, p, seed, eps
    if fused(x):
        return forward(*arguments)[:2]
    return dropout_add_layer_norm_reference(*arguments)


def dropout_add_layer_norm_reference(x, x_bias, residual, weight, bias, p, seed, eps=1e-12):
    """`dropout_add_layer_norm` in plain PyTorch; the mask comes from torch's generator."""
    x = x + x_bias
    if p:
        x = F.dropout(x, p)
    return (F.layer_norm(x + residual, weight.shape, weight, bias, eps),) * 2
