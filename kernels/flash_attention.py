"""Attention within packed sequences on GPUs: FlashAttention's algorithm, with a dropout of its own.

Scores are computed block by block and never kept: forward leaves the log-sum-exp of each row, from
which backward has the probabilities again (Dao et al. 2022). Queries, keys and values are read
where one product left them, their gradients are written where the next one reads them, along with
the sums that are the bias' gradient. Backward takes each block of scores twice, once for the
queries' gradient and once for that of keys and values: seven products instead of five, but each
program owns what it writes. No atomics, the same bits every time, and on Ampere and Hopper no block
of probabilities leaves the registers for the shared memory.

On a GPU of Hopper's kind a block takes, by an estimate from the machine code, more time outside its
products than in them: hence the mask of `dropout_mask`, and code without comparisons for blocks
that are not cut. The cut block comes after the loop, in an `if`; for the queries' gradient it has a
loop of its own. The other way round ptxas lets each product wait for the one before, from what
Triton 3.6 gives it. Within a sequence offsets have 32 bits: enough for 2^31 / (3 heads d) rows.
"""

import torch

from . import dropout_mask
from .language import LOG2_E, column_sums, jit, power_of_two, tl, upcast


@jit
def _place(boundaries_ptr, tiles):
    """First row and length of the program's sequence, and its tile of that."""
    sequence, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first = tl.load(boundaries_ptr + sequence)
    return first, tl.load(boundaries_ptr + sequence + 1) - first, tile


@jit
def _rows(ptr, row, length, step, D: tl.constexpr, BD: tl.constexpr,
          CUT: tl.constexpr):  # fmt: skip
    """Rows row [·] of a head [·, BD]; zeros beyond `length`, which only what is CUT may reach."""
    d = tl.arange(0, BD)
    at = row[:, None] * step + d[None, :]
    if CUT:
        return tl.load(ptr + at, (row < length)[:, None] & (d < D)[None, :], 0.0)
    if BD == D:
        return tl.load(ptr + at)
    return tl.load(ptr + at, (d < D)[None, :], 0.0)


@jit
def _write(ptr, sums_ptr, x, row, length, step, D: tl.constexpr, BD: tl.constexpr):
    """Gradients x [·, BD] of rows row [·] of a head to their place; their sum over the rows."""
    d = tl.arange(0, BD)
    inside = (row < length)[:, None] & (d < D)[None, :]
    x = tl.where(inside, x, 0.0)
    tl.store(ptr + row[:, None] * step + d[None, :], x.to(ptr.dtype.element_ty), inside)
    tl.store(sums_ptr + d, tl.sum(x, 0), d < D)


@jit
def _product(a, b, ACC: tl.constexpr):
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@jit
def _counter(start, place, step):
    """Part of a counter that comes from queries or keys start + place [·], less bit 3 of place.

    Written so that compilers see which are equal, and compute these once.
    """
    return ((place & 7) + (start + (place & -16))).to(tl.uint32) * step


@jit
def _kept(counter, query, key, first_key, second_key, THRESHOLD: tl.constexpr):
    """Which probabilities stay.

    Four have one counter, those whose query and key differ in bit 3 only, which one thread holds in
    either orientation of the scores. counter, query, key: of shapes that broadcast to theirs.
    """
    return dropout_mask.numbers(counter, query & 8, key & 8, first_key, second_key) >= THRESHOLD


