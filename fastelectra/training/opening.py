"""What a run says before its first step."""

import importlib.util

import torch

from fastelectra import kernels
from fastelectra.config import ObjectiveConfig, generator_sizes
from fastelectra.model import attention
from fastelectra.training.loop import Trainer


def opening(trainer: Trainer) -> list[str]:
    """The choices made for this run, one a line, and what differs from the paper for speed."""
    config, plan, process = trainer.config, trainer.plan, trainer.process
    tokens = sum(len(shard.tokens) for shard in trainer.stream.shards)
    heldout = sum(len(shard.tokens) for shard in trainer.heldout.shards)
    epochs = config.training.steps * config.training.batch_tokens / tokens
    lines = [
        *trainer.start.notes,
        f"run: {trainer.run}, steps {trainer.start.step:,} to {config.training.steps:,}",
        f"corpus: {config.data.path}, {tokens:,} tokens for training ({epochs:.3g} epochs),"
        f" {heldout:,} held out, vocabulary {trainer.corpus.vocab_size:,}",
        f"model: {trainer.parameters:,} parameters, {_networks(config.objective)}",
        f"device: {_device(plan.device)} × {process.world}, {plan.precision} ({plan.why}),"
        f" {'without the engine of DeepSpeed' if plan.plain else f'ZeRO stage {plan.stage}'}",
        kernels.describe(plan.device) + ", replayed as CUDA graphs" * plan.graphs,
        _attention(trainer),
        f"batch: {config.training.micro_batch_tokens:,} tokens × {plan.accumulation} micro-batches"
        f" × {process.world} processes = {config.training.batch_tokens:,} tokens a step",
    ]
    if config.optimizer.warmup_steps >= config.training.steps:
        lines.append(
            f"warning: optimizer.warmup_steps = {config.optimizer.warmup_steps:,}, so that these"
            " steps end before the learning rate has reached its peak"
        )
    if config.training.tensorboard and importlib.util.find_spec("tensorboard") is None:
        lines.append("TensorBoard: not installed, so without its files (pip install tensorboard)")
    if config.data.google_parity:
        lines.append(
            "as google-research: tails dropped, masking with replacement; packed for speed"
        )
    else:
        lines.append(
            "unlike the paper, for speed: examples are packed without padding, truncated tails go"
            " on in the next example, masking is without replacement"
        )
    return lines


def _networks(objective: ObjectiveConfig) -> str:
    kind = objective.kind
    main = "discriminator" if kind.detects else f"main network ({objective.name})"
    return f"generator and {main} together" if kind.generator else f"{main} alone"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _attention(trainer: Trainer) -> str:
    model, plan = trainer.config.model, trainer.plan
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan.precision, torch.float32)
    hidden, _, heads = generator_sizes(model)
    sizes = {model.hidden_size // model.heads, hidden // heads}
    names = {attention.describe(plan.device, dtype, s, model.attention_dropout) for s in sizes}
    return "; ".join(sorted(names))
