"""ELECTRA (arXiv 2003.10555): mask → generate → gather → head, loss, sample → replace →
discriminate → loss. `Electra.losses` is section 2 of the paper, line by line, and the objectives
of section 3.4, which differ in the discriminator's head and where it is called: what it predicts
there. (`mlm` has no generator.)"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import nn

from fastelectra.config import ModelConfig, ObjectiveConfig, generator_sizes
from fastelectra.data.batch import Batch
from fastelectra.kernels import replace_tokens
from fastelectra.model.attention import Layout, layout_of
from fastelectra.model.embeddings import Embeddings
from fastelectra.model.encoder import Network
from fastelectra.model.heads import CopyHead, DiscriminatorHead, PredictionHead, TokenHead


class Electra(nn.Module):
    """Generator and discriminator over shared embeddings, initialised as the paper does.

    Under an objective that predicts tokens `discriminator` is the main network all the same.
    """

    def __init__(self, model: ModelConfig, vocab_size: int, objective: ObjectiveConfig):
        super().__init__()
        self.config, self.objective, kind = model, objective, objective.kind
        sizes = vocab_size, model.embedding_size, model.max_positions, model.dropout
        self.embeddings = Embeddings(*sizes)

        self.generator = None
        if kind.generator:
            hidden_size, intermediate_size, heads = generator_sizes(model)
            narrow = dataclasses.replace(
                model, hidden_size=hidden_size, intermediate_size=intermediate_size, heads=heads
            )
            own = None if model.embedding_sharing == "all" else Embeddings(*sizes)
            if model.embedding_sharing == "tokens":
                own.word = self.embeddings.word
            word = (own or self.embeddings).word
            self.generator = Network(narrow, TokenHead(hidden_size, word), own)
        if kind.detects:
            head = DiscriminatorHead(model.hidden_size)
        else:
            predicts = CopyHead if kind.everywhere else PredictionHead
            head = predicts(model.hidden_size, self.embeddings.word)
        self.discriminator = Network(model, head)
        initialize(self, model.initializer_range)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This batch's share of the loss [] fp32, and sums (fp32) over the batch by name.

        The sum of the losses of a step's batches, whose `totals` agree, is the step's loss.
        """
        losses, metrics = zip(*self.losses(batch), strict=True)
        return sum(losses), {name: value for part in metrics for name, value in part.items()}

    def losses(self, batch: Batch) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """The two terms of `forward`, each when it is asked for: first the generator's, if any.

        No gradient flows from the main network's to the generator: after the first is known its
        backward can run beside the second.
        """
        batch = real_part(batch)
        layout = _layout(batch)
        seeds = self._dropout_seeds(batch)
        objective, kind = self.objective, self.objective.kind
        masked_here, real_tokens = (batch.labels >= 0).sum(), batch.cu_seqlens[-1]
        chosen, tokens = batch.totals.clamp(min=1)

        filled, _, _ = replace_tokens(batch.tokens, batch.masked_positions, batch.masked_inputs)
        seen = batch.masked_inputs
        if kind.generator:
            hidden = self._generate(filled, batch, layout, seeds[0])  # (M, H)
            mlm_loss, seen, correct = self.generator.head(
                hidden, batch.labels, batch.uniforms, objective.temperature,
                objective.disallow_correct,
            )  # fmt: skip
            filled, _, replaced = replace_tokens(batch.tokens, batch.masked_positions, seen)
            metrics = {"mlm_loss": mlm_loss.detach(), "mlm_correct": correct, "replaced": replaced}
            yield objective.generator_weight * mlm_loss / chosen, metrics
            del hidden, mlm_loss  # and what autograd keeps of the generator

        rows, judged, whole = None, (batch.tokens, filled, real_tokens), tokens
        if not kind.everywhere:
            rows, judged, whole = batch.masked_positions, (batch.labels, seen, masked_here), chosen
        main_loss, scores = self.discriminator.head(
            self._discriminate(filled, batch, layout, seeds[1], rows),  # (T, H) or (M, H)
            *judged,
        )
        counts = {"masked": masked_here, "tokens": real_tokens, "predicted": judged[2]}
        counts = {name: count.float() for name, count in counts.items()}
        yield objective.main_weight * main_loss / whole, counts | scores

    @torch.no_grad()
    def generator_logits(self, batch: Batch) -> torch.Tensor:
        """[M, V] fp32: the generator's logits at the masked positions (padded rows: no meaning)."""
        seeds = self._dropout_seeds(batch)[0]
        masked, _, _ = replace_tokens(batch.tokens, batch.masked_positions, batch.masked_inputs)
        hidden = self._generate(masked, batch, _layout(batch), seeds)
        return self.generator.head.logits(hidden).float()

    @torch.no_grad()
    def discriminator_logits(self, batch: Batch) -> torch.Tensor:
        """[T] fp32: above 0 = replaced."""
        seeds = self._dropout_seeds(batch)[1]
        hidden = self._discriminate(batch.tokens, batch, _layout(batch), seeds)
        return self.discriminator.head.logits(hidden).float()

    def _generate(
        self, tokens: torch.Tensor, batch: Batch, layout: Layout, seeds: torch.Tensor
    ) -> torch.Tensor:
        """[M, H]: the generator's hidden states where a token is predicted, and only there."""
        embeddings = self.generator.embeddings or self.embeddings
        embedded = embeddings(tokens, batch.segments, batch.positions, seeds[:1])
        return self.generator(embedded, layout, seeds[1:], batch.masked_positions)

    def _discriminate(
        self,
        tokens: torch.Tensor,
        batch: Batch,
        layout: Layout,
        seeds: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, H]: the discriminator's hidden states; [M, H] at rows [M]."""
        embedded = self.embeddings(tokens, batch.segments, batch.positions, seeds[:1])
        return self.discriminator(embedded, layout, seeds[1:], rows)

    def _dropout_seeds(self, batch: Batch) -> torch.Tensor:
        """[2, 1 + 3 · layers] int64: one for every dropout, from torch's default generator."""
        dropouts = 1 + 3 * len(self.discriminator.encoder)
        return torch.randint(2**63 - 1, (2, dropouts), device=batch.tokens.device)


