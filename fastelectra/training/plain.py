"""The engine of a run that divides nothing but its batches: the fast one. Needs no DeepSpeed."""

import torch

from fastelectra.config import Config
from fastelectra.model.electra import Electra
from fastelectra.training.graphs import Replay
from fastelectra.training.optimizer import PaperAdam, parameter_groups

ALIGNED = 32  # floats, from a multiple of which a gradient begins: 128 bytes


class PlainEngine:
    """What the trainer needs of DeepSpeed's engine, without its work on the host in each step.

    In bf16 the model's parameters are copies of fp32 `masters`, which the optimizer has, and
    gradients are summed in fp32, over ranks too. Each rank has all of the model, the optimizer's
    state and the gradients. Nothing waits for a GPU.
    """

    def __init__(
        self, model: Electra, config: Config, accumulation: int, dtype: torch.dtype
    ) -> None:
        self.module, self.accumulation, self.micro_steps = model, accumulation, 0
        distributed = torch.distributed.is_initialized()
        self.world_size = torch.distributed.get_world_size() if distributed else 1
        self.global_rank = torch.distributed.get_rank() if distributed else 0
        if self.world_size > 1:
            for parameter in model.parameters():
                torch.distributed.broadcast(parameter.data, 0)
        self.clip = config.deepspeed.get("gradient_clipping", 1.0)
        self.copied = dtype != torch.float32
        self.masters = {p: p for p in model.parameters()}
        if self.copied:
            self.masters = {p: p.detach().clone() for p in model.parameters()}
            model.to(dtype)
        groups = parameter_groups(model, config.optimizer.weight_decay)
        for group in groups:
            group["params"] = [self.masters[parameter] for parameter in group["params"]]
        self.optimizer = PaperAdam(groups, config.optimizer)
        if self.copied or self.world_size > 1:
            self._join_gradients()
        self.train, self.eval = model.train, model.eval

    def zero_optimization_stage(self) -> int:
        """None: whole parameters are here."""
        return 0

    def __call__(self, batch):
        """The model's loss and metrics."""
        return self.module(batch)

    def _join_gradients(self) -> None:
        """Give all gradients their place in one buffer, which ranks sum at once."""
        masters = list(self.masters.values())
        sizes = [-(-master.numel() // ALIGNED) * ALIGNED for master in masters]
        self.gradients = torch.zeros(sum(sizes), device=masters[0].device)
        for master, part in zip(masters, self.gradients.split(sizes), strict=True):
            master.grad = part[: master.numel()].view_as(master)

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients to those of the step, in fp32."""
        (loss / (self.accumulation * self.world_size)).backward()
        if not self.copied:
            return
        pairs = [(m, p) for p, m in self.masters.items() if p.grad is not None]
        first = self.micro_steps % self.accumulation == 0
        add = torch._foreach_copy_ if first else torch._foreach_add_
        add([master.grad for master, _ in pairs], [parameter.grad for _, parameter in pairs])
        for parameter in self.masters:
            parameter.grad = None

    def capture(self, generator: torch.Generator, pool) -> None:
        """Of an engine in bf16: from now on replay the update as a CUDA graph."""
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
                torch.distributed.all_reduce(self.gradients)
            self.norm = self.update().clone()

    @torch.no_grad()
    def update(self) -> torch.Tensor:
        """Clip, update, copy; returns the gradients' norm before clipping."""
        gradients = [m.grad for m in self.masters.values() if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.optimizer.found_inf = (~norm.isfinite()).float()
        if self.clip:  # Adam divides by it, in the pass that it makes anyway
            self.optimizer.grad_scale = (norm / self.clip).clamp(min=1)
        self.optimizer.step()
        if self.copied:
            torch._foreach_copy_([*self.masters], [*self.masters.values()])
        else:
            self.optimizer.zero_grad(set_to_none=self.world_size == 1)
        return norm

    def get_global_grad_norm(self) -> torch.Tensor:
        """Of the last step's gradients, before clipping."""
        return self.norm
