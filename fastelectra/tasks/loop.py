"""The loop: one fine-tuning run from a seed, and predictions. A run is one process's own.

Runs are short, and a batch of 32 hardly fills one GPU: several processes take different runs, which
are then the same to the bit on any number of them (on a CPU with the same number of threads each).
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
from fastelectra.tasks.packing import Example, Labelled, pack
from fastelectra.tasks.table import BATCH, WARMUP
from fastelectra.training.graphs import Replay, default_generator, new_pool
from fastelectra.training.optimizer import PaperAdam, set_rate
from fastelectra.training.schedule import learning_rate

PREDICTED = 8192  # about so many tokens at a time
BUCKET = 512  # tokens: a GPU takes batches padded to a multiple, each with a CUDA graph of its own
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
                    if master.grad is None:
                        master.grad = torch.empty_like(master)
                gradients = [master.grad for _, master in pairs]
                torch._foreach_copy_(gradients, [parameter.grad for parameter, _ in pairs])
                for parameter, _ in pairs:
                    parameter.grad = None

    @torch.no_grad()
    def spread(self) -> None:
        """Give the model the fp32 weights as they are now; gradients are used up."""
        if self.model is self.master:
            self.master.zero_grad()
        else:
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
    labels = torch.tensor(labels, dtype=torch.float32)
    weights = Weights(classifier, settings.precision)
    weights.model.train()
    optimizer = PaperAdam(
        layer_groups(classifier, settings.layer_decay, settings.decay_convention),
        OptimizerConfig(weight_decay=0.0),
    )
    learn = Steps(weights, optimizer)
    steps = settings.epochs * -(-len(examples) // BATCH)
    every, began, tokens, losses = -(-steps // LINES), time.monotonic(), 0, []
    for step, chosen in enumerate(batches(len(examples), settings.epochs, seed)):
        batch = pack([examples[i] for i in chosen], settings.max_length, learn.multiple)
        batch = Labelled(*vars(batch).values(), labels[chosen])
        rate = learning_rate(step, settings.lr, WARMUP * steps, steps)
        losses.append(learn(batch, rate))
        tokens += int(batch.cu_seqlens[-1])
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
    learn.replays = None  # and the memory of the graphs, which else waits for a collection
    return weights


class Steps:
    """Training steps of `weights` on its device: on a GPU in bf16 replayed as CUDA graphs, one for
    each number of tokens, since a batch of 32 takes it less time than Python needs to launch it."""

    def __init__(self, weights: Weights, optimizer: PaperAdam):
        self.weights, self.optimizer = weights, optimizer
        self.device = weights.master.head.weight.device
        self.replays: dict[int, Replay] | None = None
        if self.device.type == "cuda" and weights.model is not weights.master:
            self.capture()

    @property
    def multiple(self) -> int:
        """What the number of tokens in a batch should be a multiple of."""
        return 1 if self.replays is None else BUCKET

    def capture(self) -> None:
        """From now on capture and replay."""
        self.replays, self.pool = {}, new_pool(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = torch.zeros((), device=self.device)

    def __call__(self, batch: Labelled, rate: float) -> torch.Tensor:
        """One step at the learning rate `rate` of the head. Returns the loss []."""
        for group in self.optimizer.param_groups:
            set_rate(group, rate * group["scale"])
        if self.replays is None or len(batch.labels) < BATCH:  # an epoch's last batch
            return self._learn(batch)
        size = len(batch.tokens)
        if size not in self.replays:
            generator = default_generator(self.device)
            self.replays[size] = Replay(self._learn, generator, self.pool)
        return self.replays[size](batch).clone()

    def _learn(self, batch: Labelled) -> torch.Tensor:
        """Loss, gradients, clipping to norm 1, Adam."""
        batch = batch.to(self.device)
        loss = loss_of(self.weights.model(batch), batch.labels)
        loss.backward()
        self.weights.collect_gradients()
        torch.nn.utils.clip_grad_norm_(self.weights.master.parameters(), 1.0)
        self.optimizer.step()
        self.weights.spread()
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
