"""The plain engine: gradients are those of the model's loss, whatever the networks share."""

import copy
import dataclasses
from contextlib import contextmanager

import pytest
import torch
from launching import model_and_batches

from fastelectra.config import OBJECTIVES
from fastelectra.training import plain, portable
from fastelectra.training.plain import PlainEngine, total_norm


class Stream:
    """Stands in for a CUDA stream: notes what waits for what."""

    def __init__(self, name, log):
        self.name, self.log, self.device = name, log, None

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


def test_the_generators_backward_needs_its_forward_and_the_sum_needs_both(corpus, monkeypatch):
    """What runs in which stream, in the order of launches: as far as a CPU can tell."""
    config, model, batches = model_and_batches(corpus, 1)
    engine, log = PlainEngine(model, config, 1, torch.float32), []
    here = where = Stream("here", log)
    engine.aside = Stream("aside", log)

    @contextmanager
    def entered(stream):
        nonlocal where
        where = stream
        yield
        where = here

    def noted(name, function):
        def call(*arguments):
            log.append(f"{name}: {where.name}")
            return function(*arguments)

        return call

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    for network in (model.generator, model.discriminator):
        name = "generator" if network is model.generator else "discriminator"
        monkeypatch.setattr(network, "forward", noted(name, network.forward))
    monkeypatch.setattr(engine, "_gradients", noted("backward", engine._gradients))
    monkeypatch.setattr(engine, "_add", noted("sum", engine._add))
    engine.learn(batches[0])
    assert log == [
        "aside waits for here", "generator: aside", "here waits for aside", "backward: aside",
        "sum: aside", "discriminator: here", "backward: here", "here waits for aside", "sum: here",
    ]  # fmt: skip


CASES = [("electra", sharing) for sharing in ("all", "tokens", "none")]
CASES += [(objective, "all") for objective in OBJECTIVES if objective != "electra"]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("objective", "sharing"), CASES)
def test_gradients_are_those_of_the_sum_of_the_losses(corpus, objective, sharing, count):
    config, model, batches = model_and_batches(corpus, count, objective, sharing)
    engine = PlainEngine(copy.deepcopy(model), config, count, torch.float32)
    for _ in range(2):  # the second step's overwrite those of the first
        model.zero_grad()
        for batch in batches:
            torch.manual_seed(batch.seed)
            loss, expected = model(batch)
            loss.backward()
            torch.manual_seed(batch.seed)
            metrics, valid = engine.learn(batch)
            assert valid
            assert metrics.keys() == expected.keys()
            assert all(torch.equal(metrics[name], expected[name]) for name in expected)
            engine.micro_steps += 1
    named = dict(model.named_parameters())
    for name, parameter in engine.module.named_parameters():
        gradient = named[name].grad
        difference = (engine.places[parameter] - gradient).norm()
        assert difference <= 1e-6 * gradient.norm()


@pytest.mark.parametrize(
    ("size", "count"), [(1, 1), (3 * plain.PIECE + 1, 4), (plain.SMALL - 1, 128), (plain.SMALL, 1)]
)
def test_adam_has_pieces_that_begin_where_vectors_do(size, count):
    pieces = plain._pieces(torch.arange(float(size)))
    assert torch.equal(torch.cat(pieces), torch.arange(float(size)))
    assert len(pieces) == count
    assert all(len(piece) % plain.ALIGNED == 0 for piece in pieces[:-1])


def test_a_resumed_run_goes_on_counting_updates(corpus):
    config, model, _ = model_and_batches(corpus, 1)
    counting = dataclasses.replace(config.optimizer, bias_correction=True)
    config = dataclasses.replace(config, optimizer=counting)
    engine = PlainEngine(model, config, 1, torch.float32)
    portable.restore(engine, *portable.gather(engine), engine.optimizer.adam_step(7), {})
    assert {state["step"].item() for state in engine.optimizer.state.values()} == {7.0}


def test_the_norm_of_many_numbers():
    gradients = torch.randn(2**25, generator=torch.Generator().manual_seed(0)).mul_(1e-4)
    both = [gradients, gradients[:1000] * 100]
    exact = torch.cat(both).double().norm()
    assert abs(total_norm(both) / exact - 1) < 1e-6
