"""Small matrix products inside compiled CPU loops, on operands that stay in the cache.

fp32 operands are multiplied number by number. bf16 on a CPU with avx512_bf16 is multiplied in
pairs: one instruction adds both products to an fp32 sum, which is twice as fast. An operand in
pairs is uint32, each two neighbours of a row (`along`) or of a column (`down`); of an odd number
the last is paired with 0. A product takes a left operand `along` and a right one `down`, both in
the order of the dimension that it adds over; a left one that is `down` is used transposed. On a CPU
with AMX pairs are multiplied in its tiles, 16 by 16 pairs by 16 at once.

Operands and results have room for rows and columns in 32s: what is beyond those asked for means
nothing, but what a product adds over is followed by zeros. A line more a row keeps rows that are
worked on together from the same places of the cache.
"""

import numpy as np

from .cpu import (
    BFLOAT,
    HAS_AMX,
    HAS_BF16,
    OPTIONS,
    intrinsic,
    ir,
    loop,
    numba,
    overload,
    widen,
)
from .cpu_tiles import add_block, begin_tiles, end_tiles, set_block

TILE = 4, 32  # rows and columns of a product that stay in registers
SIDE = 16  # of a square of numbers that is transposed in registers
LINE = 64  # bytes of a cache's line
FETCH = "llvm.prefetch.p0i8"
DOT = "llvm.x86.avx512bf16.dpbf16ps.512"


def _in_pairs(kind) -> bool:
    """Whether an array of this numba type is an operand in pairs, or makes one."""
    return kind.dtype == numba.uint32 or (HAS_BF16 and kind.dtype == numba.uint16)


def operand(like, rows, columns):
    """Room for rows and columns of an array like `like`, fp32 or bf16; zeros."""
    raise TypeError("a function of compiled loops")


@overload(operand, jit_options=OPTIONS)
def _(like, rows, columns):
    kind = np.uint32 if _in_pairs(like) else np.float32
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
        return pairs if _in_pairs(operand) else numbers

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
def _transpose_tile(typing, out, out_step, x, x_step):
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
        _transpose_tile(out, 4 * operand.shape[1], part.ctypes.data + 4 * j, part.strides[0])
    return done


@intrinsic
def _ask(typing, address):
    """Have the memory at an address brought to the second cache."""

    def generate(context, builder, signature, arguments):
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, *[ir.IntType(32)] * 3])
        function = builder.module.globals.get(FETCH) or ir.Function(builder.module, kind, FETCH)
        reading, second, data = (ir.IntType(32)(value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], byte), reading, second, data])
        return context.get_dummy_value()

    return numba.void(numba.int64), generate


@loop
def fetch(x, rows, columns, first, column):
    """Have a part of x brought to the cache, while other work goes on."""
    for i in range(first, first + rows):
        start = x.ctypes.data + x.itemsize * (i * x.shape[1] + column)
        for offset in range(0, columns * x.itemsize, LINE):
            _ask(start + offset)


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
    if _in_pairs(operand):
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


@intrinsic
def _add_tile(typing, kind, out, out_step, c, c_row, c_step, x, x_step, depth):
    """out [4, 32] += c [4, depth] @ x [depth, 32]: addresses, and the bytes from row to row.

    kind: an operand, for its type. c_row, c_step: from row to row and from column to column of c.
    Written in LLVM's language: from a loop in numba's it makes a third of the speed, because the
    sums go through memory.
    """
    pairs = _in_pairs(kind)

    def generate(context, builder, signature, arguments):
        _, out, out_step, c, c_row, c_step, x, x_step, depth = arguments
        integer, vector = out.type, ir.VectorType(ir.FloatType(), 16)
        number = ir.IntType(32) if pairs else ir.FloatType()
        numbers = ir.VectorType(number, 16)
        first_lane = ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16)
        vectors = TILE[1] // 16

        def multiply_add(total, a, b):
            if not pairs:
                product = builder.fmul(a, b, flags=("contract",))
                return builder.fadd(total, product, flags=("contract",))
            halves = ir.VectorType(BFLOAT, 32)
            function = builder.module.globals.get(DOT) or ir.Function(
                builder.module, ir.FunctionType(vector, [vector, halves, halves]), DOT
            )
            operands = (builder.bitcast(value, halves) for value in (a, b))
            return builder.call(function, [total, *operands])

        def pointer(kind, address, *steps):
            for step, count in steps:
                address = builder.add(address, builder.mul(step, count))
            return builder.inttoptr(address, kind.as_pointer())

        places = [
            pointer(vector, out, (out_step, integer(row)), (integer(64), integer(v)))
            for row in range(TILE[0])
            for v in range(vectors)
        ]
        starts = [builder.load(place, align=4) for place in places]
        before = builder.block
        body, after = (builder.append_basic_block(name) for name in ("products", "stores"))
        builder.cbranch(builder.icmp_signed(">", depth, integer(0)), body, after)
        builder.position_at_end(body)
        k = builder.phi(integer)
        k.add_incoming(integer(0), before)
        sums = [builder.phi(vector) for _ in starts]
        parts = [
            builder.load(pointer(numbers, x, (x_step, k), (integer(64), integer(v))), align=4)
            for v in range(vectors)
        ]
        ends = []
        for row in range(TILE[0]):
            factor = builder.load(pointer(number, c, (c_row, integer(row)), (c_step, k)), align=4)
            lanes = builder.insert_element(numbers(ir.Undefined), factor, ir.IntType(32)(0))
            lanes = builder.shuffle_vector(lanes, lanes, first_lane)
            for part in parts:
                ends.append(multiply_add(sums[len(ends)], lanes, part))
        following = builder.add(k, integer(1))
        k.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, depth), body, after)
        builder.position_at_end(after)
        results = [builder.phi(vector) for _ in starts]
        for start, end, total, result in zip(starts, ends, sums, results, strict=True):
            for phi in (total, result):
                phi.add_incoming(start, before)
                phi.add_incoming(end, body)
        for place, result in zip(places, results, strict=True):
            builder.store(result, place, align=4)
        return context.get_dummy_value()

    return numba.void(kind, *[numba.int64] * 8), generate