@jit
def _one_more_block(
    q, query, top, total, out, qkv_ptr, start, length, width, nothing, counter, first_key,
    second_key, D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    FACTOR: tl.constexpr, THRESHOLD: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Maximum, sum of exponentials and weighted values of queries, after BK more keys."""
    key = start + tl.arange(0, BK)
    k = _rows(qkv_ptr + width, key, length, 3 * width, D, BD, CUT)
    v = _rows(qkv_ptr + 2 * width, key, length, 3 * width, D, BD, CUT)
    scores = _product(q, tl.trans(k), out.dtype)
    if CUT:
        scores = tl.where((key < length)[None, :], scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * FACTOR)
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    p = tl.exp2(scores * FACTOR - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(p, 1)
    if THRESHOLD:
        place = tl.arange(0, BK)
        counters = counter[:, None] + _counter(start, place, dropout_mask.GOLDEN)[None, :]
        kept = _kept(counters, query[:, None], place[None, :], first_key, second_key, THRESHOLD)
        p = tl.where(kept, p, nothing)
    out = out * shrink[:, None]
    out = tl.dot(p.to(v.dtype), v, out, input_precision="ieee", out_dtype=out.dtype)
    return higher, total, out


@jit
def _forward(
    qkv_ptr, boundaries_ptr, seed_ptr, out_ptr, lse_ptr, rows, width, tiles, stride,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """BQ queries of a head: their output and log-sum-exp."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    first, length, tile = _place(boundaries_ptr, tiles)
    if tile * BQ >= length:
        return
    head = tl.program_id(1)
    # 0, which the compiler does not know: else it selects between 16-bit numbers, one by one
    nothing = tl.minimum(first, 0).to(ACC)
    qkv_ptr += first.to(tl.int64) * (3 * width) + head * D
    out_ptr += first.to(tl.int64) * width + head * D
    place = tl.arange(0, BQ)
    query = tile * BQ + place
    q = _rows(qkv_ptr, query, length, 3 * width, D, BD, True)
    counters_start, first_key, second_key = dropout_mask.keys(seed_ptr, head)
    step = stride.to(tl.uint32) * dropout_mask.GOLDEN
    counter = _counter(first + tile * BQ, place, step) + counters_start
    top = tl.full([BQ], -float("inf"), ACC)
    total = tl.zeros([BQ], ACC)
    out = tl.zeros([BQ, BD], ACC)
    whole = length // BK * BK
    for start in range(0, whole, BK):
        top, total, out = _one_more_block(
            q, place, top, total, out, qkv_ptr, start, length, width, nothing,
            counter, first_key, second_key, D, BD, BK, FACTOR, THRESHOLD, False,
        )  # fmt: skip
    if whole < length:
        top, total, out = _one_more_block(
            q, place, top, total, out, qkv_ptr, whole, length, width, nothing,
            counter, first_key, second_key, D, BD, BK, FACTOR, THRESHOLD, True,
        )  # fmt: skip
    d = tl.arange(0, BD)
    inside = (query < length)[:, None] & (d < D)[None, :]
    out = (out * (SCALE / total)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + query[:, None] * width + d[None, :], out, inside)
    tl.store(lse_ptr + head * rows + first + query, top + tl.log2(total), query < length)


@jit
def _slope_of_queries(
    q, d_out, query, lse, delta, dq, qkv_ptr, start, length, width, nothing, counter, first_key,
    second_key, D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    FACTOR: tl.constexpr, THRESHOLD: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Gradient of queries, not yet multiplied by ROOT, after BK more keys."""
    key = start + tl.arange(0, BK)
    k = _rows(qkv_ptr + width, key, length, 3 * width, D, BD, CUT)
    v = _rows(qkv_ptr + 2 * width, key, length, 3 * width, D, BD, CUT)
    p = tl.exp2(_product(q, tl.trans(k), dq.dtype) * FACTOR - lse[:, None])
    if CUT:
        p = tl.where((key < length)[None, :], p, 0.0)
    dp = _product(d_out, tl.trans(v), dq.dtype)
    if THRESHOLD:
        place = tl.arange(0, BK)
        counters = counter[:, None] + _counter(start, place, dropout_mask.GOLDEN)[None, :]
        kept = _kept(counters, query[:, None], place[None, :], first_key, second_key, THRESHOLD)
        dp = tl.where(kept, dp, nothing)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision="ieee", out_dtype=dq.dtype)


@jit
def _backward_of_queries(
    d_out_ptr, qkv_ptr, boundaries_ptr, seed_ptr, out_ptr, lse_ptr, delta_ptr, d_qkv_ptr, sums_ptr,
    rows, width, tiles, stride,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, ROOT: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Gradient of BQ queries of a head; leaves each row's d_out · out / SCALE in memory."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    first, length, tile = _place(boundaries_ptr, tiles)
    head = tl.program_id(1)
    sums_ptr += tl.program_id(0).to(tl.int64) * (3 * width) + head * D
    if tile * BQ >= length:
        tl.store(sums_ptr + tl.arange(0, BD), tl.zeros([BD], ACC), tl.arange(0, BD) < D)
        return
    nothing = tl.minimum(first, 0).to(ACC)  # as in _forward
    qkv_ptr += first.to(tl.int64) * (3 * width) + head * D
    d_qkv_ptr += first.to(tl.int64) * (3 * width) + head * D
    d_out_ptr += first.to(tl.int64) * width + head * D
    out_ptr += first.to(tl.int64) * width + head * D
    place = tl.arange(0, BQ)
    query = tile * BQ + place
    q = _rows(qkv_ptr, query, length, 3 * width, D, BD, True)
    d_out = _rows(d_out_ptr, query, length, width, D, BD, True)
    out = _rows(out_ptr, query, length, width, D, BD, True)
    delta = tl.sum(upcast(d_out) * upcast(out), 1) / SCALE
    at = head * rows + first + query
    tl.store(delta_ptr + at, delta, query < length)
    lse = tl.load(lse_ptr + at, query < length, 0.0)
    counters_start, first_key, second_key = dropout_mask.keys(seed_ptr, head)
    step = stride.to(tl.uint32) * dropout_mask.GOLDEN
    counter = _counter(first + tile * BQ, place, step) + counters_start
    dq = tl.zeros([BQ, BD], ACC)
    whole = length // BK * BK
    for cut in tl.static_range(2):  # whole blocks, then what is left
        for start in range(cut * whole, length if cut else whole, BK):
            dq = _slope_of_queries(
                q, d_out, place, lse, delta, dq, qkv_ptr, start, length, width, nothing,
                counter, first_key, second_key, D, BD, BK, FACTOR, THRESHOLD, cut,
            )  # fmt: skip
    _write(d_qkv_ptr, sums_ptr, dq * ROOT, query, length, 3 * width, D, BD)


@jit
def _slopes_of_keys(
    k, v, key, counter, dk, dv, q_ptr, d_out_ptr, lse_ptr, delta_ptr, start, first, length, width,
    step, nothing, first_key, second_key, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr,
    FACTOR: tl.constexpr, THRESHOLD: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, not yet multiplied by ROOT, and values, nor these by SCALE, after BQ more
    queries.

    Scores are [keys, queries] here: the products take them so.
    """
    query = start + tl.arange(0, BQ)
    q = _rows(q_ptr, query, length, 3 * width, D, BD, CUT)
    d_out = _rows(d_out_ptr, query, length, width, D, BD, CUT)
    if CUT:  # where there is no query, q and d_out are 0, and so is all that follows
        lse = tl.load(lse_ptr + query, query < length, 0.0)
        delta = tl.load(delta_ptr + query, query < length, 0.0)
    else:
        lse, delta = tl.load(lse_ptr + query), tl.load(delta_ptr + query)
    p = tl.exp2(_product(k, tl.trans(q), dk.dtype) * FACTOR - lse[None, :])
    dp = _product(v, tl.trans(d_out), dk.dtype)
    weights = p
    if THRESHOLD:
        place = tl.arange(0, BQ)
        counters = counter[:, None] + _counter(first + start, place, step)[None, :]
        kept = _kept(counters, place[None, :], key[:, None], first_key, second_key, THRESHOLD)
        weights = tl.where(kept, p, nothing)
    dv = tl.dot(weights.to(q.dtype), d_out, dv, input_precision="ieee", out_dtype=dk.dtype)
    ds = (weights * dp - p * delta[None, :]).to(q.dtype)
    return tl.dot(ds, q, dk, input_precision="ieee", out_dtype=dk.dtype), dv


@jit
def _backward_of_keys(
    d_out_ptr, qkv_ptr, boundaries_ptr, seed_ptr, lse_ptr, delta_ptr, d_qkv_ptr, sums_ptr,
    rows, width, tiles, stride,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, ROOT: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Gradients of BK keys and values of a head."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    first, length, tile = _place(boundaries_ptr, tiles)
    head = tl.program_id(1)
    sums_ptr += tl.program_id(0).to(tl.int64) * (3 * width) + head * D
    if tile * BK >= length:
        d = tl.arange(0, BD)
        tl.store(sums_ptr + width + d, tl.zeros([BD], ACC), d < D)
        tl.store(sums_ptr + 2 * width + d, tl.zeros([BD], ACC), d < D)
        return
    nothing = tl.minimum(first, 0).to(ACC)  # as in _forward
    qkv_ptr += first.to(tl.int64) * (3 * width) + head * D
    d_qkv_ptr += first.to(tl.int64) * (3 * width) + head * D
    d_out_ptr += first.to(tl.int64) * width + head * D
    lse_ptr += head * rows + first
    delta_ptr += head * rows + first
    place = tl.arange(0, BK)
    key = tile * BK + place
    k = _rows(qkv_ptr + width, key, length, 3 * width, D, BD, True)
    v = _rows(qkv_ptr + 2 * width, key, length, 3 * width, D, BD, True)
    counters_start, first_key, second_key = dropout_mask.keys(seed_ptr, head)
    counter = _counter(tile * BK, place, dropout_mask.GOLDEN) + counters_start
    step = stride.to(tl.uint32) * dropout_mask.GOLDEN
    dk = tl.zeros([BK, BD], ACC)
    dv = tl.zeros([BK, BD], ACC)
    whole = length // BQ * BQ
    for start in range(0, whole, BQ):
        dk, dv = _slopes_of_keys(
            k, v, place, counter, dk, dv, qkv_ptr, d_out_ptr, lse_ptr, delta_ptr, start, first,
            length, width, step, nothing, first_key, second_key,
            D, BD, BQ, FACTOR, THRESHOLD, False,
        )  # fmt: skip
    if whole < length:
        dk, dv = _slopes_of_keys(
            k, v, place, counter, dk, dv, qkv_ptr, d_out_ptr, lse_ptr, delta_ptr, whole, first,
            length, width, step, nothing, first_key, second_key,
            D, BD, BQ, FACTOR, THRESHOLD, True,
        )  # fmt: skip
    _write(d_qkv_ptr + width, sums_ptr + width, dk * ROOT, key, length, 3 * width, D, BD)
    _write(d_qkv_ptr + 2 * width, sums_ptr + 2 * width, dv * SCALE, key, length, 3 * width, D, BD)


def stride(longest: int) -> int:
    """Counters of the mask for a row, of sequences of up to `longest` keys."""
    return max(16, power_of_two(longest))


def _cut(qkv, boundaries, longest: int) -> tuple[int, tuple, tuple]:
    """Rows of a program's tile, the grid, and sizes."""
    rows, _, heads, size = qkv.shape
    tile = min(32 if qkv.element_size() > 2 else 64, max(16, power_of_two(longest)))
    tiles = -(-longest // tile)
    sizes = rows, heads * size, tiles, stride(longest)
    return tile, ((len(boundaries) - 1) * tiles, heads), sizes


def _constants(qkv: torch.Tensor, p: float) -> dict:
    size = qkv.shape[3]
    return {
        "D": size, "BD": max(16, power_of_two(size)), "FACTOR": LOG2_E.value * size**-0.5,
        "SCALE": dropout_mask.scale(p), "THRESHOLD": dropout_mask.threshold(p),
    }  # fmt: skip


def forward(qkv, boundaries, longest: int, p: float, seed, out, lse) -> None:
    """Fill out [T, heads, d] and lse [heads, T], base 2, of qkv [T, 3, heads, d]."""
    tile, grid, sizes = _cut(qkv, boundaries, longest)
    _forward[grid](
        qkv, boundaries, seed, out, lse, *sizes,
        BQ=tile, BK=tile, **_constants(qkv, p), num_warps=4, num_stages=3,
    )  # fmt: skip


def backward(d_out, qkv, boundaries, longest: int, p: float, seed, out, lse):
    """→ gradients of qkv [T, 3, heads, d] and bias [3·heads·d]."""
    d_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    tile, grid, sizes = _cut(qkv, boundaries, longest)
    sums = lse.new_empty(grid[0], qkv.shape[1:].numel())
    constants = _constants(qkv, p)
    constants["ROOT"] = constants["SCALE"] * qkv.shape[3] ** -0.5
    _backward_of_queries[grid](
        d_out, qkv, boundaries, seed, out, lse, delta, d_qkv, sums, *sizes,
        BQ=tile, BK=min(tile, 32), **constants, num_warps=4, num_stages=3,
    )  # fmt: skip
    _backward_of_keys[grid](
        d_out, qkv, boundaries, seed, lse, delta, d_qkv, sums, *sizes,
        BQ=min(tile, 32), BK=tile, **constants, num_warps=4, num_stages=3,
    )  # fmt: skip
    return d_qkv, column_sums(sums, qkv.dtype)
