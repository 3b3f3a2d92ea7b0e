"""The discriminator's head and loss: GELU, one output unit, sigmoid cross-entropy, histogram.

Forward reads hidden once and keeps one number a row, the gradient of its logit; backward reads
hidden once more and writes its gradient, the sums for the parameters on the way: 3 [T, H] tensors
moved where separate operations move 13. (Gradients written in the forward pass and scaled by the
gradient of the loss in backward would move 4.)
"""

import torch
import torch.nn.functional as F

from .bias_gelu import bias_gelu, bias_gelu_reference
from .dispatch import operation, use_triton
from .language import (
    PROGRAMS,
    column_sums,
    gelu,
    gelu_slope,
    jit,
    row_blocks,
    tl,
    upcast,
)

BINS = 1024  # of the histogram, over logits in [-LIMIT, LIMIT)
LIMIT = 16.0


@jit
def _forward(
    hidden_ptr, bias_ptr, weight_ptr, output_bias_ptr, replaced_ptr, real_ptr,
    loss_ptr, histogram_ptr, d_logits_ptr,
    rows, H: tl.constexpr, BH: tl.constexpr, R: tl.constexpr,
    BINS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, BH)
    real = row < tl.minimum(rows, tl.load(real_ptr))
    at = row.to(tl.int64)[:, None] * H + column[None, :]
    x = upcast(tl.load(hidden_ptr + at, real[:, None] & (column < H)[None, :], 0.0))
    x += upcast(tl.load(bias_ptr + column, column < H, 0.0))[None, :]
    weight = upcast(tl.load(weight_ptr + column, column < H, 0.0))
    active = gelu(x, hidden_ptr.dtype.element_ty.primitive_bitwidth > 16)
    logit = tl.sum(active * weight[None, :], 1) + upcast(tl.load(output_bias_ptr))
    target = tl.load(replaced_ptr + row, real, 0)

    small = tl.exp(-tl.abs(logit))
    whole = 1 + small
    step = whole - 1  # small as rounded: makes log(whole) as exact as log1p(small)
    log1p = tl.where(step == 0, small, tl.log(whole) * (small / tl.where(step == 0, 1, step)))
    loss = tl.maximum(logit, 0) - logit * target + log1p
    probability = tl.where(logit > 0, 1, small) / whole
    tl.store(loss_ptr + row, tl.where(real, loss, 0.0), row < rows)
    tl.store(d_logits_ptr + row, tl.where(real, probability - target, 0.0), row < rows)

    bin = tl.floor((logit + LIMIT) * (BINS / (2 * LIMIT)))
    bin = tl.minimum(tl.maximum(bin, 0), BINS - 1).to(tl.int32)
    # whole numbers: exact, so the same in any order
    tl.atomic_add(histogram_ptr + target * BINS + bin, 1.0, real)


