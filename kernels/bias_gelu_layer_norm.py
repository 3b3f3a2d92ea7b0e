"""LayerNorm(GELU(x + bias)), the generator's transform after its dense layer."""

import torch
import torch.nn.functional as F


def bias_gelu_layer_norm(
    x: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float = 1e-12,
) -> torch.Tensor:
    """LayerNorm of the erf-GELU of x [M, E] + bias [E] → [M, E].

    weight, ln_bias [E]: of the LayerNorm.
    """
    return bias_gelu_layer_norm_reference(x, bias, weight, ln_bias, eps)


def bias_gelu_layer_norm_reference(x, bias, weight, ln_bias, eps=1e-12):
    """`bias_gelu_layer_norm` in plain PyTorch."""
    return F.layer_norm(F.gelu(x + bias), weight.shape, weight, ln_bias, eps)
