"""Products with a weight: PyTorch's, but on a CPU with AMX not for the weight's gradient.

There dyᵀ x takes the library twice as long as other products of its size. Here each thread has a
part of the result, in fp32, to which some rows of dy and x at a time, put in the order of AMX's
tiles, add their product while they are in the second cache. Threads put x in order, or dy, each for
itself, which does not pay for many. With [4096, 1024] and [4096, 256] on two cores (Xeon, torch
2.13.0) it takes a third less time than the library. F.linear in bf16 first writes the bias to every
row of the result: up to half as long as the product takes. What torch.compile uses does not.
"""

import numpy as np
import torch
import torch.nn.functional as F

from . import cpu
from .cpu import BFLOAT, HAS_AMX, intrinsic, ir, loop, numba
from .cpu_operands import SIDE, lines, turn
from .cpu_tiles import add_block, begin_tiles, end_tiles
from .dispatch import use_loops

WIDTH = 32  # rows and columns of a block, in numbers of two bytes
CHUNK = 256  # rows of dy and x at a time
TALL = 1024  # rows of the result that one panel of x is multiplied for, before the next one is
FEW = 4  # threads
ONEDNN = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _rows(builder, kind, address, step):
    """Pointers to vectors of a type, that begin the rows of a block."""
    places = (builder.add(address, builder.mul(step, step.type(row))) for row in range(WIDTH))
    return [builder.inttoptr(place, kind.as_pointer()) for place in places]


@intrinsic
def _turn_block(typing, out, out_step, x, x_step):
    """out [32, 32] = x [32, 32]ᵀ of 2 bytes each: addresses, and the bytes from row to row.

    Neighbours of a column are paired, and the pairs turned as in cpu_operands.
    """

    def generate(context, builder, signature, arguments):
        out, out_step, x, x_step = arguments
        halves, pairs = ir.VectorType(ir.IntType(16), WIDTH), ir.VectorType(ir.IntType(32), SIDE)
        rows = [builder.load(place, align=2) for place in _rows(builder, halves, x, x_step)]
        places = _rows(builder, halves, out, out_step)

        def chosen(upper, lower, order):
            mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)
            return builder.shuffle_vector(upper, lower, mask)

        for half in (0, 4):  # columns half … half + 3 of each 8: no number leaves its 16 bytes
            columns = [8 * lane + half + i for lane in range(4) for i in range(4)]
            order = [column + other for column in columns for other in (0, WIDTH)]
            words = [
                builder.bitcast(chosen(upper, lower, order), pairs)
                for upper, lower in zip(rows[::2], rows[1::2], strict=True)
            ]
            turn(words, chosen)
            for column, word in zip(columns, words, strict=True):
                builder.store(builder.bitcast(word, halves), places[column], align=2)
        return context.get_dummy_value()

    return numba.void(*[numba.int64] * 4), generate


@intrinsic
def _pair_block(typing, out, x, x_step):
    """out [16, 32] = pairs of neighbours of a column of x [32, 32], whose rows are x_step apart."""

    def generate(context, builder, signature, arguments):
        out, x, x_step = arguments
        halves, both = (ir.VectorType(ir.IntType(16), n) for n in (WIDTH, 2 * WIDTH))
        rows = [builder.load(place, align=2) for place in _rows(builder, halves, x, x_step)]
        order = [column + other for column in range(WIDTH) for other in (0, WIDTH)]
        mask = ir.Constant(ir.VectorType(ir.IntType(32), 2 * WIDTH), order)
        places = _rows(builder, both, out, out.type(4 * WIDTH))
        for upper, lower, place in zip(rows[::2], rows[1::2], places, strict=False):
            builder.store(builder.shuffle_vector(upper, lower, mask), place, align=64)
        return context.get_dummy_value()

    return numba.void(*[numba.int64] * 3), generate


@intrinsic
def _narrow_block(typing, out, out_step, x, x_step):
    """out [32, 32] in bf16 = x [32, 32] in fp32: addresses, and the bytes from row to row."""

    def generate(context, builder, signature, arguments):
        out, out_step, x, x_step = arguments
        single, half = (ir.VectorType(kind, WIDTH) for kind in (ir.FloatType(), BFLOAT))
        places = _rows(builder, half, out, out_step)
        for place, row in zip(places, _rows(builder, single, x, x_step), strict=True):
            builder.store(builder.fptrunc(builder.load(row, align=64), half), place, align=2)
        return context.get_dummy_value()

    return numba.void(*[numba.int64] * 4), generate


