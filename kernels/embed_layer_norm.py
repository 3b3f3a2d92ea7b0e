"""dropout(LayerNorm(word + segment + position rows)), the embedding of packed tokens."""

import torch
import torch.nn.functional as F


def embed_layer_norm(
    tokens: torch.Tensor,
    segments: torch.Tensor,
    positions: torch.Tensor,
    word: torch.Tensor,
    segment: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    eps: float = 1e-12,
) -> torch.Tensor:
    """Rows of three tables, added, LayerNorm, dropout → [T, E].

    tokens, segments, positions [T] int32: rows of word [V, E], segment [2, E], position [P, E].
    weight, bias [E]: of the LayerNorm. p: dropped share, 0 = none. seed [1] int64: of the mask.
    """
    return embed_layer_norm_reference(
        tokens, segments, positions, word, segment, position, weight, bias, p, seed, eps
    )


def embed_layer_norm_reference(
    tokens, segments, positions, word, segment, position, weight, bias, p, seed, eps=1e-12
):
    """`embed_layer_norm` in plain PyTorch; the mask comes from torch's generator."""
    rows = F.embedding(tokens, word) + F.embedding(segments, segment)
    rows = rows + F.embedding(positions, position)
    rows = F.layer_norm(rows, weight.shape, weight, bias, eps)
    return F.dropout(rows, p) if p else rows
