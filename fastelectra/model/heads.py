"""What the two networks predict with: the masked tokens, and which tokens were replaced.

A main network's head is called with the rows' hidden states, their `original` tokens, the tokens
that the network has `seen` there, and the number of `real` rows, which come first. It returns the
sum of their losses, and metrics: sums by name.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastelectra.kernels import (
    bias_gelu,
    bias_gelu_layer_norm,
    linear,
    linear_cross_entropy_sample,
    replaced_token_loss,
)
from fastelectra.model.embeddings import LAYER_NORM_EPS

ROWS = 1024  # of logits held at a time where no kernel fuses them with what follows
Judged = tuple[torch.Tensor, dict[str, torch.Tensor]]


class TokenHead(nn.Module):
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
        disallow_correct: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """At the chosen positions [M, H]: loss sum [], sampled ids [M], argmax hits []."""
        hidden = self._transform(hidden)
        loss, sampled, correct = linear_cross_entropy_sample(
            hidden, self.word, self.output_bias, labels, uniforms, temperature
        )
        if disallow_correct:
            sampled = self._sample_others(hidden, labels, uniforms, temperature)
        return loss, sampled, correct

    @torch.no_grad()
    def _sample_others(self, hidden, labels, uniforms, temperature) -> torch.Tensor:
        """[M] int32: drawn from the softmax without the label."""
        rows = (part.split(ROWS) for part in (hidden, labels, uniforms))
        draws = []
        for states, own, places in zip(*rows, strict=True):
            logits = F.linear(states, self.word, self.output_bias).float() / temperature
            logits.scatter_(1, own.clamp(min=0).long()[:, None], float("-inf"))
            cumulative = logits.softmax(1).cumsum(1)
            goal = places[:, None] * cumulative[:, -1:]
            draws.append(torch.searchsorted(cumulative, goal, right=True, out_int32=True)[:, 0])
        return torch.cat(draws).clamp(max=len(self.word) - 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[M, H] → [M, V]."""
        return F.linear(self._transform(hidden), self.word, self.output_bias)

    def _transform(self, hidden: torch.Tensor) -> torch.Tensor:
        return bias_gelu_layer_norm(
            linear(hidden, self.weight),
            self.bias,
            self.norm_weight,
            self.norm_bias,
            LAYER_NORM_EPS,
        )


class PredictionHead(TokenHead):
    """A main network's head that predicts the original tokens."""

    def forward(
        self, hidden: torch.Tensor, original: torch.Tensor, seen: torch.Tensor, real: torch.Tensor
    ) -> Judged:
        """[M, H], originals [M] (-1: padding): -Σ log softmax(logits)[original]."""
        unused = torch.zeros(len(original), device=hidden.device)
        loss, _, correct = super().forward(hidden, original, unused, 1.0)
        return loss, {"main_loss": loss.detach(), "main_correct": correct}


class CopyHead(TokenHead):
    """A main network's head that predicts every original token, and may copy the one it sees:
    p(x) = D · [x = seen] + (1 - D) · softmax(logits)[x], D = sigmoid(dense(1)) (paper 3.4)."""

    def __init__(self, hidden_size: int, word: nn.Parameter):
        super().__init__(hidden_size, word)
        self.copy_weight = nn.Parameter(torch.empty(1, hidden_size))
        self.copy_bias = nn.Parameter(torch.empty(1))

    def forward(
        self, hidden: torch.Tensor, original: torch.Tensor, seen: torch.Tensor, real: torch.Tensor
    ) -> Judged:
        """[T, H], originals and seen [T]: -Σ log p(original). Logits are made twice, not kept."""
        copy = F.linear(hidden, self.copy_weight, self.copy_bias)[:, 0]
        inside = torch.arange(len(original), device=hidden.device) < real
        rows = self._transform(hidden), copy, original.long(), seen.long(), inside
        parts = [
            checkpoint(self._mixture, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(*(part.split(ROWS) for part in rows), strict=True)
        ]
        loss, correct = (torch.stack(sums).sum() for sums in zip(*parts, strict=True))
        return loss, {"main_loss": loss.detach(), "main_correct": correct}

    def _mixture(self, hidden, copy, original, seen, inside) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss sum and argmax hits of some rows."""
        logits = F.linear(hidden, self.word, self.output_bias)
        statistics = torch.promote_types(logits.dtype, torch.float32)
        log_p, copy = logits.to(statistics).log_softmax(1), copy.to(statistics)
        copied, predicted = F.logsigmoid(copy), F.logsigmoid(-copy)
        of_seen = torch.logaddexp(copied, predicted + log_p.gather(1, seen[:, None])[:, 0])
        of_original = predicted + log_p.gather(1, original[:, None])[:, 0]
        of_original = torch.where(seen == original, of_seen, of_original)
        best = torch.maximum(of_seen, predicted + log_p.amax(1)).detach()
        hits = (of_original.detach() >= best) & inside
        return -of_original.masked_fill(~inside, 0).sum(), hits.sum(dtype=torch.float32)


class DiscriminatorHead(nn.Module):
    """dense(H) → GELU → dense(1)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.output_weight = nn.Parameter(torch.empty(1, hidden_size))
        self.output_bias = nn.Parameter(torch.empty(1))

    def forward(
        self, hidden: torch.Tensor, original: torch.Tensor, seen: torch.Tensor, real: torch.Tensor
    ) -> Judged:
        """[T, H], originals and seen [T] int32: cross-entropy; replaced is what differs."""
        loss, histogram = replaced_token_loss(
            linear(hidden, self.weight),
            self.bias,
            self.output_weight.flatten(),
            self.output_bias,
            (seen != original).int(),
            real.int(),
        )
        return loss, {"disc_loss": loss.detach(), "histogram": histogram}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] → [T]: above 0 means replaced."""
        hidden = bias_gelu(F.linear(hidden, self.weight), self.bias)
        return F.linear(hidden, self.output_weight, self.output_bias).squeeze(1)
