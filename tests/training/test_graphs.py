"""The host's side of CUDA graphs, with a stand-in that keeps its memory as they do."""

import copy
import dataclasses

import pytest
import torch
from launching import tiny_config
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastelectra.config import config_from_dict
from fastelectra.data.batch import BatchShape
from fastelectra.data.shards import open_corpus
from fastelectra.data.stream import BatchStream, Position
from fastelectra.model.electra import Electra
from fastelectra.training.graphs import Graphs
from fastelectra.training.plain import PlainEngine
from fastelectra.training.update import Updater


def stand_in(function, sample):
    """Like torch.cuda.make_graphed_callables: inputs, outputs and gradients each keep one place."""
    places = [tensor for tensor in sample if tensor.requires_grad]
    outputs, gradients = [], [torch.zeros_like(place) for place in places]
    torch.rand(3)  # capturing draws from the generator

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            for place, tensor in zip(sample, tensors, strict=True):
                if place.data_ptr() != tensor.data_ptr():
                    place.copy_(tensor)
            with torch.enable_grad():
                loss, metrics = function(*sample)
            ctx.loss, ctx.names = loss, list(metrics)
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
        return loss, dict(zip(NAMES, values, strict=True))

    return call


def captured_stand_in(function):
    """Like `captured`: what the function returns keeps one place."""
    kept = []

    def replay():
        values, shape = tree_flatten(function())
        kept.extend(value.clone() for value in values[len(kept) :])
        for place, value in zip(kept, values, strict=True):
            place.copy_(value)
        return tree_unflatten(kept, shape)

    torch.rand(3)  # capturing draws from the generator
    return replay


NAMES = ["masked", "tokens", "mlm_loss", "mlm_correct", "replaced", "predicted", "disc_loss",
         "histogram"]  # fmt: skip


@pytest.fixture
def made(corpus, monkeypatch):
    """A model with dropout, and two batches."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    monkeypatch.setattr("fastelectra.training.graphs.captured", captured_stand_in)
    # on the CPU the model cuts padding off, which a graph cannot: fixed shapes as on a GPU
    monkeypatch.setattr("fastelectra.model.electra.real_part", lambda batch: batch)
    config = config_from_dict(tiny_config(corpus, "unused"))
    opened = open_corpus(corpus)
    shape = BatchShape.of(400, 64, 0.15)
    stream = BatchStream(opened.split("train"), opened.special, config.data, shape, 2, seed=0)
    torch.manual_seed(0)
    model = Electra(config.model, opened.vocab_size, config.objective)
    return model, next(stream.steps(Position(), 0, 0, 1))[0]


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


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_engine_makes_the_same_updates_of_replays(made, corpus, dtype, count):
    model, batches = made
    batches = [*batches, dataclasses.replace(batches[0], seed=5)]
    config = tiny_config(corpus, "unused", batch_tokens=400 * count, micro_batch_tokens=400)
    config["deepspeed"]["gradient_clipping"] = 0.5  # below the norm: Adam scales what replays wrote
    config, ways = config_from_dict(config), []
    for graphs in (False, True):
        engine = PlainEngine(copy.deepcopy(model), config, count, dtype)
        updater = Updater(engine, config, torch.device("cpu"), graphs=graphs)
        norms = [updater.update(step, batches[:count]) for step in (4, 5, 6)]
        assert norms[0] > 0.5
        scores = torch.tensor(list(updater.meter.read().values()))
        ways.append([torch.stack(norms), scores, *engine.module.parameters(),
                     *engine.masters.values()])  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*ways, strict=True))


def test_evaluation_is_not_replayed(made):
    model, batches = made
    model.forward = graphs = Graphs(model, torch.default_generator, accumulates=False)
    model.eval()
    with torch.no_grad():
        loss, _ = model(batches[0])
    assert graphs.captured is None
    assert not loss.requires_grad
