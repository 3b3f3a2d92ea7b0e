"""A loss or a gradient that is not a number: the update is skipped, weights and moments stay."""

import math

import pytest
import torch
from engines import config_of, engine_of

from fastelectra.training import portable
from fastelectra.training.update import Updater


def spoil_nothing(loss):
    return loss


def make_nan(loss):
    return loss * math.nan


def make_infinite(loss):
    """The gradients stay finite."""
    return loss + math.inf


class Spoiled(torch.autograd.Function):
    """The loss as it is; its gradient is multiplied."""

    @staticmethod
    def forward(ctx, loss, factor):
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def make_gradients_infinite(loss):
    return Spoiled.apply(loss, math.inf)


def make_norm_infinite(loss):
    """Most gradients are finite."""
    return Spoiled.apply(loss, 1e38)


FAULTS = [make_nan, make_infinite, make_gradients_infinite, make_norm_infinite]


def updated(process, corpus, steps, precision, stage, spoilers):
    """(weights, moments) after each update; one loss of its last micro-batch goes through
    the spoiler, the generator's and the main network's in turns."""
    config = config_of(corpus, precision, stage, bias_correction=True)
    engine = engine_of(process, corpus, None, precision, stage, bias_correction=True)
    updater = Updater(engine, config, torch.device("cpu"), stage != 0 or precision != "fp32")
    losses, states = engine.module.losses, []

    def spoiled(batch):
        for number, (loss, metrics) in enumerate(losses(batch)):
            here = batch.seed == batches[-1].seed and number != len(states) % 2
            yield (spoil(loss) if here else loss), metrics

    engine.module.losses = spoiled
    for batches, spoil in zip(steps, spoilers, strict=True):
        norm = float(updater.update(4, batches))
        assert math.isfinite(norm) == (spoil is spoil_nothing)
        states.append(portable.gather(engine))
    skipped = sum(spoil is not spoil_nothing for spoil in spoilers)
    updater.skips.read()
    assert (updater.skips.total, updater.skips.longest) == (skipped, skipped)
    return states


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_an_update_without_numbers_changes_nothing(process, corpus, step_batches, precision, stage):
    first, second = step_batches
    good = updated(process, corpus, step_batches, precision, stage, [spoil_nothing] * 2)
    steps = [first, *[second] * len(FAULTS), second]
    spoilers = [spoil_nothing, *FAULTS, spoil_nothing]
    states = updated(process, corpus, steps, precision, stage, spoilers)
    for state in states[:-1]:
        assert_equal(state, good[0])
    assert_equal(states[-1], good[1])
    assert not torch.equal(states[-1][0]["embeddings.word"], good[0][0]["embeddings.word"])