@loop
def _padded(x, first, depth, column, width, room):
    """x[first :, column :], or 32 rows of a copy with zeros after `depth`: address, bytes a row."""
    if depth >= WIDTH:
        return x.ctypes.data + first * x.strides[0] + 2 * column, x.strides[0]
    for i in range(WIDTH):
        for j in range(width):
            room[i, j] = x[first + i, column + j] if i < depth else np.uint16(0)
    return room.ctypes.data, room.strides[0]


@loop
def _weight_gradient_loop(part, start, stop, dy, x, shares, gradient):
    """gradient [O, I] = dyᵀ x: shares start … stop - 1 of its rows, or of its columns if more."""
    height, width = gradient.shape
    top = left = 0
    if height < width:
        left, width = width // WIDTH * start // shares, width // WIDTH * stop // shares
        left, width = WIDTH * left, WIDTH * (width - left)
    else:
        top, height = height // WIDTH * start // shares, height // WIDTH * stop // shares
        top, height = WIDTH * top, WIDTH * (height - top)
    sums = lines(height, width + 16, np.float32)
    turned, pairs = (
        lines(height, CHUNK // 2 + 16, np.uint32),
        lines(CHUNK // 2 * width, 1, np.uint32),
    )
    room = np.empty((WIDTH, max(height, width)), np.uint16)
    sums_step, turned_step, panel = sums.strides[0], turned.strides[0], 2 * CHUNK * WIDTH
    begin_tiles()
    for first in range(0, len(x), CHUNK):
        depth = min(CHUNK, len(x) - first)
        for k in range(0, depth, WIDTH):
            address, step = _padded(dy, first + k, depth - k, top, height, room)
            for o in range(0, height, WIDTH):
                place = turned.ctypes.data + o * turned_step + 2 * k
                _turn_block(place, turned_step, address + 2 * o, step)
            address, step = _padded(x, first + k, depth - k, left, width, room)
            for i in range(0, width, WIDTH):
                place = pairs.ctypes.data + i // WIDTH * panel + 2 * k * WIDTH
                _pair_block(place, address + 2 * i, step)
        steps = (depth + WIDTH - 1) // WIDTH
        for begin in range(0, height, TALL):
            for i in range(0, width, WIDTH):
                column = pairs.ctypes.data + i // WIDTH * panel
                for o in range(begin, min(begin + TALL, height), WIDTH):
                    place = sums.ctypes.data + o * sums_step + 4 * i
                    row = turned.ctypes.data + o * turned_step
                    add_block(place, sums_step, row, turned_step, column, 4 * WIDTH, steps)
    end_tiles()
    for o in range(0, height, WIDTH):
        for i in range(0, width, WIDTH):
            place = gradient.ctypes.data + (top + o) * gradient.strides[0] + 2 * (left + i)
            total = sums.ctypes.data + o * sums_step + 4 * i
            _narrow_block(place, gradient.strides[0], total, sums_step)


def _weight_gradient(dy, x):
    """dy [T, O] and x [T, I] bf16, O and I in 32s → dyᵀ x [O, I]."""
    gradient, threads = dy.new_empty(dy.shape[1], x.shape[1]), cpu.threads()
    cpu.run(_weight_gradient_loop, threads, dy.contiguous(), x.contiguous(), threads, gradient)
    return gradient


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        if bias is None:
            return F.linear(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        dx = dy @ weight if of_x else None
        return dx, _weight_gradient(dy, x) if of_weight else None, None


def _in_tiles(x, weight, bias) -> bool:
    """Whether `_Linear` takes these: it trusts the bias to be what it should."""
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if (
        not (HAS_AMX and ONEDNN and use_loops(x))
        or torch.compiler.is_compiling()
        or cpu.threads() > FEW
    ):
        return False
    plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
    alike = all(tensor.dtype == torch.bfloat16 and tensor.is_cpu for tensor in tensors)
    fits = x.dim() == 2 and not any(size % WIDTH for size in weight.shape)
    if bias is not None:
        fits = fits and bias.shape == weight.shape[:1] and bias.is_contiguous()
    return plain and alike and fits


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, I] times the transposed weight [O, I] → [T, O]. bias [O] is added; no gradient."""
    if _in_tiles(x, weight, bias):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias if bias is None else bias.detach())
