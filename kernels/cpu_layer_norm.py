"""What the CPU loops with a LayerNorm share: some rows of it, which stay in the cache."""

import numpy as np

from .cpu import loop
from .cpu_numbers import ONE, ZERO

ROWS = 8  # at a time, so that one row's sums do not wait for the other's


@loop
def centre(z, rows, means, rstd, eps):
    """z [rows, H] less each row's mean; rstd [rows] becomes 1/deviation."""
    size = z.shape[1]
    for i in range(rows):
        middle, square = means[i], ZERO
        for j in range(size):
            z[i, j] -= middle
            square += z[i, j] * z[i, j]
        rstd[i] = ONE / np.sqrt(square / np.float32(size) + eps)


@loop
def project(z, slopes, rows, means, rstd, weight, totals, alongs):
    """First half of the gradient of z [rows, H], from slopes = gradient of LayerNorm(z).

    z becomes z normalised, totals and alongs [rows] the means of slopes · weight and of that · z:
    the gradient is (slopes · weight - total - z · along) · rstd. (Sums over the rows are the
    caller's: with its arrays in here, too, LLVM makes no vector code.)
    """
    size = z.shape[1]
    for i in range(rows):
        total, along = ZERO, ZERO
        middle, deviation = means[i], rstd[i]
        for j in range(size):
            z[i, j] = (z[i, j] - middle) * deviation
            total += slopes[i, j] * weight[j]
            along += slopes[i, j] * weight[j] * z[i, j]
        totals[i], alongs[i] = total / np.float32(size), along / np.float32(size)
