"""ELECTRA as people write it on Hugging Face transformers, from the obvious to the careful.

natural    ElectraForMaskedLM over all positions, a sample at the chosen ones, ElectraForPreTraining
careful    the same, with the hidden states gathered at the chosen positions before the vocabulary
compiled   careful under torch.compile
graphed    compiled with CUDA graphs (mode "reduce-overhead")
…-flash    the same with FlashAttention 2 in place of PyTorch's attention

All train fp32 weights (under bf16 autocast where bf16 is asked for) with dropout, shared
embeddings, clipping at 1.0 and fused AdamW in the paper's two decay groups.
"""

import contextlib
import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from workload import Padded, Workload, padded

from fastelectra.config import ModelConfig, generator_sizes
from fastelectra.data.batch import Batch
from fastelectra.model.hub_names import to_hub
from fastelectra.training.optimizer import parameter_groups
from fastelectra.training.schedule import learning_rate

GRAPHED = "reduce-overhead"  # torch.compile's mode with CUDA graphs


@dataclass(frozen=True)
class Style:
    """How a peer is written."""

    gathers: bool = False  # the chosen positions before the vocabulary product
    compile_mode: str = ""  # of torch.compile; empty: not compiled
    attention: str = "sdpa"


STYLES = {
    "natural": Style(),
    "careful": Style(gathers=True),
    "compiled": Style(gathers=True, compile_mode="default"),
    "graphed": Style(gathers=True, compile_mode=GRAPHED),
    "natural-flash": Style(attention="flash_attention_2"),
    "careful-flash": Style(gathers=True, attention="flash_attention_2"),
    "compiled-flash": Style(True, "default", "flash_attention_2"),
}


def peers_for(device: torch.device, lengths: str) -> list[str]:
    """The names of those that make sense here."""
    names = ["natural", "careful", "compiled"]
    if device.type == "cuda":
        names += ["graphed"] if lengths == "full" else []  # a graph has one shape
        if importlib.util.find_spec("flash_attn"):
            names += [name for name in STYLES if name.endswith("-flash")]
    return names


def hub_config(model: ModelConfig, sizes: tuple[int, int, int], vocab_size: int, attention: str):
    """ElectraConfig of a network of these sizes (hidden, feed-forward, heads)."""
    from transformers import ElectraConfig

    return ElectraConfig(
        vocab_size=vocab_size, embedding_size=model.embedding_size, num_hidden_layers=model.layers,
        hidden_size=sizes[0], intermediate_size=sizes[1], num_attention_heads=sizes[2],
        max_position_embeddings=model.max_positions, hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.attention_dropout, attn_implementation=attention,
    )  # fmt: skip


