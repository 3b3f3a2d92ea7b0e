"""GELU for the CPU loops: in fp32 by the density of the normal distribution, as on a GPU.

For numbers of 16 bits polynomials do, which take half of the instructions. They are in
v = 2 (x / limit)² - 1, for (f(x) - ½) / x at Chebyshev's points, times what makes them 0 or 1 at
the limits.
"""

import numpy as np

from .cpu import OPTIONS, loop, numba, overload
from .cpu_numbers import LOG2_E, ONE, ZERO, exp2, polynomial

HALF = np.float32(0.5)

_tail = polynomial(1.330274429, -1.821255978, 1.781477937, -0.356563782, 0.319381530, 0.0)


@loop
def normal(x):
    """Φ(x) and φ(x), as in language.normal: off by less than 7.5e-8."""
    density = np.float32(0.3989422804014327) * exp2(x * x * (np.float32(-0.5) * LOG2_E))
    tail = _tail(ONE / (ONE + np.float32(0.2316419) * abs(x))) * density
    return (ONE - tail if x > ZERO else tail), density


_distribution = polynomial(
    6.5392248e-04, -1.6450026e-03, 1.6053356e-03, -2.6080461e-03, 6.5228484e-03, -1.1232322e-02,
    1.6353862e-02, -2.3242995e-02, 3.1451265e-02, -4.0446489e-02, 5.1519936e-02, -7.0296134e-02,
    1.4136382e-01,
)  # fmt: skip
_slope = polynomial(
    -1.0866856e-02, 2.4441424e-02, -1.1520885e-02, 8.8084683e-03, -4.8065690e-02, 7.4279343e-02,
    -7.1485262e-02, 7.3741963e-02, -7.7546042e-02, 7.0992983e-02, -6.1914318e-02, 5.9229466e-02,
    -6.9922123e-02, 1.3506562e-01,
)  # fmt: skip


@loop
def _within(x, limit):
    """x from -limit on, x within both limits, and what the polynomials take; NaN stays."""
    x = -limit if x < -limit else x
    inside = limit if x > limit else x
    return x, inside, inside * inside * (np.float32(2) / (limit * limit)) - ONE


def gelu(x, like):
    """x · Φ(x). For numbers of 16 bits, as in the array `like`, Φ is off by up to 5e-7.

    That is more than rounding only where gelu is less than 2e-4 from 0, below x = -4.
    """
    raise TypeError("a function of compiled loops")


@overload(gelu, jit_options=OPTIONS)
def _(x, like):
    def short(x, like):
        x, inside, place = _within(x, np.float32(5))
        return x * (inside * _distribution(place) + HALF)

    def exact(x, like):
        return x * normal(x)[0]

    return exact if isinstance(like.dtype, numba.types.Float) else short


def slope(x, like):
    """Φ(x) + x · φ(x), the derivative of gelu; for numbers of 16 bits off by up to 3e-6."""
    raise TypeError("a function of compiled loops")


@overload(slope, jit_options=OPTIONS)
def _(x, like):
    def exact(x, like):
        distribution, density = normal(x)
        return distribution + x * density

    def short(x, like):
        _, inside, place = _within(x, np.float32(5.25))
        return inside * _slope(place) + HALF

    return exact if isinstance(like.dtype, numba.types.Float) else short
