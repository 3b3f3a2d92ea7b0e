"""Triton for the op files, importable where triton is absent, and the blocks they share."""

from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl

    def jit(function):
        """triton.jit; profiles show a kernel as its file's name and its own."""
        name = function.__module__.rpartition(".")[2] + function.__name__
        # seeds are slices of one tensor: else each would be compiled for twice
        return triton.jit(
            function, repr=lambda _: name, do_not_specialize_on_alignment=["seed_ptr"]
        )

except ImportError:  # the kernels are then never called
    tl = SimpleNamespace(constexpr=lambda value: value)

    def jit(function):
        """Leave the function as it is."""
        return function


LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp four
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TAU = tl.constexpr(0.3989422804014327)
LEAST_SHARE = 2.0**-40  # of the largest mass: what has less is never drawn, whatever the rounding
NEGLIGIBLE = tl.constexpr(LEAST_SHARE)
BELOW_ONE = tl.constexpr(1 - 2.0**-24)  # the largest uniform number
ELEMENTS = 2048  # of a block of whole rows: 16 bytes or more per thread and load
PROGRAMS = 264  # that share the rows where each keeps sums over its own: two for an H100's SM


@jit
def upcast(x):
    """The type to compute in: fp32, or fp64 as it is."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@jit
def normal(x, EXACT: tl.constexpr):
    """Φ(x) and φ(x), the normal distribution and its density.

    Not EXACT: Abramowitz & Stegun 26.2.17, off by less than 7.5e-8, in half the instructions of
    erf; enough where the result is stored in 16 bits.
    """
    density = INVERSE_SQRT_TAU * tl.exp2(x * x * (-0.5 * LOG2_E))
    if EXACT:
        return 0.5 + 0.5 * tl.erf(x * SQRT_HALF), density
    root = tl.rsqrt(1 + 0.2316419 * tl.abs(x))
    t = root * root  # one instruction more than rsqrt; a division takes seven
    tail = 1.330274429 * t - 1.821255978
    tail = ((tail * t + 1.781477937) * t - 0.356563782) * t + 0.319381530
    tail = tail * t * density
    return tl.where(x > 0, 1 - tail, tail), density


@jit
def gelu(x, EXACT: tl.constexpr):
    """x · Φ(x)."""
    return x * normal(x, EXACT)[0]


@jit
def gelu_slope(x, EXACT: tl.constexpr):
    """Φ(x) + x · φ(x), the derivative of gelu."""
    distribution, density = normal(x, EXACT)
    return distribution + x * density


@jit
def layer_norm(z, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, row, rows,
               H: tl.constexpr, BH: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """LayerNorm of z [R, BH], 0 from H on; leaves each row's mean and 1/deviation in memory."""
    column = tl.arange(0, BH)
    mean = tl.sum(z, 1) / H
    centred = z - mean[:, None]
    if BH > H:
        centred = tl.where((column < H)[None, :], centred, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / H + EPS)
    tl.store(mean_ptr + row, mean, row < rows)
    tl.store(rstd_ptr + row, rstd, row < rows)
    weight = upcast(tl.load(weight_ptr + column, column < H, 0.0))
    bias = upcast(tl.load(bias_ptr + column, column < H, 0.0))
    return centred * rstd[:, None] * weight[None, :] + bias[None, :]


@jit
def layer_norm_gradient(dy, z, weight, mean_ptr, rstd_ptr, row, rows, H: tl.constexpr):
    """Gradient of z [R, BH], and z normalised, from dy = gradient of layer_norm(z).

    dy is 0 where there is no element, weight [BH] from H on. What comes out there is to be passed
    over; it is 0 where there is no row.
    """
    rstd = tl.load(rstd_ptr + row, row < rows, 0.0)[:, None]
    normed = (z - tl.load(mean_ptr + row, row < rows, 0.0)[:, None]) * rstd
    scaled = dy * weight[None, :]
    # one reduction, in which threads wait for each other, instead of two
    along, mean = tl.split(tl.sum(tl.join(scaled * normed, scaled), 1) / H)
    return (scaled - mean[:, None] - normed * along[:, None]) * rstd, normed


@jit
def find(sorted_ptr, value, size, steps):
    """Place of each value among `size` ascending numbers, and whether it is one of them.

    Binary search; steps: the bits of `size`.
    """
    low = tl.zeros_like(value)
    high = low + size
    for _ in range(steps):
        middle = (low + high) // 2
        less = tl.load(sorted_ptr + middle, middle < size, 2147483647) < value
        low = tl.where(less, middle + 1, low)
        high = tl.where(less, high, middle)
    return low, tl.load(sorted_ptr + low, low < size, 2147483647) == value


def row_blocks(width: int) -> tuple[dict, int]:
    """Constants BH (columns, a power of two) and R (rows) of a block of whole rows, and warps."""
    columns = max(16, power_of_two(width))
    rows = max(1, ELEMENTS // columns)
    return {"H": width, "BH": columns, "R": rows}, 4 if columns <= 512 else 8


@jit
def _column_sums(x_ptr, sums_ptr, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BR, BC], x_ptr.dtype.element_ty)
    for start in range(0, rows, BR):
        row = start + tl.arange(0, BR)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(x_ptr + at, inside, 0.0)
    sums = tl.sum(total, 0).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + column, sums, column < columns)


def column_sums(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sums [...] over the first dimension of x [N, ...], always in the same order."""
    sums = x.new_empty(x.shape[1:], dtype=dtype)
    rows = min(512, power_of_two(x.shape[0]))  # of most ops all: then no load waits for another
    columns = max(16, 2 * ELEMENTS // rows)
    grid = (-(-sums.numel() // columns),)
    _column_sums[grid](x, sums, x.shape[0], sums.numel(), BR=rows, BC=columns, num_warps=8)
    return sums


def power_of_two(size: int) -> int:
    """The least power of two that is at least size."""
    return 1 << max(0, size - 1).bit_length()