class Pair(torch.nn.Module):
    """Both networks and a step's loss."""

    def __init__(self, workload: Workload, style: Style):
        super().__init__()
        from transformers import ElectraForMaskedLM, ElectraForPreTraining

        config, vocab_size = workload.config, workload.vocab_size
        model, self.objective, self.gathers = config.model, config.objective, style.gathers
        wide = (model.hidden_size, model.intermediate_size, model.heads)
        self.generator, self.discriminator = (
            kind(hub_config(model, sizes, vocab_size, style.attention))
            for kind, sizes in (
                (ElectraForMaskedLM, generator_sizes(model)),
                (ElectraForPreTraining, wide),
            )
        )
        self.discriminator.electra.embeddings = self.generator.electra.embeddings

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Take our Electra's parameters by name."""
        for name in ("generator", "discriminator"):
            missing, unexpected = getattr(self, name).load_state_dict(
                to_hub(weights, name), strict=False
            )
            assert not unexpected
            assert set(missing) <= {"generator_lm_head.weight"}, missing  # it is tied

    def forward(self, batch: Padded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The total loss, and those of the generator and the discriminator."""
        inputs = {"attention_mask": batch.mask, "token_type_ids": batch.segments}
        if self.gathers:
            mlm_loss, logits = self._gathered(batch, inputs)
            probabilities = F.softmax(logits.float(), -1)
            noise = torch.empty_like(probabilities).exponential_()
            sampled = (probabilities / noise).argmax(-1)
            corrupted = batch.tokens.flatten().scatter(0, batch.chosen, sampled)
            corrupted = corrupted.view_as(batch.tokens)
        else:
            output = self.generator(batch.inputs, labels=batch.labels, **inputs)
            mlm_loss, chosen = output.loss, batch.labels != -100
            probabilities = F.softmax(output.logits.detach()[chosen].float(), -1)
            corrupted = batch.tokens.clone()
            corrupted[chosen] = torch.multinomial(probabilities, 1).squeeze(-1)
        if self.gathers:
            disc_loss = self._detection_loss(batch, corrupted, inputs)
        else:
            labels = (corrupted != batch.tokens).long()
            disc_loss = self.discriminator(corrupted, labels=labels, **inputs).loss
        weights = self.objective
        total = weights.generator_weight * mlm_loss + weights.discriminator_weight * disc_loss
        return total, mlm_loss.detach(), disc_loss.detach()

    def _detection_loss(self, batch: Padded, corrupted: torch.Tensor, inputs: dict) -> torch.Tensor:
        """As transformers', whose selection of real tokens torch.compile cannot follow."""
        logits = self.discriminator(corrupted, **inputs).logits.float()
        replaced = (corrupted != batch.tokens).float()
        losses = F.binary_cross_entropy_with_logits(logits, replaced, reduction="none")
        return (
            losses.mean() if batch.mask is None else (losses * batch.mask).sum() / batch.mask.sum()
        )

    def _gathered(self, batch: Padded, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The generator's loss, and its logits [M, V] at the chosen positions."""
        hidden = self.generator.electra(batch.inputs, **inputs)[0].flatten(0, 1)
        hidden = self.generator.generator_predictions(hidden[batch.chosen])
        logits = self.generator.generator_lm_head(hidden)
        loss = F.cross_entropy(logits, batch.tokens.flatten()[batch.chosen])
        return loss, logits.detach()


class Engine:
    """A pair and its optimizer: forward, backward and update apart, as the trainer's engine."""

    def __init__(self, pair: Pair, workload: Workload, style: Style, device: torch.device):
        self.module, self.device, self.graphed = pair, device, style.compile_mode == GRAPHED
        self.autocasts = workload.config.deepspeed["bf16"]["enabled"]
        self.run = pair
        if style.compile_mode:
            dynamic = workload.lengths != "full"
            self.run = torch.compile(pair, dynamic=dynamic, mode=style.compile_mode)
        settings = workload.config.optimizer
        self.optimizer = torch.optim.AdamW(
            parameter_groups(pair, settings.weight_decay),
            betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True,
        )  # fmt: skip

    def __call__(self, batch: Padded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The losses of a micro-batch."""
        if self.graphed:
            torch.compiler.cudagraph_mark_step_begin()
        cast = torch.autocast(self.device.type, torch.bfloat16)
        with cast if self.autocasts else contextlib.nullcontext():
            return self.run(batch.to(self.device))

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients."""
        loss.backward()

    def step(self) -> None:
        """Clip, update, forget the gradients."""
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Peer:
    """A peer's training step."""

    def __init__(self, name: str, workload: Workload, device: torch.device):
        self.name, self.config, self.device = name, workload.config, device
        torch.manual_seed(self.config.training.seed)
        pair = Pair(workload, STYLES[name]).to(device).train()
        self.engine = Engine(pair, workload, STYLES[name], device)
        self.number, self.sums = 0, torch.zeros(2, device=device)

    def prepared(self, batches: list[Batch]) -> list[Padded]:
        """What `step` takes, made ahead as for ours: padded, and pinned for a GPU."""
        matrices = [padded(batch) for batch in batches]
        return [m.pin_memory() for m in matrices] if self.device.type == "cuda" else matrices

    def step(self, batches: list[Padded]) -> None:
        """One update."""
        self.number += 1
        settings, steps = self.config.optimizer, self.config.training.steps
        lr = learning_rate(self.number - 1, settings.peak_lr, settings.warmup_steps, steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        for batch in batches:
            loss, *both = self.engine(batch)
            self.sums += torch.stack(both)
            self.engine.backward(loss / len(batches))
        self.engine.step()

    def losses(self) -> list[float]:
        """Mean losses of generator and discriminator over all steps so far."""
        return (self.sums / self.number / self.config.training.micro_batches).tolist()