def parameter_shapes(
    model: ModelConfig, vocab_size: int, objective: ObjectiveConfig | None = None
) -> dict[str, torch.Size]:
    """The shape of every parameter of Electra by its name, without making one."""
    with torch.device("meta"):
        electra = Electra(model, vocab_size, objective or ObjectiveConfig())
    return {name: parameter.shape for name, parameter in electra.named_parameters()}


@torch.no_grad()
def initialize(electra: nn.Module, std: float) -> None:
    """Tables and matrices: normal of σ `std`, cut at 2 σ. Biases 0, LayerNorm weights 1."""
    within = math.erf(2 / math.sqrt(2))  # the share of a normal distribution within 2 σ
    for name, parameter in electra.named_parameters():
        if parameter.ndim == 2:
            parameter.uniform_(-within, within).erfinv_().mul_(std * math.sqrt(2))
        elif name.endswith("norm_weight"):
            nn.init.ones_(parameter)
        else:
            nn.init.zeros_(parameter)


def real_part(batch: Batch) -> Batch:
    """On CPU the batch without its padding, which costs time there; elsewhere the batch itself.

    On GPUs shapes stay as they are: constant, and known without waiting for the device.
    """
    if batch.tokens.device.type != "cpu":
        return batch
    tokens = int(batch.cu_seqlens[-1])
    masked = int((batch.labels >= 0).sum())
    cut = {name: getattr(batch, name)[:tokens] for name in ("tokens", "segments", "positions")}
    for name in ("masked_positions", "masked_inputs", "labels", "uniforms"):
        cut[name] = getattr(batch, name)[:masked]
    return dataclasses.replace(batch, **cut)


def _layout(batch: Batch) -> Layout:
    return layout_of(batch.cu_seqlens, len(batch.tokens), batch.max_length)