@jit
def _backward(
    d_loss_ptr, hidden_ptr, bias_ptr, weight_ptr, d_logits_ptr, d_hidden_ptr, sums_ptr,
    rows, H: tl.constexpr, BH: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = hidden_ptr.dtype.element_ty.primitive_bitwidth > 16
    column = tl.arange(0, BH)
    bias = upcast(tl.load(bias_ptr + column, column < H, 0.0))
    weight = upcast(tl.load(weight_ptr + column, column < H, 0.0))
    d_bias = tl.zeros([R, BH], d_logits_ptr.dtype.element_ty)
    d_weight = tl.zeros([R, BH], d_logits_ptr.dtype.element_ty)
    d_output_bias = tl.zeros([R], d_logits_ptr.dtype.element_ty)
    for start in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = start + tl.arange(0, R)
        at = row.to(tl.int64)[:, None] * H + column[None, :]
        inside = (row < rows)[:, None] & (column < H)[None, :]
        d_logit = tl.load(d_logits_ptr + row, row < rows, 0.0) * tl.load(d_loss_ptr)
        x = upcast(tl.load(hidden_ptr + at, inside & (d_logit != 0)[:, None], 0.0)) + bias[None, :]
        d_hidden = d_logit[:, None] * weight[None, :] * gelu_slope(x, EXACT)
        tl.store(d_hidden_ptr + at, d_hidden.to(d_hidden_ptr.dtype.element_ty), inside)
        d_bias += d_hidden
        d_weight += d_logit[:, None] * gelu(x, EXACT)
        d_output_bias += d_logit
    sums_ptr += tl.program_id(0) * (2 * H + 1)
    tl.store(sums_ptr + column, tl.sum(d_bias, 0), column < H)
    tl.store(sums_ptr + H + column, tl.sum(d_weight, 0), column < H)
    tl.store(sums_ptr + 2 * H, tl.sum(d_output_bias, 0))


@operation("replaced_token_loss")
def forward(
    hidden: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    output_bias: torch.Tensor,
    replaced: torch.Tensor,
    real_tokens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ loss [], histogram [2, BINS], gradient of each row's logit [T]."""
    _, histogram, d_logits = _forward_outputs(hidden)
    losses = torch.empty_like(d_logits)
    constants, warps = row_blocks(hidden.shape[1])
    grid = (-(-hidden.shape[0] // constants["R"]),)
    _forward[grid](
        hidden, bias, weight, output_bias, replaced, real_tokens, losses, histogram, d_logits,
        hidden.shape[0], BINS=BINS, LIMIT=LIMIT, **constants, num_warps=warps,
    )  # fmt: skip
    return losses.sum(), histogram, d_logits


def _forward_outputs(hidden, *_):
    statistics = torch.promote_types(hidden.dtype, torch.float32)
    histogram = hidden.new_zeros(2, BINS, dtype=torch.float32)
    d_logits = hidden.new_empty(hidden.shape[0], dtype=statistics)
    return d_logits.new_empty(()), histogram, d_logits


@operation("replaced_token_loss_backward")
def backward(
    d_loss: torch.Tensor,
    hidden: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    d_logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ gradients of hidden [T, H]; of bias, weight and output_bias in a row [2 H + 1]."""
    d_hidden = hidden.new_empty(hidden.shape)
    constants, _ = row_blocks(hidden.shape[1])
    programs = min(PROGRAMS, -(-hidden.shape[0] // constants["R"]))
    sums = d_logits.new_empty(programs, 2 * hidden.shape[1] + 1)
    _backward[(programs,)](
        d_loss, hidden, bias, weight, d_logits, d_hidden, sums, hidden.shape[0], **constants,
        num_warps=4,
    )  # fmt: skip
    return d_hidden, column_sums(sums, torch.promote_types(bias.dtype, weight.dtype))


@backward.register_fake
def _(d_loss, hidden, bias, weight, d_logits):
    dtype = torch.promote_types(bias.dtype, weight.dtype)
    return hidden.new_empty(hidden.shape), hidden.new_empty(2 * hidden.shape[1] + 1, dtype=dtype)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], output[2])


def _differentiate(ctx, d_loss):
    d_hidden, sums = backward(d_loss, *ctx.saved_tensors)
    width = d_hidden.shape[1]
    return d_hidden, sums[:width], sums[width:-1], sums[-1:], None, None


forward.register_fake(_forward_outputs)
forward.register_autograd(_differentiate, _save)


def replaced_token_loss(
    hidden: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    output_bias: torch.Tensor,
    replaced: torch.Tensor,
    real_tokens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary cross-entropy of logit = weight · gelu(hidden + bias) + output_bias against replaced.

    hidden [T, H] (the dense layer's product), bias, weight [H], output_bias [1], replaced [T] int32
    0/1, real_tokens [] int32: rows from there on are padding.
    → loss [] fp32, summed over the real rows; histogram [2, 1024] fp32 of their logits clipped to
    [-16, 16), row 0 of original tokens, row 1 of replaced ones; bin 512 starts at logit 0.
    """
    if use_triton(hidden):
        return forward(hidden, bias, weight, output_bias, replaced, real_tokens)[:2]
    return _loss(bias_gelu(hidden, bias), weight, output_bias, replaced, real_tokens)


def replaced_token_loss_reference(hidden, bias, weight, output_bias, replaced, real_tokens):
    """`replaced_token_loss` in plain PyTorch."""
    hidden = bias_gelu_reference(hidden, bias)
    return _loss(hidden, weight, output_bias, replaced, real_tokens)


def _loss(hidden, weight, output_bias, replaced, real_tokens):
    """What follows the GELU."""
    statistics = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ weight + output_bias).to(statistics)
    real = torch.arange(hidden.shape[0], device=hidden.device) < real_tokens
    loss = F.binary_cross_entropy_with_logits(logits, replaced.to(statistics), reduction="none")
    bin = ((logits.detach() + LIMIT) * (BINS / (2 * LIMIT))).floor()
    bin = bin.nan_to_num().clamp(0, BINS - 1).long()  # a diverged run says so, not IndexError
    histogram = logits.new_zeros(2 * BINS, dtype=torch.float32)
    histogram.index_add_(0, bin + BINS * replaced, real.to(torch.float32))
    return loss.masked_fill(~real, 0).sum(), histogram.view(2, BINS)
