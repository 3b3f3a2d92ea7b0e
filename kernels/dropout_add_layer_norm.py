"""LayerNorm(dropout(x + x_bias) + residual), the end of each half of a post-LN layer."""

import torch
import torch.nn.functional as F


def dropout_add_layer_norm(
    x: torch.Tensor,
    x_bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    eps: float = 1e-12,
) -> torch.Tensor:
    """LayerNorm of dropout(x [T, H] + x_bias [H]) + residual [T, H] → [T, H].

    weight, bias [H]: of the LayerNorm. p: dropped share, 0 = none. seed [1] int64: of the mask.
    """
    return dropout_add_layer_norm_reference(x, x_bias, residual, weight, bias, p, seed, eps)


def dropout_add_layer_norm_reference(x, x_bias, residual, weight, bias, p, seed, eps=1e-12):
    """`dropout_add_layer_norm` in plain PyTorch; the mask comes from torch's generator."""
    x = x + x_bias
    if p:
        x = F.dropout(x, p)
    return F.layer_norm(x + residual, weight.shape, weight, bias, eps)
