"""The discriminator's head and loss: GELU, one output unit, sigmoid cross-entropy, histogram."""

import torch
import torch.nn.functional as F

BINS = 1024  # of the histogram, over logits in [-16, 16)
LIMIT = 16.0


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
    return replaced_token_loss_reference(hidden, bias, weight, output_bias, replaced, real_tokens)


def replaced_token_loss_reference(hidden, bias, weight, output_bias, replaced, real_tokens):
    """`replaced_token_loss` in plain PyTorch."""
    statistics = torch.promote_types(hidden.dtype, torch.float32)
    logits = (F.gelu(hidden + bias) @ weight + output_bias).to(statistics)
    real = torch.arange(hidden.shape[0], device=hidden.device) < real_tokens
    target = replaced.to(statistics)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    scaled = (logits.detach() + LIMIT) * (BINS / (2 * LIMIT))
    bins = scaled.floor().clamp(0, BINS - 1).long() + BINS * replaced
    histogram = logits.new_zeros(2 * BINS, dtype=torch.float32)
    histogram.index_add_(0, bins, real.to(torch.float32))
    return loss.masked_fill(~real, 0).sum(), histogram.view(2, BINS)
