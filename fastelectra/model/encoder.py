"""BERT's encoder (post-LayerNorm) on packed rows [T, H], with one fused query-key-value product.

Each module's forward uses only parameters of its own: ZeRO stage 3 gathers them just for that.
Products leave their bias to the fused kernel that follows.
"""

import torch
from torch import nn

from fastelectra.config import ModelConfig
from fastelectra.kernels import bias_gelu, dropout_add_layer_norm, linear, masked_gather
from fastelectra.model.attention import Layout, attention
from fastelectra.model.embeddings import LAYER_NORM_EPS


class Network(nn.Module):
    """One of the two networks: from the embeddings [T, E] to hidden states [T, H].

    `project` is there when E ≠ H, `embeddings` when it does not share the other network's. Head
    and embeddings are kept here but are called by the step itself.
    """

    def __init__(self, model: ModelConfig, head: nn.Module, embeddings: nn.Module | None = None):
        super().__init__()
        self.embeddings = embeddings
        same = model.embedding_size == model.hidden_size
        self.project = None if same else nn.Linear(model.embedding_size, model.hidden_size)
        self.encoder = nn.ModuleList(Layer(model) for _ in range(model.layers))
        self.head = head

    def forward(
        self,
        embedded: torch.Tensor,
        layout: Layout,
        seeds: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, E] → [T, H], or [M, H] at rows [M]; `seeds` [3 · layers] int64 are its dropouts'."""
        hidden = embedded if self.project is None else self.project(embedded)
        residual = hidden
        *others, last = zip(self.encoder, seeds.view(-1, 3), strict=True)
        for layer, layer_seeds in others:
            hidden, residual = layer(hidden, residual, layout, layer_seeds)
        return last[0](hidden, residual, layout, last[1], rows)[0]


class Layer(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        hidden_size, intermediate_size = model.hidden_size, model.intermediate_size
        self.qkv = SelfAttention(model)
        self.attention_output = Output(hidden_size, hidden_size, model.dropout)
        self.intermediate = Intermediate(hidden_size, intermediate_size)
        self.output = Output(intermediate_size, hidden_size, model.dropout)

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        layout: Layout,
        seeds: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H] → [T, H], or [M, H] at rows [M] int32, as masked_gather takes; seeds [3] int64.

        In and out it is the same tensor twice, as from dropout_add_layer_norm.
        """
        context = self.qkv(hidden, layout, seeds[:1])  # (T, H)
        if rows is not None:  # after attention every row is on its own; (M, H)
            context, residual = masked_gather(context, rows), masked_gather(residual, rows)
        hidden, residual = self.attention_output(context, residual, seeds[1:2])
        return self.output(self.intermediate(hidden), residual, seeds[2:])


class SelfAttention(nn.Module):
    """Attention among the rows of a sequence, without the product that follows: [T, H] → [T, H]."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        size = model.hidden_size
        self.weight = nn.Parameter(torch.empty(3 * size, size))  # rows: queries, keys, values
        self.bias = nn.Parameter(torch.empty(3 * size))
        self.heads, self.dropout = model.heads, model.attention_dropout

    def forward(self, hidden: torch.Tensor, layout: Layout, seed: torch.Tensor) -> torch.Tensor:
        qkv = linear(hidden, self.weight, self.bias).unflatten(1, (3, self.heads, -1))
        dropout = self.dropout if self.training else 0.0
        return attention(qkv, layout, dropout, seed, self.bias).flatten(1)


class Intermediate(nn.Module):
    """gelu(dense(x)): [T, H] → [T, F]."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(intermediate_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(intermediate_size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return bias_gelu(linear(hidden, self.weight), self.bias)


class Output(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual): [T, I] and [T, H] → [T, H], twice."""

    def __init__(self, input_size: int, hidden_size: int, dropout: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, input_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.norm_weight = nn.Parameter(torch.empty(hidden_size))
        self.norm_bias = nn.Parameter(torch.empty(hidden_size))
        self.dropout = dropout

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, seed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return dropout_add_layer_norm(
            linear(x, self.weight),
            self.bias,
            residual,
            self.norm_weight,
            self.norm_bias,
            self.dropout if self.training else 0.0,
            seed,
            LAYER_NORM_EPS,
        )
