"""Queries, keys and values out of one product, where attention takes them apart.

Forward is three views. Backward of separate operations joins the three gradients in one tensor and
reads it again for the sum that is the bias' gradient; here one pass does both.
"""

import torch

from .dispatch import operation, use_triton
from .language import ELEMENTS, PROGRAMS, column_sums, jit, power_of_two, tl, upcast


@jit
def _backward(
    dq_ptr, dk_ptr, dv_ptr, d_qkv_ptr, sums_ptr,
    rows, W: tl.constexpr, BC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Rows of one of the three, whose number is the third of the program's, to their place."""
    which = tl.program_id(2)
    source_ptr = dq_ptr
    if which == 1:
        source_ptr = dk_ptr
    if which == 2:
        source_ptr = dv_ptr
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros([R, BC], sums_ptr.dtype.element_ty)
    for start in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = (start + tl.arange(0, R)).to(tl.int64)[:, None]
        inside = (row < rows) & (column < W)[None, :]
        part = tl.load(source_ptr + row * W + column[None, :], inside, 0.0)
        tl.store(d_qkv_ptr + (row * 3 + which) * W + column[None, :], part, inside)
        total += upcast(part)
    at = (tl.program_id(0) * 3 + which) * W + column
    tl.store(sums_ptr + at, tl.sum(total, 0), column < W)


@operation("split_qkv_backward")
def backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v [T, heads, d] → of qkv [T, 3, heads, d] and bias [3·heads·d]."""
    rows, width = dq.shape[0], dq.shape[1] * dq.shape[2]
    d_qkv, _ = outputs = _outputs(dq)
    columns = min(512, power_of_two(width))
    in_block = ELEMENTS // columns
    blocks = -(-width // columns)
    programs = max(1, min(PROGRAMS // blocks, -(-rows // in_block)))
    sums = dq.new_empty(programs, 3 * width, dtype=torch.promote_types(dq.dtype, torch.float32))
    _backward[(programs, blocks, 3)](
        dq, dk, dv, d_qkv, sums, rows, W=width, BC=columns, R=in_block, num_warps=4
    )
    return d_qkv, column_sums(sums, outputs[1].dtype)


def _outputs(dq, *_):
    rows, *head = dq.shape
    return dq.new_empty(rows, 3, *head), dq.new_empty(3 * head[0] * head[1])


backward.register_fake(_outputs)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias):
        return qkv.unbind(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        return backward(*gradients)


def split_qkv(
    qkv: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qkv [T, 3, heads, d], its bias [3·heads·d] already added → q, k, v [T, heads, d].

    The bias gets its gradient here: give the product that made qkv a detached one.
    """
    return (_Split.apply if use_triton(qkv) else split_qkv_reference)(qkv, bias)


def split_qkv_reference(qkv, bias):
    """`split_qkv` in plain PyTorch."""
    nothing = (bias - bias.detach()).view(qkv.shape[1:]).to(qkv.dtype)
    return (qkv + nothing).unbind(1)
