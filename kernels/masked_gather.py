"""Rows of the hidden states at the chosen positions."""

import torch


def masked_gather(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows of hidden [T, H] at positions [M] int32 → [M, H].

    Positions ascend without repetition, then any number of T: those give zero rows and no gradient.
    """
    return masked_gather_reference(hidden, positions)


def masked_gather_reference(hidden, positions):
    """`masked_gather` in plain PyTorch."""
    padding = positions >= hidden.shape[0]
    rows = hidden.index_select(0, positions.masked_fill(padding, 0))
    return rows.masked_fill(padding[:, None], 0)
