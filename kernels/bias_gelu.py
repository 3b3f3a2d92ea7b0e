"""GELU(x + bias), the activation of the feed-forward layers.

Forward reads x and writes y, backward reads dy and x and writes dx, with the bias gradient summed
in registers on the way: 2 and 3 [N, F] tensors where separate operations move 4 and 6. Both take
the rows from the last one back: what the product before them wrote last is still in the cache.
What nothing reads soon again leaves the cache first.

The products around it stay the library's. One of our own in Triton, with GELU at its end and in
backward its slope, was tried on an H100: it gained a few per cent of small's step, none of base's.
A whole feed-forward block in one kernel was weighed for ELECTRA-small, [16 384, 256] → 1024 → 256.
Forward: 50 µs at least by the traffic of the separate operations; kept on the chip, a block fits as
128 tokens by 64 units with 240 registers and 213 KB of shared memory (so not at all on an L4), one
program on each SM whose products and GELU do not overlap: 32 µs by its instructions. Backward: 7
products instead of 4, 76 µs at a full rate that compiled products do not reach, against 101 µs of
traffic. A few per cent of a step, of one model, at best: not worth a matrix product of our own.
"""

import numpy as np
import torch
import torch.nn.functional as F

from . import cpu, cpu_gelu
from .cpu import fetch, loop
from .cpu_numbers import flush, narrow, widen, widened
from .dispatch import fused, operation, use_triton
from .language import (
    ELEMENTS,
    PROGRAMS,
    column_sums,
    gelu,
    gelu_slope,
    jit,
    power_of_two,
    tl,
    upcast,
)


@jit
def _forward(x_ptr, bias_ptr, y_ptr, rows, F: tl.constexpr, BC: tl.constexpr, R: tl.constexpr):
    across = tl.cdiv(F, BC)
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    row = place // across * R + tl.arange(0, R)
    column = place % across * BC + tl.arange(0, BC)
    at = row.to(tl.int64)[:, None] * F + column[None, :]
    inside = (row < rows)[:, None] & (column < F)[None, :]
    bias = upcast(tl.load(bias_ptr + column, column < F, 0.0))
    x = upcast(tl.load(x_ptr + at, inside, 0.0, eviction_policy="evict_first")) + bias[None, :]
    y = gelu(x, x_ptr.dtype.element_ty.primitive_bitwidth > 16)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@jit
def _backward(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, sums_ptr,
    rows, F: tl.constexpr, BC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    bias = upcast(tl.load(bias_ptr + column, column < F, 0.0))
    d_bias = tl.zeros([R, BC], sums_ptr.dtype.element_ty)
    last = (rows - 1) // R * R
    for back in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = last - back + tl.arange(0, R)
        at = row.to(tl.int64)[:, None] * F + column[None, :]
        inside = (row < rows)[:, None] & (column < F)[None, :]
        x = upcast(tl.load(x_ptr + at, inside, 0.0, eviction_policy="evict_first")) + bias[None, :]
        slope = gelu_slope(x, x_ptr.dtype.element_ty.primitive_bitwidth > 16)
        dx = upcast(tl.load(dy_ptr + at, inside, 0.0, eviction_policy="evict_first")) * slope
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), inside)
        d_bias += dx
    tl.store(sums_ptr + tl.program_id(0) * F + column, tl.sum(d_bias, 0), column < F)


@loop
def _fetch(x, row):
    """Have a row brought to the cache ahead, unless it is wide: too much at once takes longer."""
    if x.shape[1] * x.itemsize <= 2048:
        fetch(x, 1, x.shape[1], row, 0)


@loop
def _forward_loop(part, start, stop, x, bias, y):
    bias = widened(bias)
    for row in range(start, stop):
        _fetch(x, row + 1)
        for j in range(x.shape[1]):
            z = widen(x[row, j]) + bias[j]
            y[row, j] = narrow(cpu_gelu.gelu(z, y), y)


@loop
def _backward_loop(part, start, stop, dy, x, bias, dx, sums):
    bias, d_bias = widened(bias), np.zeros(x.shape[1], np.float32)
    for row in range(start, stop):
        _fetch(dy, row + 1)
        _fetch(x, row + 1)
        for j in range(x.shape[1]):
            z = widen(x[row, j]) + bias[j]
            slope = widen(dy[row, j]) * cpu_gelu.slope(z, dx)
            dx[row, j] = narrow(slope, dx)
            d_bias[j] += slope
        if row % 64 == 63 or row == stop - 1:
            flush(d_bias, sums[part])


def _blocks(x):
    """Constants of a launch over x, and its row and column blocks."""
    columns = min(128, max(16, power_of_two(x.shape[1])))
    constants = {"F": x.shape[1], "BC": columns, "R": ELEMENTS // columns}
    return constants, -(-x.shape[0] // constants["R"]), -(-x.shape[1] // columns)


@operation("bias_gelu")
def forward(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """→ y [N, F]."""
    y = x.new_empty(x.shape)
    if not use_triton(x):
        cpu.run(_forward_loop, x.shape[0], x, bias, y)
        return y
    constants, row_blocks, column_blocks = _blocks(x)
    _forward[(row_blocks * column_blocks,)](x, bias, y, x.shape[0], **constants, num_warps=4)
    return y


@operation("bias_gelu_backward")
def backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ gradients of x [N, F] and bias [F]."""
    dx = x.new_empty(x.shape)
    if not use_triton(x):
        sums = torch.zeros(cpu.parts(), x.shape[1], dtype=torch.float64)
        cpu.run(_backward_loop, x.shape[0], dy, x, bias, dx, sums)
        return dx, sums.sum(0).to(bias.dtype)
    constants, row_blocks, column_blocks = _blocks(x)
    programs = min(row_blocks, max(32, 3 * PROGRAMS // column_blocks))
    statistics = torch.promote_types(x.dtype, torch.float32)
    sums = x.new_empty(programs, x.shape[1], dtype=statistics)
    _backward[(programs, column_blocks)](
        dy, x, bias, dx, sums, x.shape[0], **constants, num_warps=4
    )
    return dx, column_sums(sums, bias.dtype)


forward.register_fake(lambda x, bias: x.new_empty(x.shape))
backward.register_fake(lambda dy, x, bias: (x.new_empty(x.shape), bias.new_empty(bias.shape)))
forward.register_autograd(
    lambda ctx, dy: backward(dy, *ctx.saved_tensors),
    save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """erf-GELU of x [N, F] + bias [F] → [N, F]."""
    return forward(x, bias) if fused(x) else bias_gelu_reference(x, bias)


def bias_gelu_reference(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`bias_gelu` in plain PyTorch."""
    return F.gelu(x + bias)
