"""Gradient of a table of embeddings from those of the rows taken from it.

Rows are added in fp32, in the order that a stable sort of their indices gives: the same bits every
time, where scattered additions race. A program takes 64 sorted places, whatever their indices, and
sums runs of equal ones by a product with zeros and ones: [MASK] alone has a run of thousands of
rows, some 45 µs (an estimate) for one program to walk through in a micro-batch of 16 384 tokens.
"""

import numpy as np
import torch

from . import cpu
from .cpu import loop
from .cpu_numbers import flush, narrow
from .dispatch import use_triton
from .language import jit, power_of_two, tl

RUN = 64  # sorted places of a program


@jit
def _run_sums(
    dz_ptr, sorted_ptr, order_ptr, d_table_ptr, pieces_ptr, rows, tokens,
    H: tl.constexpr, BC: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Sums of each run of one index among N sorted places: gradients, or pieces of longer runs.

    dz has `tokens` rows, once or twice over. A piece goes to row 0 of the program's own two if its
    run began before, else to row 1.
    """
    place = tl.program_id(0) * N + tl.arange(0, N)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    index = tl.load(sorted_ptr + place, place < rows, -1)
    row = tl.load(order_ptr + place, place < rows, 0)
    row = tl.where(row < tokens, row, row - tokens)
    inside = (place < rows)[:, None] & (column < H)[None, :]
    dz = tl.load(dz_ptr + row[:, None] * H + column[None, :], inside, 0.0)
    same = tl.where(index[:, None] == index[None, :], 1.0, 0.0).to(dz.dtype)
    ACC: tl.constexpr = pieces_ptr.dtype.element_ty
    sums = tl.dot(same, dz, input_precision="ieee", out_dtype=ACC)

    before = tl.load(sorted_ptr + place - 1, (place > 0) & (place < rows), -1)
    first = tl.program_id(0) * N
    begun = tl.load(sorted_ptr + first - 1, first > 0, -1) == index
    goes_on = tl.load(sorted_ptr + first + N, first + N < rows, -1) == index
    whole = (index != before) & ~goes_on
    at = index.to(tl.int64)[:, None] * H + column[None, :]
    tl.store(d_table_ptr + at, sums.to(d_table_ptr.dtype.element_ty), inside & whole[:, None])
    piece = ((place == first) & begun) | ((index != before) & goes_on)
    at = (2 * tl.program_id(0) + tl.where(begun, 0, 1))[:, None] * H + column[None, :]
    tl.store(pieces_ptr + at, sums, inside & piece[:, None])


@jit
def _join_pieces(
    pieces_ptr, sorted_ptr, d_table_ptr, rows, H: tl.constexpr, BC: tl.constexpr, N: tl.constexpr
):
    """Gradient of the index whose run begins in a program of `_run_sums` and leaves it, if any."""
    block = tl.program_id(0)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    index = tl.load(sorted_ptr + (block + 1) * N)
    begun = tl.load(sorted_ptr + block * N - 1, block > 0, -1) == index
    if (tl.load(sorted_ptr + (block + 1) * N - 1) == index) & (not begun):
        total = tl.load(pieces_ptr + (2 * block + 1) * H + column, column < H, 0.0)
        block += 1
        while tl.load(sorted_ptr + block * N, block * N < rows, -1) == index:
            more = block + tl.arange(0, 32)
            mine = tl.load(sorted_ptr + more * N, more * N < rows, -1) == index
            at = 2 * more[:, None] * H + column[None, :]
            total += tl.sum(tl.load(pieces_ptr + at, mine[:, None] & (column < H)[None, :], 0.0), 0)
            block += 32
        at = index.to(tl.int64) * H + column
        tl.store(d_table_ptr + at, total.to(d_table_ptr.dtype.element_ty), column < H)


@loop
def _sum_runs_loop(part, start, stop, dz, ordered, order, d_table):
    """Gradients of the indices whose runs begin at sorted places start … stop - 1.

    As `_run_sums`, which has the dz of each place.
    """
    rows, size = dz.shape
    few, many = np.zeros(size, np.float32), np.zeros(size, np.float64)
    place = start
    while place < stop:
        index, begin = ordered[place], place
        if begin and ordered[begin - 1] == index:
            place += 1
            continue
        while place < len(ordered) and ordered[place] == index:
            row = order[place] if order[place] < rows else order[place] - rows
            for j in range(size):
                few[j] += dz[row, j]
            place += 1
            if (place - begin) % 64 == 0:
                flush(few, many)
        flush(few, many)
        for j in range(size):
            d_table[index, j] = narrow(np.float32(many[j]), d_table)
            many[j] = 0


def embedding_gradient(
    dz: torch.Tensor, indices: torch.Tensor, size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Gradient of a table [size, E] from dz [T, E], that of the sums of its rows.

    indices int32: of the rows, [T] or, of two rows each, [2 T].
    """
    d_table = dz.new_zeros(size, dz.shape[1], dtype=dtype)
    if not use_triton(dz):
        found = cpu.array(indices)
        found = found.astype(np.uint16) if size <= 2**16 else found  # sorted by digits
        order = found.argsort(kind="stable")
        cpu.run(_sum_runs_loop, len(found), dz, found[order], order, d_table)
        return d_table
    narrow = indices.short() if size <= 2**15 else indices  # sorted in half the passes
    ordered, order = torch.sort(narrow, stable=True)
    rows, width = len(indices), dz.shape[1]
    columns = min(128 // dz.element_size(), max(16, power_of_two(width)))  # 128 bytes: a line
    constants = {"H": width, "BC": columns, "N": RUN}
    blocks, parts = -(-rows // RUN), -(-width // columns)
    statistics = torch.promote_types(dz.dtype, torch.float32)
    pieces = dz.new_empty(blocks, 2, width, dtype=statistics)
    _run_sums[(blocks, parts)](dz, ordered, order, d_table, pieces, rows, len(dz), **constants)
    if blocks > 1:
        _join_pieces[(blocks - 1, parts)](pieces, ordered, d_table, rows, **constants)
    return d_table
