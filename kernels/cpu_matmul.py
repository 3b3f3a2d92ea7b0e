"""Small matrix products inside compiled CPU loops, on operands that stay in the cache.

fp32 operands are multiplied number by number. Of bf16 in pairs one instruction adds both products
to an fp32 sum, which is twice as fast. On a CPU with AMX pairs are multiplied in its tiles, 16 by
16 pairs by 16 at once.
"""

import numpy as np

from .cpu import BFLOAT, HAS_AMX, OPTIONS, intrinsic, ir, numba, overload
from .cpu_operands import clear, depth_of, in_pairs, lines, transpose_tile
from .cpu_tiles import add_block, begin_tiles, end_tiles, set_block

TILE = 4, 32  # rows and columns of a product that stay in registers
DOT = "llvm.x86.avx512bf16.dpbf16ps.512"


@intrinsic
def _add_tile(typing, kind, out, out_step, c, c_row, c_step, x, x_step, depth):
    """out [4, 32] += c [4, depth] @ x [depth, 32]: addresses, and the bytes from row to row.

    kind: an operand, for its type. c_row, c_step: from row to row and from column to column of c.
    Written in LLVM's language: from a loop in numba's it makes a third of the speed, because the
    sums go through memory.
    """
    pairs = in_pairs(kind)

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
    return _add_in_tiles if HAS_AMX and in_pairs(c) else _add_in_vectors


@overload(set_product, jit_options=OPTIONS)
def _(out, c, first, transposed, x, x_first, rows, depth, columns):
    return _set_in_tiles if HAS_AMX and in_pairs(c) else _set_in_vectors


def _in_tiles(do_block):
    """A product block by block, by the function of a block that adds to what is there, or not."""

    def multiply(out, c, first, transposed, x, x_first, rows, depth, columns):
        steps = (depth + 31) // 32
        c_step, x_step, out_step = 4 * c.shape[1], 4 * x.shape[1], 4 * out.shape[1]
        c_address = c.ctypes.data + (depth_of(c, first) if transposed else first) * c_step
        x_address = x.ctypes.data + depth_of(x, x_first) * x_step
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
                        transpose_tile(place, turned_step, block, c_step)
            for j in range(0, columns, 32):
                total = out.ctypes.data + i * out_step + 4 * j
                do_block(total, out_step, left, left_step, x_address + 4 * j, x_step, steps)
        end_tiles()

    return multiply


_add_in_tiles, _set_in_tiles = _in_tiles(add_block), _in_tiles(set_block)


def _add_in_vectors(out, c, first, transposed, x, x_first, rows, depth, columns):
    item, width = c.itemsize, c.shape[1] * c.itemsize
    c_row, c_step = (item, width) if transposed else (width, item)
    c_address = c.ctypes.data + (depth_of(c, first) if transposed else first) * width
    x_address = x.ctypes.data + depth_of(x, x_first) * x.shape[1] * item
    for j in range(0, columns, TILE[1]):
        for i in range(0, rows, TILE[0]):
            _add_tile(
                c, out.ctypes.data + (i * out.shape[1] + j) * item, out.shape[1] * item,
                c_address + i * c_row, c_row, c_step,
                x_address + j * item, x.shape[1] * item, depth_of(x, depth),
            )  # fmt: skip


def _set_in_vectors(out, c, first, transposed, x, x_first, rows, depth, columns):
    for i in range(rows):
        clear(out[i], 0, columns)
    add_product(out, c, first, transposed, x, x_first, rows, depth, columns)
