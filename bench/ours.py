"""Our trainer as a contender: its Updater over DeepSpeed's engine, or over a plain one."""

import importlib.util

import torch
from workload import Workload

from fastelectra import kernels
from fastelectra.config import Config
from fastelectra.data.batch import Batch
from fastelectra.model.electra import Electra
from fastelectra.training.launch import Process, accumulation
from fastelectra.training.optimizer import PaperAdam, parameter_groups
from fastelectra.training.update import Updater

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


class PlainEngine:
    """What the Updater needs of DeepSpeed's engine, on one device.

    In bf16 the model's parameters are copies of fp32 master weights, which the optimizer has.
    """

    def __init__(self, model: Electra, config: Config, accumulation: int, dtype: torch.dtype):
        self.module, self.accumulation, self.micro_steps = model, accumulation, 0
        self.copied = dtype != torch.float32
        self.parameters = list(model.parameters())
        self.masters = self.parameters
        if self.copied:
            self.masters = [parameter.detach().clone() for parameter in self.parameters]
            model.to(dtype)
        groups = parameter_groups(model, config.optimizer.weight_decay)
        master_of = dict(zip(self.parameters, self.masters, strict=True))
        for group in groups:
            group["params"] = [master_of[parameter] for parameter in group["params"]]
        self.optimizer = PaperAdam(groups, config.optimizer)

    def __call__(self, batch: Batch):
        """The model's loss and metrics."""
        return self.module(batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients to those of the step, in fp32."""
        (loss / self.accumulation).backward()
        if not self.copied:
            return
        gradients = [parameter.grad for parameter in self.parameters]
        if self.masters[0].grad is None:
            for master, gradient in zip(self.masters, gradients, strict=True):
                master.grad = gradient.float()
        else:
            torch._foreach_add_([master.grad for master in self.masters], gradients)
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """After the last micro-batch of a step: clip, update, and copy to the model."""
        self.micro_steps += 1
        if self.micro_steps % self.accumulation:
            return
        self.norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.copied:
            torch._foreach_copy_(self.parameters, self.masters)

    def get_global_grad_norm(self) -> torch.Tensor:
        """Of the last step's gradients, before clipping."""
        return self.norm


class Ours:
    """The trainer's step: as it is, or ours-eager, without CUDA graphs, or ours-compiled, with both
    networks under torch.compile."""

    def __init__(self, name: str, workload: Workload, device: torch.device, process: Process):
        self.device, config = device, workload.config
        graphs = device.type == "cuda" and name != "ours-eager"
        torch.manual_seed(config.training.seed)
        kernels.set_backend(config.training.kernels)
        model = Electra(config.model, workload.vocab_size, config.objective)
        if HAS_DEEPSPEED:
            from fastelectra.training.engine import plan_engine, start_engine

            plan = plan_engine(config, process)
            engine = start_engine(model, config, plan)
            self.runs_on = f"DeepSpeed, ZeRO stage {plan.stage}"
        else:
            dtype = torch.bfloat16 if config.deepspeed["bf16"]["enabled"] else torch.float32
            engine = PlainEngine(model.to(device), config, accumulation(config, process), dtype)
            self.runs_on = "a plain engine: DeepSpeed is not installed"
        engine.module.train()
        if name == "ours-compiled":
            for network in (model.generator, model.discriminator):
                network.compile(dynamic=False, fullgraph=True)
        self.updater = Updater(engine, config, device, graphs=graphs)
        self.number = 0

    @property
    def engine(self):
        """Forward, backward and optimizer."""
        return self.updater.engine

    @engine.setter
    def engine(self, engine) -> None:
        self.updater.engine = engine

    def prepared(self, batches: list[Batch]) -> list[Batch]:
        """What `step` takes, as the trainer makes it ahead: pinned for a GPU."""
        return [b.pin_memory() for b in batches] if self.device.type == "cuda" else batches

    def step(self, batches: list[Batch]) -> None:
        """One update."""
        self.number += 1
        self.updater.update(self.number, batches)

    def losses(self) -> list[float]:
        """Mean losses of generator and discriminator over all steps so far."""
        scores = self.updater.meter.read()
        return [scores["mlm_loss"], scores["disc_loss"]]
