"""The embeddings that both networks share: word, segment and position tables and a LayerNorm."""

import torch
from torch import nn

from fastelectra.kernels import embed_layer_norm

LAYER_NORM_EPS = 1e-12  # as BERT


class Embeddings(nn.Module):
    """Tables of vectors of `size` (E); the row of [PAD] is trained like any other."""

    def __init__(self, vocab_size: int, size: int, max_positions: int, dropout: float):
        super().__init__()
        self.word = nn.Parameter(torch.empty(vocab_size, size))
        self.segment = nn.Parameter(torch.empty(2, size))
        self.position = nn.Parameter(torch.empty(max_positions, size))
        self.norm_weight = nn.Parameter(torch.empty(size))
        self.norm_bias = nn.Parameter(torch.empty(size))
        self.dropout = dropout

    def forward(
        self,
        tokens: torch.Tensor,
        segments: torch.Tensor,
        positions: torch.Tensor,
        seed: torch.Tensor,
    ) -> torch.Tensor:
        """dropout(LayerNorm(word + segment + position)): three [T] int32 → [T, E]."""
        return embed_layer_norm(
            tokens,
            segments,
            positions,
            self.word,
            self.segment,
            self.position,
            self.norm_weight,
            self.norm_bias,
            self.dropout if self.training else 0.0,
            seed,
            LAYER_NORM_EPS,
        )
