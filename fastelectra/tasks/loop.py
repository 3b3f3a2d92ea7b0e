"""The loop: one fine-tuning run from a seed, and predictions. A run is one process's own.

Runs are short, and a batch of 32 hardly fills one GPU: several processes take different runs, which
are then the same to the bit on any number of them.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch

from fastelectra.config import OptimizerConfig
from fastelectra.errors import FastElectraError
from fastelectra.tasks.classifier import Classifier, layer_groups, loss_of
from fastelectra.tasks.packing import Example, pack
from fastelectra.tasks.table import BATCH, WARMUP
from fastelectra.training.optimizer import PaperAdam
from fastelectra.training.schedule import learning_rate

PREDICTED = 8192  # about so many tokens at a time
LINES = 10  # of progress, a run


@dataclass(frozen=True)
class Settings:
    """What a run does to a model, beside the task."""

    size: str  # of the recipe: small | base | large
    lr: float  # peak, of the head
    layer_decay: float
    decay_convention: str  # google | plain
    epochs: int
    max_length: int
    precision: str  # bf16 | fp32


class Weights:
    """A classifier to train: in bf16 its encoder computes in bf16, while fp32 weights are kept."""

    def __init__(self, classifier: Classifier, precision: str):
        self.master = self.model = classifier
        if precision == "bf16":
            self.model = copy.deepcopy(classifier).to(torch.bfloat16)
            self.model.head.float()
        self._pairs: dict[torch.dtype, list] = {}  # of one type each, which are copied at once
        for pair in zip(self.model.parameters(), self.master.parameters(), strict=True):
            self._pairs.setdefault(pair[0].dtype, []).append(pair)

    def collect_gradients(self) -> None:
        """Move the model's gradients to the fp32 weights."""
        if self.model is not self.master:
            for pairs in self._pairs.values():
                for _, master in pairs:
                    master.grad = torch.empty_like(master)
                gradients = [master.grad for _, master in pairs]
                torch._foreach_copy_(gradients, [parameter.grad for parameter, _ in pairs])
                for parameter, _ in pairs:
                    parameter.grad = None

    @torch.no_grad()
    def spread(self) -> None:
        """Give the model the fp32 weights as they are now."""
        if self.model is not self.master:
            for pairs in self._pairs.values():
                torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))


def train(
    classifier: Classifier,
    examples: Sequence[Example],
    labels: Sequence[float],
    settings: Settings,
    seed: int,
    say,
) -> Weights:
    """Fine-tune `classifier` in place, on its device. `say` prints a line of progress.

    Everything random, the head's first weights aside, follows from `seed`. Raises FastElectraError
    when the loss is no number.
    """
    torch.manual_seed(seed)
    device = classifier.head.weight.device
    labels = torch.tensor(labels, dtype=torch.float32)
    weights = Weights(classifier, settings.precision)
    weights.model.train()
    optimizer = PaperAdam(
        layer_groups(classifier, settings.layer_decay, settings.decay_convention),
        OptimizerConfig(weight_decay=0.0),
    )
    steps = settings.epochs * -(-len(examples) // BATCH)
    every, began, tokens, losses = -(-steps // LINES), time.monotonic(), 0, []
    for step, chosen in enumerate(batches(len(examples), settings.epochs, seed)):
        batch = pack([examples[i] for i in chosen], settings.max_length)
        rate = learning_rate(step, settings.lr, WARMUP * steps, steps)
        loss = update(weights, optimizer, batch.to(device), labels[chosen].to(device), rate)
        tokens += len(batch.tokens)
        losses.append(loss)
        if (step + 1) % every == 0 or step + 1 == steps:
            mean = float(torch.stack(losses).mean())
            if not np.isfinite(mean):
                raise FastElectraError(
                    f"the loss is not a number at step {step + 1:,}: lower --lr, or use a model"
                    " that was trained in the same precision"
                )
            spent = time.monotonic() - began
            left = timedelta(seconds=round(spent / (step + 1) * (steps - step - 1)))
            say(f"step {step + 1:>{len(f'{steps:,}')},}/{steps:,}  loss {mean:.4f}  lr {rate:.2e}"
                f"  {tokens / spent / 1000:.1f}k tok/s  left {left}")  # fmt: skip
            losses = []
    return weights


def update(
    weights: Weights, optimizer: PaperAdam, batch, labels: torch.Tensor, rate: float
) -> torch.Tensor:
    """One step: loss, gradients, clipping to norm 1, Adam. Returns the loss []."""
    loss = loss_of(weights.model(batch), labels)
    loss.backward()
    weights.collect_gradients()
    torch.nn.utils.clip_grad_norm_(weights.master.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    optimizer.step()
    optimizer.zero_grad()
    weights.spread()
    return loss.detach()


def batches(examples: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Numbers of the examples of each batch; every epoch has an order of its own."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(examples)
        for first in range(0, examples, BATCH):
            yield order[first : first + BATCH]


@torch.no_grad()
def predict(model: Classifier, examples: Sequence[Example], max_length: int) -> np.ndarray:
    """[examples, outputs] float32, without dropout."""
    model.eval()
    device = model.head.weight.device
    order = np.argsort([-len(example.tokens) for example in examples], kind="stable")
    outputs = np.empty((len(examples), model.head.out_features), np.float32)
    count = max(1, PREDICTED // max_length)
    for first in range(0, len(order), count):
        chosen = order[first : first + count]
        batch = pack([examples[i] for i in chosen], max_length).to(device)
        outputs[chosen] = model(batch).float().cpu().numpy()
    if not np.isfinite(outputs).all():
        raise FastElectraError("the model predicts what is not a number: lower --lr")
    return outputs
