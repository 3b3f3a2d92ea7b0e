"""Our trainer as a contender: its Updater over the engine that the trainer has here."""

import torch
from workload import Workload

from fastelectra import kernels
from fastelectra.data.batch import Batch
from fastelectra.model.electra import Electra
from fastelectra.training.launch import Process, accumulation
from fastelectra.training.plain import PlainEngine
from fastelectra.training.update import Updater


class Ours:
    """The trainer's step: as it is, or ours-eager, without CUDA graphs, or ours-compiled, with both
    networks under torch.compile."""

    def __init__(self, name: str, workload: Workload, device: torch.device, process: Process):
        self.device, config = device, workload.config
        graphs = device.type == "cuda" and name != "ours-eager"
        torch.manual_seed(config.training.seed)
        kernels.set_backend(config.training.kernels)
        model = Electra(config.model, workload.vocab_size, config.objective)
        if process.world > 1:
            from fastelectra.training.engine import plan_engine, start_engine

            engine = start_engine(model, config, plan_engine(config, process))
        else:  # as the trainer; here it also runs where DeepSpeed is not installed
            dtype = torch.bfloat16 if config.deepspeed["bf16"]["enabled"] else torch.float32
            engine = PlainEngine(model.to(device), config, accumulation(config, process), dtype)
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
