"""The host's side of CUDA graphs, with a stand-in that keeps its memory as they do."""

import copy
import dataclasses
import math

import pytest
import torch
from launching import model_and_batches, tiny_config
from recording import captured_stand_in

from fastelectra import kernels
from fastelectra.config import config_from_dict
from fastelectra.training.graphs import Graphs
from fastelectra.training.plain import PlainEngine
from fastelectra.training.update import Updater


def stand_in(function, sample):
    """Like torch.cuda.make_graphed_callables: inputs, outputs and gradients each keep one place."""
    places = [tensor for tensor in sample if tensor.requires_grad]
    outputs, names, gradients = [], [], [torch.zeros_like(place) for place in places]
    torch.rand(3)  # capturing draws from the generator

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            for place, tensor in zip(sample, tensors, strict=True):
                if place.data_ptr() != tensor.data_ptr():
                    place.copy_(tensor)
            with torch.enable_grad():
                loss, metrics = function(*sample)
            ctx.loss, names[:] = loss, list(metrics)
            values = [loss.detach(), *metrics.values()]
            if not outputs:
                outputs.extend(value.clone() for value in values)
            for place, value in zip(outputs, values, strict=True):
                place.copy_(value)
            return tuple(place.detach() for place in outputs)

        @staticmethod
        def backward(ctx, d_loss, *_):
            found = torch.autograd.grad(ctx.loss, places, d_loss)
            for place, g in zip(gradients, found, strict=True):
                place.copy_(g)
            others = [None] * (len(sample) - len(places))
            return (*others, *[place.detach() for place in gradients])

    def call(*tensors):
        loss, *values = Replayed.apply(*tensors)
        return loss, dict(zip(names, values, strict=True))

    return call


@pytest.fixture
def made(corpus, monkeypatch):
    """A model with dropout, and two batches."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    monkeypatch.setattr("fastelectra.training.graphs.captured", captured_stand_in)
    # on the CPU the model cuts padding off, which a graph cannot: fixed shapes as on a GPU
    monkeypatch.setattr("fastelectra.model.electra.real_part", lambda batch: batch)
    return model_and_batches(corpus, 2)[1:]


def gradients_of(model, forward, batches):
    model.zero_grad()
    losses = []
    for batch in batches:
        torch.manual_seed(batch.seed)
        loss, metrics = forward(batch)
        losses += [loss.item(), *(value.sum().item() for value in metrics.values())]
        assert not any(value.requires_grad for value in metrics.values())
        loss.backward()
    return losses, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("count", [1, 2])
def test_replays_are_the_step_also_where_gradients_add_up(made, count):
    model, batches = made
    names = [name for name, _ in model.named_parameters()]
    eager = model.forward
    losses, gradients = gradients_of(model, eager, batches[:count])
    model.forward = Graphs(model, torch.default_generator, accumulates=count > 1)
    for _ in range(2):  # with the capture, and without
        again, replayed = gradients_of(model, model, batches[:count])
        assert again == losses
        assert all(torch.equal(a, b) for a, b in zip(replayed, gradients, strict=True))
    assert [name for name, _ in model.named_parameters()] == names


def updates(model, batches, corpus, dtype, graphs, device="cpu"):
    """Norms, scores, parameters and weights after four updates; the second's loss is NaN."""
    count = len(batches)
    config = tiny_config(corpus, "unused", batch_tokens=400 * count, micro_batch_tokens=400)
    config["deepspeed"]["gradient_clipping"] = 0.5  # below the norm: Adam scales what replays wrote
    config = config_from_dict(config)
    engine = PlainEngine(copy.deepcopy(model).to(device), config, count, dtype)
    updater = Updater(engine, config, torch.device(device), graphs=graphs)
    bad = [dataclasses.replace(batches[0], totals=torch.full((2,), math.nan)), *batches[1:]]
    norms = [updater.update(3 + n, bad if n == 1 else batches) for n in range(4)]
    assert norms[0] > 0.5
    assert norms[1].isnan()
    updater.skips.read()
    assert updater.skips.total == 1
    scores = torch.tensor(list(updater.meter.read().values()))
    return [torch.stack(norms), scores, *engine.module.parameters(), *engine.weights]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_engine_makes_the_same_updates_of_replays(made, corpus, dtype, count):
    model, batches = made
    batches = [*batches, dataclasses.replace(batches[0], seed=5)][:count]
    kernels.set_backend("torch")  # loops on the CPU are no calls on tensors
    try:
        ways = [updates(model, batches, corpus, dtype, graphs) for graphs in (False, True)]
    finally:
        kernels.set_backend("auto")
    for eager, replayed in zip(*ways, strict=True):
        torch.testing.assert_close(replayed, eager, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("graphs", [False, True])
def test_ranks_sum_their_gradients_between_replays(made, corpus, monkeypatch, dtype, graphs):
    """Two ranks of the same batches, the other one's part played by doubling: as one rank alone."""
    model, batches = made
    kernels.set_backend("torch")
    try:
        alone = updates(model, batches, corpus, dtype, graphs=False)
        distributed = torch.distributed
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(distributed, "get_rank", lambda: 0)
        sent = []
        monkeypatch.setattr(distributed, "broadcast", lambda tensor, source: sent.append(source))
        monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.mul_(2))
        halves = [dataclasses.replace(batch, totals=2 * batch.totals) for batch in batches]
        together = updates(model, halves, corpus, dtype, graphs)
    finally:
        kernels.set_backend("auto")
    assert sent == [0, 0]  # what has weight decay, and what has none
    del together[1], alone[1]  # scores, which are summed too
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures graphs")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_makes_the_same_updates_of_replays(corpus, dtype, count):
    _, model, batches = model_and_batches(corpus, 2)
    batches = [*batches, dataclasses.replace(batches[0], seed=5)][:count]
    ways = [updates(model, batches, corpus, dtype, graphs, "cuda:0") for graphs in (False, True)]
    for eager, replayed in zip(*ways, strict=True):  # FlashAttention adds in any order
        torch.testing.assert_close(replayed, eager, rtol=0.02, atol=0.02, equal_nan=True)


def test_evaluation_is_not_replayed(made):
    model, batches = made
    model.forward = graphs = Graphs(model, torch.default_generator, accumulates=False)
    model.eval()
    with torch.no_grad():
        loss, _ = model(batches[0])
    assert graphs.captured is None
    assert not loss.requires_grad
