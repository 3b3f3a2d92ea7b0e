"""The engine of a run that divides nothing but its batches: the fast one. Needs no DeepSpeed."""

import torch
from torch import nn

from fastelectra.config import Config
from fastelectra.data.batch import Batch
from fastelectra.model.electra import Electra
from fastelectra.training.graphs import Replay
from fastelectra.training.optimizer import MOMENT_KEYS, PaperAdam, parameter_groups

ALIGNED = 32  # numbers, from a multiple of which a parameter begins: 64 bytes or more
SMALL, PIECE = 2**20, 2**13  # a group of fewer numbers is updated in pieces of so many
Places = dict[nn.Parameter, torch.Tensor]


class PlainEngine:
    """What the trainer needs of DeepSpeed's engine, without its work on the host in each step.

    Weights in fp32, gradients and Adam's moments are one tensor each for a whole group of
    parameters, so that an update is a few passes over memory. In bf16 the model's parameters are
    copies of these weights. Gradients are summed in fp32, over ranks too; a second micro-batch has
    room of its own to be cast in. Each rank has all of it. Nothing waits for a GPU.
    """

    def __init__(
        self, model: Electra, config: Config, accumulation: int, dtype: torch.dtype
    ) -> None:
        self.module, self.accumulation, self.micro_steps = model, accumulation, 0
        distributed = torch.distributed.is_initialized()
        self.world_size = torch.distributed.get_world_size() if distributed else 1
        self.global_rank = torch.distributed.get_rank() if distributed else 0
        self.clip = config.deepspeed.get("gradient_clipping", 1.0)
        groups = parameter_groups(model, config.optimizer.weight_decay)
        self.groups = [group["params"] for group in groups]

        self.weights, self.gradients = self._zeros(), self._zeros()
        for parameter, weight in self._places(self.weights).items():
            weight.copy_(parameter.detach())
        if self.world_size > 1:
            for weights in self.weights:
                torch.distributed.broadcast(weights, 0)
        self.copies = self.weights
        if dtype != torch.float32:
            self.copies = [weights.to(dtype) for weights in self.weights]
        for parameter, copy in self._places(self.copies).items():
            parameter.data = copy
        self.places = self._places(self.gradients)
        if accumulation > 1:
            self.added = self._zeros()
            self.added_places = self._places(self.added)

        for group, weights in zip(groups, self.weights, strict=True):
            group["params"] = _pieces(weights)
        self.optimizer = PaperAdam(groups, config.optimizer)
        self.moments = [self._zeros() for _ in MOMENT_KEYS]
        for group, *tensors in zip(groups, self.gradients, *self.moments, strict=True):
            pieces = map(_pieces, tensors)
            for weights, gradients, *moments in zip(group["params"], *pieces, strict=True):
                weights.grad = gradients
                step = torch.tensor(self.optimizer.adam_step(0), device=weights.device)
                states = zip(MOMENT_KEYS, moments, strict=True)
                self.optimizer.state[weights] = {"step": step, **dict(states)}
        device = self.weights[0].device
        self.aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.train, self.eval = model.train, model.eval

    def _zeros(self) -> list[torch.Tensor]:
        """Room for each group's parameters, in fp32."""
        device = self.groups[0][0].device
        return [torch.zeros(sum(map(_room, group)), device=device) for group in self.groups]

    def _places(self, tensors: list[torch.Tensor]) -> Places:
        """Where each parameter has its part of tensors as `_zeros` makes them."""
        return {
            parameter: part[: parameter.numel()].view_as(parameter)
            for group, tensor in zip(self.groups, tensors, strict=True)
            for parameter, part in zip(group, tensor.split([*map(_room, group)]), strict=True)
        }

    def states(self) -> list[Places]:
        """What a checkpoint keeps of each parameter, in place: weight and Adam's moments."""
        return [self._places(tensors) for tensors in (self.weights, *self.moments)]

    def zero_optimization_stage(self) -> int:
        """None: whole parameters are here."""
        return 0

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The model's loss and metrics."""
        return self.module(batch)

    def learn(self, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Add the gradients of a micro-batch, on the model's device, to those of the step.

        Returns the metrics, and whether the loss is a number; if not, some gradients are NaN. On a
        GPU the generator's backward, and adding its gradients, run beside all that the main network
        does. The loss and metrics from aside may be used here, and freed: nothing is allocated
        aside from then on until it has waited.
        """
        here = torch.cuda.current_stream(self.aside.device) if self.aside else None
        losses = self.module.losses(batch)
        _wait(self.aside, here)
        with torch.cuda.stream(self.aside):
            loss, metrics = next(losses)
        _wait(here, self.aside)
        with torch.cuda.stream(self.aside):
            added = self._add(self._gradients(loss), set())
        loss, gradients = loss.detach(), {}
        for term, more in losses:
            gradients = self._gradients(term)
            loss, metrics = loss + term.detach(), metrics | more
        _wait(here, self.aside)
        self._add(gradients, added)
        if self.micro_steps % self.accumulation:
            torch._foreach_add_(self.gradients, self.added)
        return metrics, loss.isfinite()

    def _gradients(self, loss: torch.Tensor) -> Places:
        parameters = [parameter for group in self.groups for parameter in group]
        valid = loss.detach() * 0 + 1  # or NaN, by two kernels
        found = torch.autograd.grad(loss, parameters, valid, allow_unused=True)
        return {p: g for p, g in zip(parameters, found, strict=True) if g is not None}

    def _add(self, gradients: Places, added: set[nn.Parameter]) -> set[nn.Parameter]:
        """To a micro-batch's gradients, in fp32, in which those of `added` are already.

        Returns whose they are. The step's first micro-batch has the place of the sum, others one of
        their own. The same parameters have gradients each time: an objective leaves none out.
        """
        places = self.added_places if self.micro_steps % self.accumulation else self.places
        new = {p: g for p, g in gradients.items() if p not in added}
        if new:
            torch._foreach_copy_([places[p] for p in new], [*new.values()])
        for parameter in gradients.keys() - new.keys():  # of both networks
            places[parameter] += gradients[parameter]
        return set(gradients)

    def capture(self, generator: torch.Generator, pool) -> None:
        """From now on replay the update as a CUDA graph."""
        for group in self.optimizer.param_groups:
            group["lr"] = torch.zeros((), device=generator.device)
        self.update = Replay(self.update, generator, pool)

    def step(self) -> None:
        """After the last micro-batch of a step: sum over ranks, clip, update, copy to the model.

        Gradients whose norm is not a number change nothing.
        """
        self.micro_steps += 1
        if self.micro_steps % self.accumulation == 0:
            if self.world_size > 1:
                for gradients in self.gradients:
                    torch.distributed.all_reduce(gradients)
            self.norm = self.update().clone()

    @torch.no_grad()
    def update(self) -> torch.Tensor:
        """Clip, update, copy; returns the gradients' norm before clipping."""
        norm = total_norm(self.gradients)
        self.optimizer.found_inf = (norm * 0).isnan().float()  # half of isfinite's kernels
        if self.clip:  # Adam divides by it, in the pass that it makes anyway
            self.optimizer.grad_scale = (norm / self.clip).clamp(min=1)
        self.optimizer.step()
        if self.copies is not self.weights:
            torch._foreach_copy_(self.copies, self.weights)
        return norm

    def get_global_grad_norm(self) -> torch.Tensor:
        """Of the last step's gradients, before clipping."""
        return self.norm


def total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Of flat tensors [·], in parts: on a CPU a sum in fp32 may lose the last of 10^8 numbers."""
    parts = [part for tensor in tensors for part in tensor.split(2**20)]
    if tensors[0].is_cpu:  # more exact, and faster in several threads
        return torch.stack([part.dot(part) for part in parts]).sum().sqrt()
    return torch.nn.utils.get_total_norm(parts)


def _room(parameter: nn.Parameter) -> int:
    """How many numbers a parameter takes among those of its group."""
    return -(-parameter.numel() // ALIGNED) * ALIGNED


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A group's for Adam, of which a GPU updates up to 65 536 numbers of a tensor by one block."""
    return tensor.split(PIECE if len(tensor) < SMALL else len(tensor))


def _wait(waiting: torch.cuda.Stream | None, other: torch.cuda.Stream | None) -> None:
    if waiting and other:
        waiting.wait_stream(other)
