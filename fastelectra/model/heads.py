"""What the two networks predict with: the masked tokens, and which tokens were replaced."""

import torch
import torch.nn.functional as F
from torch import nn

from fastelectra.kernels import (
    bias_gelu,
    bias_gelu_layer_norm,
    linear_cross_entropy_sample,
    replaced_token_loss,
)
from fastelectra.model.embeddings import LAYER_NORM_EPS


class GeneratorHead(nn.Module):
    """dense(H → E) → GELU → LayerNorm → product with the word table + output bias.

    The table is the embeddings' own parameter, registered here as well: ZeRO stage 3 gathers a
    parameter for the module that has it. `named_parameters` of the whole gives it one name.
    """

    def __init__(self, hidden_size: int, word: nn.Parameter):
        super().__init__()
        vocab_size, embedding_size = word.shape
        self.weight = nn.Parameter(torch.empty(embedding_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(embedding_size))
        self.norm_weight = nn.Parameter(torch.empty(embedding_size))
        self.norm_bias = nn.Parameter(torch.empty(embedding_size))
        self.word = word
        self.output_bias = nn.Parameter(torch.empty(vocab_size))

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        uniforms: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """At the chosen positions [M, H]: loss sum [], sampled ids [M], argmax hits []."""
        return linear_cross_entropy_sample(
            self._transform(hidden), self.word, self.output_bias, labels, uniforms, temperature
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[M, H] → [M, V]."""
        return F.linear(self._transform(hidden), self.word, self.output_bias)

    def _transform(self, hidden: torch.Tensor) -> torch.Tensor:
        return bias_gelu_layer_norm(
            F.linear(hidden, self.weight),
            self.bias,
            self.norm_weight,
            self.norm_bias,
            LAYER_NORM_EPS,
        )


class DiscriminatorHead(nn.Module):
    """dense(H) → GELU → dense(1)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.output_weight = nn.Parameter(torch.empty(1, hidden_size))
        self.output_bias = nn.Parameter(torch.empty(1))

    def forward(
        self, hidden: torch.Tensor, replaced: torch.Tensor, real_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H], labels [T]: loss sum [] of the first real_tokens [] rows, histogram [2, 1024]."""
        return replaced_token_loss(
            F.linear(hidden, self.weight),
            self.bias,
            self.output_weight.flatten(),
            self.output_bias,
            replaced,
            real_tokens,
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] → [T]: above 0 means replaced."""
        hidden = bias_gelu(F.linear(hidden, self.weight), self.bias)
        return F.linear(hidden, self.output_weight, self.output_bias).squeeze(1)
