"""Numbers in the CPU loops: as and from fp32, by their bits, and functions of them in fp32."""

import numpy as np

from .cpu import BFLOAT, HAS_BF16, OPTIONS, intrinsic, ir, loop, numba, overload

LOG2_E = np.float32(1.4426950408889634)
ZERO, ONE = np.float32(0), np.float32(1)
INFINITY = np.float32(np.inf)


@intrinsic
def as_float(typing, bits):
    """The fp32 number of these bits (uint32)."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return numba.float32(numba.uint32), generate


@intrinsic
def as_bits(typing, number):
    """The bits (uint32) of an fp32 number."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return numba.uint32(numba.float32), generate


def widen(x):
    """An element of an array as fp32."""
    raise TypeError("a function of compiled loops")


@overload(widen, jit_options=OPTIONS)
def _(x):
    if isinstance(x, numba.types.Float):
        return lambda x: x
    return lambda x: as_float(np.uint32(x) << np.uint32(16))


@loop
def widened(vector):
    """A vector as fp32, a new one.

    Room for 64 numbers at least: vector code takes an array that begins less than its step behind
    another for one that overlaps it, and leaves the work to a loop with sums in another order.
    """
    wide = np.empty(max(64, len(vector)), np.float32)[: len(vector)]
    for i in range(len(vector)):
        wide[i] = widen(vector[i])
    return wide


def narrow(x, like):
    """fp32 as the type of the array `like`, rounded to nearest even."""
    raise TypeError("a function of compiled loops")


@overload(narrow, jit_options=OPTIONS)
def _(x, like):
    if isinstance(like.dtype, numba.types.Float):
        return lambda x, like: x
    return lambda x, like: to_bf16(x)


@intrinsic
def _truncate(typing, number):
    """fp32 to bf16 by the CPU's instruction; numbers below 2^-126 become 0."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], BFLOAT), ir.IntType(16))

    return numba.uint16(numba.float32), generate


@loop
def to_bf16(x):
    """Bits (uint16) of an fp32 number rounded to bf16."""
    if HAS_BF16:
        return _truncate(x)
    bits = as_bits(x)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16((np.uint32(0x7FC00000) if np.isnan(x) else rounded) >> np.uint32(16))


def polynomial(*coefficients):
    """A function of loops: of an fp32 number, by Horner's rule. The highest power's comes first."""

    @intrinsic
    def value(typing, x):
        def generate(context, builder, signature, arguments):
            (x,) = arguments
            total = x.type(coefficients[0])
            for coefficient in coefficients[1:]:
                total = builder.fmul(total, x, flags=("contract",))
                total = builder.fadd(total, x.type(coefficient), flags=("contract",))
            return total

        return numba.float32(numba.float32), generate

    return value


_power_of_two = polynomial(
    1.8775767e-3, 8.9893397e-3, 5.5826318e-2, 2.4015361e-1, 6.9315308e-1, 9.9999994e-1
)  # fmt: skip


@loop
def exp2(x):
    """2^x for x ≤ 0, to 2e-7; 0 below -126."""
    bounded = np.float32(-126) if x < np.float32(-126) else x
    whole = np.floor(bounded)
    power = as_float(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))
    return ZERO if x < np.float32(-126) else _power_of_two(bounded - whole) * power


@loop
def drop(x, bits, threshold, scale):
    """x · scale where the 32 random bits are ≥ threshold, else 0."""
    return x * scale if bits >= threshold else ZERO


@loop
def flush(few, many):
    """Add a sum over few rows, in fp32, to that over many, in fp64, and begin it anew."""
    for j in range(len(few)):
        many[j] += few[j]
        few[j] = ZERO


@loop
def _ordered(bits):
    """Bits of fp32 as an integer of the same order, a NaN above infinity; its own inverse."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@loop
def largest(row, length):
    """Largest of length numbers, NaN if one is."""
    top = np.int32(-0x80000000)  # compared as integers, which LLVM does in vectors
    for j in range(length):
        top = max(top, _ordered(np.int32(as_bits(row[j]))))
    return as_float(np.uint32(_ordered(top)))
