"""How the operands of products in the CPU loops lie in memory.

bf16 on a CPU with avx512_bf16 is multiplied in pairs. An operand in pairs is uint32, each two
neighbours of a row (`along`) or of a column (`down`); of an odd number the last is paired with 0.
Others are fp32. A product takes a left operand `along` and a right one `down`, both in the order of
the dimension that it adds over; a left one that is `down` is used transposed.

Operands and results have room for rows and columns in 32s: what is beyond those asked for means
nothing, but what a product adds over is followed by zeros. A line more a row keeps rows that are
worked on together from the same places of the cache.
"""

import numpy as np

from .cpu import HAS_BF16, LINE, OPTIONS, intrinsic, ir, loop, numba, overload
from .cpu_numbers import widen

SIDE = 16  # of a square of numbers that is transposed in registers


def in_pairs(kind) -> bool:
    """Whether an array of this numba type is an operand in pairs, or makes one."""
    return kind.dtype == numba.uint32 or (HAS_BF16 and kind.dtype == numba.uint16)


def operand(like, rows, columns):
    """Room for rows and columns of an array like `like`, fp32 or bf16; zeros."""
    raise TypeError("a function of compiled loops")


@overload(operand, jit_options=OPTIONS)
def _(like, rows, columns):
    kind = np.uint32 if in_pairs(like) else np.float32
    return lambda like, rows, columns: lines(
        -(-rows // 32) * 32, -(-columns // 32) * 32 + LINE // 4, kind
    )


@loop
def lines(rows, columns, kind):
    """Zeros [rows, columns] of 4 bytes each, that begin with a line of the cache.

    A tile of which each row lies in two lines takes much longer to load.
    """
    room = np.zeros(rows * columns + LINE // 4, kind)
    start = -(room.ctypes.data // 4) % (LINE // 4)
    return room[start : start + rows * columns].reshape(rows, columns)


def _of_kind(numbers, pairs):
    """The function of both that fits the kind of operand."""

    def chosen(operand, x, rows, columns, first=0, column=0):
        raise TypeError("a function of compiled loops")

    @overload(chosen, jit_options=OPTIONS)
    def _(operand, x, rows, columns, first=0, column=0):
        return pairs if in_pairs(operand) else numbers

    return chosen


@loop
def clear(row, start, stop):
    """Zeros in part of a row: to a slice, in one go, they take numba seconds to compile."""
    for j in range(start, stop):
        row[j] = 0


@loop
def _end_down(operand, rows, columns):
    """Zeros after [rows, columns] of an operand `down`, to a whole tile's."""
    for i in range((rows + 1) // 2, (rows + 31) // 32 * 16):
        clear(operand[i], 0, columns)


@loop
def _pair(low, high):
    return np.uint32(low) | (np.uint32(high) << np.uint32(16))


def turn(rows, chosen):
    """Transpose 16 vectors of 16 numbers in place; chosen(upper, lower, order) takes two apart.

    Four times numbers change places with those 8, then 4, 2 and 1 off the diagonal.
    """
    for off in (8, 4, 2, 1):
        for i in (row for row in range(SIDE) if not row & off):
            upper, lower = rows[i], rows[i + off]
            order = [j - off + SIDE if j & off else j for j in range(SIDE)]
            rows[i] = chosen(upper, lower, order)
            order = [j + SIDE if j & off else j + off for j in range(SIDE)]
            rows[i + off] = chosen(upper, lower, order)


@intrinsic
def transpose_tile(typing, out, out_step, x, x_step):
    """out [16, 16] = x [16, 16]ᵀ of 4 bytes each: addresses, and the bytes from row to row."""

    def generate(context, builder, signature, arguments):
        out, out_step, x, x_step = arguments
        vector = ir.VectorType(ir.IntType(32), SIDE)

        def place(address, step, row):
            address = builder.add(address, builder.mul(step, step.type(row)))
            return builder.inttoptr(address, vector.as_pointer())

        def chosen(upper, lower, order):
            mask = ir.Constant(ir.VectorType(ir.IntType(32), SIDE), order)
            return builder.shuffle_vector(upper, lower, mask)

        rows = [builder.load(place(x, x_step, row), align=2) for row in range(SIDE)]
        turn(rows, chosen)
        for i, row in enumerate(rows):
            builder.store(row, place(out, out_step, i), align=4)
        return context.get_dummy_value()

    return numba.void(*[numba.int64] * 4), generate


@loop
def _transpose(operand, part, words, row):
    """Rows of 4-byte words to columns of an operand from `row` on; how many words are done."""
    done = words // SIDE * SIDE if len(part) == SIDE else 0
    for j in range(0, done, SIDE):
        out = operand.ctypes.data + 4 * (j * operand.shape[1] + row)
        transpose_tile(out, 4 * operand.shape[1], part.ctypes.data + 4 * j, part.strides[0])
    return done


def _copy(operand, x, rows, columns, first=0, column=0):
    for i in range(rows):
        row = x[first + i, column : column + columns]
        for j in range(columns):
            operand[i, j] = widen(row[j])


def _copy_transposed(operand, x, rows, columns, first=0, column=0):
    for block in range(0, rows, SIDE):
        part = x[first + block : first + min(block + SIDE, rows), column : column + columns]
        done = _transpose(operand, part, columns, block) if x.itemsize == operand.itemsize else 0
        for j in range(done, columns):
            for i in range(len(part)):
                operand[j, block + i] = widen(part[i, j])


def _pair_along(operand, x, rows, columns, first=0, column=0):
    out = entries(operand)
    for i in range(rows):
        row = x[first + i, column : column + columns]
        for j in range(columns):
            out[i, j] = row[j]
    end_along(operand, rows, columns)


def _pair_along_transposed(operand, x, rows, columns, first=0, column=0):
    for block in range(0, rows, SIDE):
        part = x[first + block : first + min(block + SIDE, rows), column : column + columns]
        for j in range(_transpose(operand, part, columns // 2, block), columns // 2):
            for i in range(len(part)):
                operand[j, block + i] = _pair(part[i, 2 * j], part[i, 2 * j + 1])
        if columns % 2:
            for i in range(len(part)):
                operand[columns // 2, block + i] = part[i, columns - 1]
    _end_down(operand, columns, rows)


def _pair_down(operand, x, rows, columns, first=0, column=0):
    for i in range(rows // 2):
        low = x[first + 2 * i, column : column + columns]
        high = x[first + 2 * i + 1, column : column + columns]
        for j in range(columns):
            operand[i, j] = _pair(low[j], high[j])
    if rows % 2:
        low = x[first + rows - 1, column : column + columns]
        for j in range(columns):
            operand[rows // 2, j] = low[j]
    _end_down(operand, rows, columns)


def entries(operand):
    """The numbers of an operand `along`, in its memory."""
    raise TypeError("a function of compiled loops")


@overload(entries, jit_options=OPTIONS)
def _(operand):
    if in_pairs(operand):
        return lambda operand: operand.view(np.uint16)
    return lambda operand: operand


@loop
def end_along(operand, rows, columns):
    """Zeros after [rows, columns] of an operand `along`, to a whole tile's."""
    out = entries(operand)
    for i in range(rows):
        clear(out[i], columns, (columns + 31) // 32 * 32)


# Fill an operand with rows of x from `first` on, and columns from `column` on; x is like the array
# that the operand was made for.
take_along = _of_kind(_copy, _pair_along)
take_down = _of_kind(_copy, _pair_down)
take_transposed = _of_kind(_copy_transposed, _pair_along_transposed)  # of x; `down`


def _same(operand, x, rows, columns, first=0, column=0):
    return x


def _turned(operand, x, rows, columns, first=0, column=0):
    take_down(operand, entries(x), rows, columns, first, column)
    return operand


as_down = _of_kind(_same, _turned)  # x, `along`, as one `down`: itself, or the given one filled


def depth_of(operand, size):
    """How many numbers, or pairs of them, that are."""
    raise TypeError("a function of compiled loops")


@overload(depth_of, jit_options=OPTIONS)
def _(operand, size):
    if in_pairs(operand):
        return lambda operand, size: (size + 1) // 2
    return lambda operand, size: size
