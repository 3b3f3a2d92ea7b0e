"""The vocabulary head for wide embeddings, and on the CPU: logits of a chunk of rows at a time.

Library products make the logits and take the gradients further; between them a row that is in the
cache gives its loss, its sample and, in the logits' place, their gradient. Taking gradients in the
forward pass saves computing the logits twice; backward only scales them by the gradient of the
loss. What is held: a chunk's logits, and the table gradient in fp32, which each chunk but the first
reads and writes whole: so few chunks, of equal size, and on a GPU one as a rule.
"""

import numpy as np
import torch
import torch.nn.functional as F

from . import cpu, cpu_numbers
from .cpu import HAS_BF16, loop
from .cpu_matmul import set_product
from .cpu_numbers import INFINITY, ONE, ZERO, exp2, largest, narrow, widen
from .cpu_operands import operand, take_down
from .dispatch import fused, operation, use_triton
from .language import LEAST_SHARE, LOG2_E, NEGLIGIBLE, jit, power_of_two, tl

CHUNK = {"cuda": 5120, "cpu": 256}  # most rows: 0.3 GB of BERT's vocabulary, and a CPU's cache
TOKENS = 64  # whose rows of the table's gradient a loop computes at a time
TILE = 128  # tokens of the finer level of the cumulative distribution, on the PyTorch path


@jit
def _logits(products_ptr, bias_ptr, token, width, ACC: tl.constexpr):
    """Base-2 logits of a row."""
    z = tl.load(products_ptr + token, token < width, 0.0).to(ACC)
    return (z + tl.load(bias_ptr + token, token < width, -float("inf")).to(ACC)) * LOG2_E


