"""One update of both networks from a step's micro-batches; needs no DeepSpeed."""

import math

import torch

from fastelectra.config import Config
from fastelectra.data.batch import Batch
from fastelectra.training.graphs import Graphs, Replay, default_generator, new_pool
from fastelectra.training.metrics import Meter, Skips
from fastelectra.training.optimizer import set_rate
from fastelectra.training.plain import PlainEngine
from fastelectra.training.schedule import learning_rate


class Updater:
    """Runs batches through an engine, which owns model and optimizer.

    `engine` is DeepSpeed's, or a plain one, which makes its gradients itself. tells_norm: whether
    it knows their norm (at stage 0 in fp32 DeepSpeed does not). graphs: replay the step as CUDA
    graphs. `meter` adds up the metrics of the training batches, `skips` counts the updates that
    were not made.

    An update whose loss or gradient norm is not a number is skipped, on all ranks: weights and
    moments stay as they are. A loss that is none makes all gradients NaN, so that their norm, which
    ranks share, tells. On an invalid norm DeepSpeed skips the update; at stage 0 in fp32 it does
    not, and there the optimizer is told to, on the device.
    """

    def __init__(
        self,
        engine,
        config: Config,
        device: torch.device,
        tells_norm: bool = True,
        graphs: bool = False,
    ):
        self.engine, self.config, self.device = engine, config, device
        self.tells_norm = tells_norm
        self.meter, self.skips = Meter(), Skips()
        self.batches_per_step = config.training.micro_batches
        self.generator = default_generator(device)
        self.replays: dict[bool, Replay] = {}  # of `_learn`, by whether a batch is a step's first
        self.plain = isinstance(engine, PlainEngine)
        if graphs and self.plain:
            memory = self.generator, new_pool(device)
            self.replays = {first: Replay(self._learn, *memory) for first in (True, False)}
            engine.capture(*memory)
        elif graphs:
            accumulates = self.batches_per_step > _processes()
            engine.module.forward = Graphs(engine.module, self.generator, accumulates)

    def update(self, step: int, batches: list[Batch]) -> torch.Tensor | float:
        """Update number `step` (from 1) from this rank's batches.

        Returns the norm of the gradients before clipping: not finite if the update was skipped.
        """
        for group in self.engine.optimizer.param_groups:
            set_rate(group, self.learning_rate(step))
        norm = None
        for number, batch in enumerate(batches, 1):
            self.generator.manual_seed(batch.seed)
            learn = self.replays.get(number == 1, self._learn)
            self.meter.add(*learn(batch))
            if not self.tells_norm and number == len(batches):
                gradients = [p.grad for p in self.engine.module.parameters()]
                norm = torch.nn.utils.get_total_norm(gradients)
                self.engine.optimizer.found_inf = (~norm.isfinite()).float()
            self.engine.step()
        norm = self.engine.get_global_grad_norm() if self.tells_norm else norm
        self.skips.add(norm)
        return norm

    def _learn(self, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Forward and backward; returns the metrics, and whether the loss is a number."""
        if self.plain:
            return self.engine.learn(batch.to(self.device))
        loss, metrics = self._forward(batch)
        valid = loss.detach().isfinite()
        # DeepSpeed takes the mean over ranks and accumulation; the loss is a sum over them.
        self.engine.backward(loss * torch.where(valid, float(self.batches_per_step), math.nan))
        return metrics, valid

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The model's loss and metrics; dropout depends on the batch, not on the rank."""
        self.generator.manual_seed(batch.seed)
        return self._forward(batch)

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.engine(batch.to(self.device))

    def learning_rate(self, step: int) -> float:
        """Of update number `step`."""
        optimizer = self.config.optimizer
        return learning_rate(
            step - 1, optimizer.peak_lr, optimizer.warmup_steps, self.config.training.steps
        )


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_initialized() else 1
