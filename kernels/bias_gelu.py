"""GELU(x + bias), the activation of the feed-forward layers."""

import torch
import torch.nn.functional as F


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """erf-GELU of x [N, F] + bias [F] → [N, F]."""
    return bias_gelu_reference(x, bias)


def bias_gelu_reference(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`bias_gelu` in plain PyTorch."""
    return F.gelu(x + bias)