@jit
def _row(
    products_ptr, bias_ptr, labels_ptr, uniforms_ptr, loss_ptr, sampled_ptr, correct_ptr,
    temperature, width, GRADIENTS: tl.constexpr, TEMPERED: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Loss, sample and hit of one row of products, which become the gradient of its logits."""
    ACC: tl.constexpr = loss_ptr.dtype.element_ty
    row = tl.program_id(0)
    products_ptr += row.to(tl.int64) * width
    label = tl.load(labels_ptr + row)
    target = tl.load(products_ptr + label, label >= 0, 0.0).to(ACC)
    target = (target + tl.load(bias_ptr + label, label >= 0, 0.0).to(ACC)) * LOG2_E

    # one maximum and sum for each place in a block: threads wait for each other but once
    tops = tl.full([BV], -float("inf"), ACC)
    totals = tl.zeros([BV], ACC)
    tempereds = tl.zeros([BV], ACC)
    for start in tl.range(0, width, BV, num_stages=3):
        token = start + tl.arange(0, BV)
        z = _logits(products_ptr, bias_ptr, token, width, ACC)
        above = tl.maximum(tops, z)
        shift = tl.where(above == -float("inf"), 0.0, above)
        totals = totals * tl.exp2(tops - shift) + tl.exp2(z - shift)
        if TEMPERED:
            old = tempereds * tl.exp2((tops - shift) / temperature)
            tempereds = old + tl.exp2((z - shift) / temperature)
        tops = above
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp2(tops - top), 0)
    lse = top + tl.log2(total)
    tl.store(loss_ptr + row, tl.where(label >= 0, (lse - target) / LOG2_E, 0.0))
    tl.store(correct_ptr + row, ((label >= 0) & (target >= top)).to(tl.float32))

    whole = tl.sum(tempereds * tl.exp2((tops - top) / temperature), 0) if TEMPERED else total
    goal = tl.load(uniforms_ptr + row) * whole
    before = tl.full([], 0.0, ACC)
    sample = width
    lasts = tl.zeros([BV], tl.int32)
    tl.debug_barrier()  # the label's product has been read before anything is written over it
    for start in range(0, width, BV):
        token = start + tl.arange(0, BV)
        z = _logits(products_ptr, bias_ptr, token, width, ACC)
        mass = tl.exp2((z - top) / temperature) if TEMPERED else tl.exp2(z - top)
        lasts = tl.where(mass > 2.0**-24, token, lasts)  # the largest mass is 1
        part = tl.sum(mass, 0)
        if (sample == width) & (before + part > goal):
            above = (before + tl.cumsum(mass, 0) > goal) & (mass > NEGLIGIBLE)
            sample = tl.min(tl.where(above, token, width), 0)
        before += part
        if GRADIENTS:
            p = tl.where(label >= 0, tl.exp2(z - lse), 0.0)
            p = tl.where(token == label, p - 1, p)
            p = p.to(products_ptr.dtype.element_ty)
            tl.store(products_ptr + token, p, token < width)
    # if rounding put the goal beyond the sum: the last token of which the sum takes notice
    tl.store(sampled_ptr + row, tl.where(sample == width, tl.max(lasts, 0), sample))


def _rows_triton(products, bias, labels, uniforms, temperature, gradients, *outputs):
    """Fill loss, sampled and correct [m] from products [m, W], which become a gradient."""
    width = products.shape[1]
    _row[(products.shape[0],)](
        products, bias, labels, uniforms, *outputs, temperature, width, GRADIENTS=gradients,
        TEMPERED=temperature != 1, BV=min(1024, power_of_two(width)), num_warps=4,
    )  # fmt: skip


@loop
def _masses(products, bias, row, factor, logits, tiles):
    """Fill logits with the masses 2^(factor · logit - top) of a row, tiles with sums of 128 each.

    Returns the largest logit and the sum of the masses.
    """
    width = products.shape[1]
    for j in range(width):
        logits[j] = (widen(products[row, j]) + widen(bias[j])) * factor
    top = largest(logits, width)
    shift = ZERO if top == -INFINITY else top
    for j in range(width):
        logits[j] = exp2(logits[j] - shift)
    total = 0.0
    for tile in range(len(tiles)):
        mass = ZERO
        for j in range(128):
            mass += logits[tile * 128 + j]
        tiles[tile] = mass
        total += mass
    return top, total


@loop
def _first_place(masses, first, last, uniform):
    """`_first_above` of the places first … last - 1."""
    whole, largest = 0.0, ZERO
    for place in range(first, last):
        whole += masses[place]
        largest = max(largest, masses[place])
    chosen, goal = first, uniform * whole
    for place in range(first, last):
        if masses[place] > LEAST_SHARE * largest:
            chosen = place
            if goal < masses[place]:
                break
            goal -= masses[place]
    return chosen, goal / masses[chosen]


@loop
def _rows_loop(part, start, stop, products, bias, labels, uniforms, loss, sampled, correct,
               temperature, gradients):  # fmt: skip
    """Of each row of products [m, W] its loss, sample and hit; the row becomes its gradient."""
    width = products.shape[1]
    tiles = np.empty(-(-width // 128), np.float32)
    masses = np.zeros(len(tiles) * 128, np.float32)
    for row in range(start, stop):
        label = labels[row]
        if temperature != ONE:
            _masses(products, bias, row, cpu_numbers.LOG2_E / temperature, masses, tiles)
            sampled[row] = _draw(masses, tiles, uniforms[row])
        top, total = _masses(products, bias, row, cpu_numbers.LOG2_E, masses, tiles)
        if temperature == ONE:
            sampled[row] = _draw(masses, tiles, uniforms[row])
        loss[row], correct[row] = ZERO, ZERO
        if label >= 0:
            target = (widen(products[row, label]) + widen(bias[label])) * cpu_numbers.LOG2_E
            loss[row] = (top + np.float32(np.log2(total)) - target) / cpu_numbers.LOG2_E
            correct[row] = np.float32(target >= top)
        if gradients:
            scale = np.float32(1 / total) if label >= 0 else ZERO
            for j in range(width):
                products[row, j] = narrow(masses[j] * scale, products)
            if label >= 0:
                products[row, label] = narrow(masses[label] * scale - ONE, products)


@loop
def _draw(masses, tiles, uniform):
    tile, left = _first_place(tiles, 0, len(tiles), np.float64(uniform))
    return _first_place(masses, tile * 128, (tile + 1) * 128, left)[0]


def _rows_cpu(products, bias, labels, uniforms, temperature, gradients, *outputs):
    """`_rows_triton` in loops on the CPU."""
    work = products, bias, labels, uniforms, *outputs, np.float32(temperature), gradients
    cpu.run(_rows_loop, products.shape[0], *work)


@loop
def _table_loop(part, start, stop, products, hidden, new, d_weight, d_bias):
    """products [m, W]ᵀ @ hidden [m, D] into d_weight[start:stop], which is new or added to."""
    rows, width = hidden.shape
    right = operand(hidden, rows, width)
    take_down(right, hidden, rows, width)
    left, total = operand(products, rows, TOKENS), operand(d_weight, TOKENS, width)
    for first in range(start, stop, TOKENS):
        tokens = min(TOKENS, stop - first)
        take_down(left, products, rows, tokens, 0, first)
        set_product(total, left, 0, True, right, 0, tokens, rows, width)
        for i in range(tokens):
            for j in range(width):
                d_weight[first + i, j] = total[i, j] + (ZERO if new else d_weight[first + i, j])
        sums = np.zeros(tokens, np.float32)
        for i in range(rows):
            row = products[i, first : first + tokens]
            for j in range(tokens):
                sums[j] += widen(row[j])
        for j in range(tokens):
            d_bias[first + j] += sums[j]


def _rows_torch(products, bias, labels, uniforms, temperature, gradients, *outputs):
    """`_rows_triton` in PyTorch."""
    loss, sampled, correct = outputs
    real = labels >= 0
    target_index = labels.clamp(min=0).long()[:, None]
    z = products.to(loss.dtype).add_(bias)
    target = z.gather(1, target_index)[:, 0]
    top = z.amax(1)
    correct.copy_((target >= top) & real)
    shifted = z.sub_(top[:, None])
    tempered = torch.exp(shifted / temperature) if temperature != 1 else None
    mass = shifted.exp_()
    total = mass.sum(1)
    loss.copy_((total.log() - (target - top)).masked_fill_(~real, 0))
    sampled.copy_(_sample(mass if tempered is None else tempered, uniforms))
    if gradients:
        mass *= (real / total)[:, None]
        mass.scatter_add_(1, target_index, -real.to(mass.dtype)[:, None])
        products.copy_(mass)


def _sample(mass, uniforms):
    """First index at which the cumulative sum of mass [m, V] exceeds uniforms · its total."""
    vocabulary = mass.shape[1]
    whole = vocabulary // TILE * TILE
    tiles = mass[:, :whole].unflatten(1, (whole // TILE, TILE)).sum(2)
    if whole < vocabulary:
        tiles = torch.cat([tiles, mass[:, whole:].sum(1, keepdim=True)], 1)
    tile, left = _first_above(tiles, uniforms[:, None])
    token = tile * TILE + torch.arange(TILE, device=mass.device)
    inside = mass.gather(1, token.clamp(max=vocabulary - 1)).masked_fill_(token >= vocabulary, 0)
    return (tile * TILE + _first_above(inside, left)[0])[:, 0]


def _first_above(mass, uniform):
    """First index at which the cumulative mass exceeds `uniform` of the whole, and what is left.

    uniform [m, 1], its place within the index's own mass, [m, 1] both. The whole is where the
    cumulative sum ends, not a sum of another order. Negligible mass is never chosen.
    """
    some = mass > LEAST_SHARE * mass.amax(1, keepdim=True)
    cumulative = mass.cumsum(1).masked_fill_(~some, 0)
    goal = uniform * cumulative.amax(1, keepdim=True)
    first = (cumulative > goal).int().argmax(1, keepdim=True)
    beyond = cumulative.gather(1, first) - goal
    return first, (1 - beyond / mass.gather(1, first)).clamp(0, 1 - 2.0**-24)


@operation("chunked_cross_entropy_sample")
def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float,
    gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ loss, sampled, correct; the gradients of hidden, weight and bias (empty if not wanted)."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    # a whole number of 128 bytes a row, which the fast products need; no mass in the padding
    padding = -vocabulary % 64
    padded_bias = F.pad(bias, (0, padding), value=-torch.inf)
    # those of GPUs need as much of the table, too
    table = F.pad(weight, (0, 0, 0, padding)) if hidden.is_cuda and padding else weight
    outputs = _outputs(hidden, table, padded_bias[: len(table)], gradients)
    _, sampled, _, d_hidden, d_weight, d_bias = outputs
    loss = d_weight.new_empty(rows)
    correct = loss.new_empty(rows, dtype=torch.float32)
    chunk = _chunk(rows, CHUNK["cuda" if hidden.is_cuda else "cpu"])
    buffer = hidden.new_empty(min(chunk, rows), vocabulary + padding)
    buffer[:, vocabulary:] = 0
    row_pass, in_pairs = _rows_torch, False
    if fused(hidden):
        in_pairs = HAS_BF16 and hidden.dtype == torch.bfloat16 and not use_triton(hidden)
        row_pass = _rows_triton if use_triton(hidden) else _rows_cpu
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        padded = buffer[: part.stop - start]
        products = padded[:, : len(table)]
        torch.mm(hidden[part], table.t(), out=products)
        row_pass(
            padded, padded_bias, labels[part], uniforms[part], temperature, gradients,
            loss[part], sampled[part], correct[part],
        )  # fmt: skip
        if gradients:
            torch.mm(products, table, out=d_hidden[part])
            if in_pairs:
                rest = padded, hidden[part], start == 0, d_weight, d_bias
                cpu.run(_table_loop, vocabulary, *rest)
                continue
            _add_product(d_weight, products.t(), hidden[part], beta=int(start > 0))
            d_bias += products.sum(0, dtype=d_bias.dtype)
    d_weight, d_bias = d_weight[:vocabulary], d_bias[:vocabulary]
    return loss.sum(), sampled, correct.sum(), d_hidden, d_weight, d_bias


def _chunk(rows: int, most: int) -> int:
    """Rows of a chunk, a multiple of 64: `rows` in as few chunks as can be, all of one size."""
    return max(64, -(-rows // max(1, -(-rows // most)) // 64) * 64)


def _add_product(total, a, b, beta):
    """total = beta · total + a @ b, total in fp32 (fp64) whatever the type of a and b."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def _outputs(hidden, weight, bias, gradients):
    """Room for what `forward` returns; zero where it only adds up, or where there are no rows."""
    statistics = torch.promote_types(hidden.dtype, torch.float32)
    shapes = (hidden.shape, weight.shape, bias.shape) if gradients else ((0,), (0,), (0,))
    return (
        hidden.new_empty((), dtype=statistics),
        hidden.new_empty(hidden.shape[0], dtype=torch.int32),
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(shapes[0]),
        (hidden.new_empty if hidden.shape[0] else hidden.new_zeros)(shapes[1], dtype=statistics),
        hidden.new_zeros(shapes[2], dtype=statistics),
    )


@forward.register_fake
def _(hidden, weight, bias, labels, uniforms, temperature, gradients):
    return _outputs(hidden, weight, bias, gradients)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[3:])
    ctx.dtypes = [tensor.dtype for tensor in inputs[:3]]


def _differentiate(ctx, d_loss):
    scaled = [
        torch.mul(gradient, d_loss, out=gradient.new_empty(gradient.shape, dtype=dtype))
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return *scaled, None, None, None, None


forward.register_autograd(_differentiate, _save)
