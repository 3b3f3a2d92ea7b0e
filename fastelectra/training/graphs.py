"""The step as CUDA graphs: a few launches instead of some two thousand.

A step of ELECTRA-small takes a GPU less time than Python takes to launch its kernels. Batches have
one shape and nothing in the step waits for the GPU, so a batch is copied to where the captured one
lay and the graphs are replayed. Masks and dropout stay functions of the batch's seed, since a graph
reads its generator's state when it is replayed.

With DeepSpeed's engine forward and backward are a graph each (`Graphs`). The plain engine's code
has nothing that only Python can do: all of a micro-batch is one graph, and so is the update
(`Replay`).
"""

import dataclasses
import warnings
from collections.abc import Callable

import torch
from torch import nn

from fastelectra.data.batch import Batch, pinning
from fastelectra.model.electra import Electra


def new_pool(device: torch.device) -> tuple[int, int] | None:
    """Memory for captures to share, whose graphs are never replayed at once and end together."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def captured(function: Callable, pool: tuple[int, int] | None) -> Callable:
    """What launches the kernels that `function` would, and returns what it returned when captured:
    the same tensors each time, with new values until anything of the pool is replayed again."""
    graph = torch.cuda.CUDAGraph()
    # another thread that page-locks memory meanwhile would spoil the capture; what NCCL's watchdog
    # asks of events may not
    with pinning, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = function()

    def replay():
        graph.replay()
        return outputs

    return replay


class Replay:
    """A function of a batch, or of nothing: run as it is once, then captured and replayed.

    It may leave nothing behind but values in memory that stays where it is. The first run compiles
    the kernels, which a capture cannot. generator: what it draws from, of the device of all this;
    pool: see `new_pool`.
    A batch is a dataclass; its tensors change, of the same shapes, and nothing else.
    """

    def __init__(self, function: Callable, generator: torch.Generator, pool):
        self.function, self.generator, self.pool = function, generator, pool
        self.ran, self.replay = False, None

    def __call__(self, *batch):
        """What the function returns, on a replay as `captured` does."""
        if not self.ran:
            self.ran = True
            return self.function(*batch)
        if self.replay is None:
            device = self.generator.device
            self.place = [
                dataclasses.replace(
                    one, **{n: t.to(device, copy=True) for n, t in _tensors(one).items()}
                )
                for one in batch
            ]
            state = self.generator.get_state()
            self.replay = captured(lambda: self.function(*self.place), self.pool)
            self.generator.set_state(state)  # capturing may have drawn from it
        else:
            for place, one in zip(self.place, batch, strict=True):
                for name, tensor in _tensors(place).items():
                    tensor.copy_(getattr(one, name), non_blocking=True)
        return self.replay()


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
        loss, metrics = self.captured(*tensors, *self.model.parameters())
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _capture(self, batch: Batch, tensors: tuple[torch.Tensor, ...]) -> None:
        module, count = _Tensors(self.model, self.eager, batch), len(tensors)
        names = [name for name, _ in module.named_parameters()]
        # Stand-ins in the parameters' own memory: hooks on a parameter, as DeepSpeed's, make its
        # gradient wait for the stream that they were made on, which cannot be captured.
        stand_ins = [parameter.detach().requires_grad_() for parameter in module.parameters()]

        def step(*inputs: torch.Tensor):
            weights = dict(zip(names, inputs[count:], strict=True))
            return torch.func.functional_call(module, weights, inputs[:count])

        static = (*(tensor.clone() for tensor in tensors), *stand_ins)
        with pinning, warnings.catch_warnings():
            # between its own trial runs and the capture, which are in different streams
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
            self.captured = torch.cuda.make_graphed_callables(step, static)
        self.generator.manual_seed(batch.seed)  # capturing has drawn from it
        if self.accumulates:
            # a replay writes its gradients where the last one did: what adds them up gets copies
            for parameter in self.model.parameters():
                parameter.register_hook(torch.clone)


def default_generator(device: torch.device) -> torch.Generator:
    """What dropout draws from on this device. Seeding it alone takes 1/100 of torch.manual_seed."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator


def _tensors(batch) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