def add_product(out, c, first, transposed, x, x_first, rows, depth, columns):
    """out[:rows, :columns] += c[first : first + rows, :depth] @ x[x_first : x_first + depth].

    transposed: c[first : first + depth, :rows]ᵀ instead, where c is `down`. out is fp32; x_first is
    even. depth: at least 1; all that there is from there on, or a multiple of 32.
    """
    raise TypeError("a function of compiled loops")


def set_product(out, c, first, transposed, x, x_first, rows, depth, columns):
    """`add_product` to zeros."""
    raise TypeError("a function of compiled loops")


@overload(add_product, jit_options=OPTIONS)
def _(out, c, first, transposed, x, x_first, rows, depth, columns):
    return _add_in_tiles if HAS_AMX and _in_pairs(c) else _add_in_vectors


@overload(set_product, jit_options=OPTIONS)
def _(out, c, first, transposed, x, x_first, rows, depth, columns):
    return _set_in_tiles if HAS_AMX and _in_pairs(c) else _set_in_vectors


def _in_tiles(do_block):
    """A product block by block, by the function of a block that adds to what is there, or not."""

    def multiply(out, c, first, transposed, x, x_first, rows, depth, columns):
        steps = (depth + 31) // 32
        c_step, x_step, out_step = 4 * c.shape[1], 4 * x.shape[1], 4 * out.shape[1]
        c_address = c.ctypes.data + (_depth(c, first) if transposed else first) * c_step
        x_address = x.ctypes.data + _depth(x, x_first) * x_step
        turned = lines(32, 16 * steps if transposed else 1, np.uint32)
        turned_step = 4 * turned.shape[1]
        begin_tiles()
        for i in range(0, rows, 32):
            left, left_step = c_address + i * c_step, c_step
            if transposed:
                left, left_step = turned.ctypes.data, turned_step
                for k in range(0, 16 * steps, 16):
                    for row in range(0, 32, 16):
                        place = left + row * turned_step + 4 * k
                        block = c_address + k * c_step + 4 * (i + row)
                        _transpose_tile(place, turned_step, block, c_step)
            for j in range(0, columns, 32):
                total = out.ctypes.data + i * out_step + 4 * j
                do_block(total, out_step, left, left_step, x_address + 4 * j, x_step, steps)
        end_tiles()

    return multiply


_add_in_tiles, _set_in_tiles = _in_tiles(add_block), _in_tiles(set_block)


def _add_in_vectors(out, c, first, transposed, x, x_first, rows, depth, columns):
    item, width = c.itemsize, c.shape[1] * c.itemsize
    c_row, c_step = (item, width) if transposed else (width, item)
    c_address = c.ctypes.data + (_depth(c, first) if transposed else first) * width
    x_address = x.ctypes.data + _depth(x, x_first) * x.shape[1] * item
    for j in range(0, columns, TILE[1]):
        for i in range(0, rows, TILE[0]):
            _add_tile(
                c, out.ctypes.data + (i * out.shape[1] + j) * item, out.shape[1] * item,
                c_address + i * c_row, c_row, c_step,
                x_address + j * item, x.shape[1] * item, _depth(x, depth),
            )  # fmt: skip


def _set_in_vectors(out, c, first, transposed, x, x_first, rows, depth, columns):
    for i in range(rows):
        clear(out[i], 0, columns)
    add_product(out, c, first, transposed, x, x_first, rows, depth, columns)


def _depth(operand, size):
    """How many numbers, or pairs of them, that are."""
    raise TypeError("a function of compiled loops")


@overload(_depth, jit_options=OPTIONS)
def _(operand, size):
    if _in_pairs(operand):
        return lambda operand, size: (size + 1) // 2
    return lambda operand, size: size
