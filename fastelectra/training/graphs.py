"""Forward and backward as two CUDA graphs: one launch each instead of some two thousand.

A step of ELECTRA-small takes a GPU less time than Python takes to launch its kernels. Batches have
one shape and nothing in the step waits for the GPU, so a batch is copied to where the captured one
lay and both graphs are replayed. Masks and dropout stay functions of the batch's seed, since a
graph reads its generator's state when it is replayed.
"""

import dataclasses

import torch
from torch import nn

from fastelectra.data.batch import Batch, pinning
from fastelectra.model.electra import Electra


class _Tensors(nn.Module):
    """The model as a function of a batch's tensors, which is what can be captured."""

    def __init__(self, model: Electra, forward, batch: Batch):
        super().__init__()
        self.model, self.step, self.batch = model, forward, batch

    def forward(self, *tensors: torch.Tensor):
        named = dict(zip(_tensors(self.batch), tensors, strict=True))
        return self.step(dataclasses.replace(self.batch, **named))


class Graphs:
    """Stands in for `model.forward`: in training it replays graphs, captured from the first batch.

    generator: what dropout draws from. accumulates: whether gradients of several batches are added
    up before they are used.
    """

    def __init__(self, model: Electra, generator: torch.Generator, accumulates: bool):
        self.model, self.generator, self.accumulates = model, generator, accumulates
        self.eager, self.captured = model.forward, None

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As Electra.forward; what it returned before is overwritten."""
        if not (self.model.training and torch.is_grad_enabled()):
            return self.eager(batch)
        tensors = tuple(_tensors(batch).values())
        if self.captured is None:
            self._capture(batch, tensors)
        loss, metrics = self.captured(*tensors)
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _capture(self, batch: Batch, tensors: tuple[torch.Tensor, ...]) -> None:
        module = _Tensors(self.model, self.eager, batch)
        static = tuple(tensor.clone() for tensor in tensors)
        with pinning:  # which a thread that makes batches would do, and spoil the capture
            self.captured = torch.cuda.make_graphed_callables(module, static)
        self.generator.manual_seed(batch.seed)  # capturing has drawn from it
        if self.accumulates:
            # a replay writes its gradients where the last one did: what adds them up gets copies
            for parameter in self.model.parameters():
                parameter.register_hook(torch.clone)


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
