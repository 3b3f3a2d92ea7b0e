"""Weights and Adam moments go through every ZeRO stage and precision unchanged."""

import copy
import os

import pytest
import torch
from launching import LAUNCHED, tiny_config

from fastelectra.config import config_from_dict
from fastelectra.data.batch import BatchShape
from fastelectra.data.shards import open_corpus
from fastelectra.data.stream import BatchStream, Position
from fastelectra.model.electra import Electra
from fastelectra.training import launch, portable
from fastelectra.training.engine import plan_engine, start_engine


@pytest.fixture(scope="module")
def process():
    """A process group of one."""
    before = {name: os.environ.pop(name, None) for name in LAUNCHED}
    yield launch.prepare()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def step_batches(corpus):
    """The micro-batches of two steps."""
    config = config_from_dict(tiny_config(corpus, "unused"))
    opened = open_corpus(corpus)
    shape = BatchShape.of(400, 64, 0.15)
    stream = BatchStream(opened.split("train"), opened.special, config.data, shape, 2, seed=0)
    steps = stream.steps(Position(), 0, 0, 1)
    return [next(steps)[0] for _ in range(2)]


def engine_of(process, corpus, weights, precision, stage, **optimizer):
    config = tiny_config(corpus, "unused")
    config["optimizer"] |= optimizer
    config["deepspeed"] = {
        **PRECISIONS[precision],
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    config = config_from_dict(config)
    torch.manual_seed(0)
    model = Electra(config.model, 1000, config.objective)
    for name, value in (weights or {}).items():
        model.get_parameter(name).data.copy_(value)
    return start_engine(model, config, plan_engine(config, process))


def advance(engine, batches, lr=1e-3):
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    for batch in batches:
        torch.manual_seed(batch.seed)
        loss, _ = engine(batch)
        engine.backward(loss * len(batches))
        engine.step()
    return portable.gather(engine)


PRECISIONS = {
    "fp32": {"bf16": {"enabled": False}},
    "bf16": {"bf16": {"enabled": True}},  # gradients are summed in fp32 from stage 1 on
    "bf16, bf16 gradients": {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16"},
    },
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_stage_continues_what_another_began(process, corpus, step_batches, precision):
    first, second = step_batches
    began = advance(engine_of(process, corpus, None, precision, 1), first)
    kept = copy.deepcopy(began)
    expected = None
    for stage in (0, 1, 2, 3):
        engine = engine_of(process, corpus, began[0], precision, stage)
        portable.restore(engine, *began, portable.torch_optimizer(engine).adam_step(1))
        for ours, theirs in zip(portable.gather(engine), kept, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        went_on = advance(engine, second)
        expected = expected or went_on
        tolerance = 1e-6 if precision == "fp32" else 2e-3
        for ours, theirs in zip(went_on, expected, strict=True):
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance)
        moved = max((went_on[0][n] - kept[0][n]).abs().max().item() for n in kept[0])
        assert moved > 5e-4  # the step did something


def test_the_first_update_is_the_first_at_every_stage(process, corpus, step_batches):
    """DeepSpeed tries the optimizer out at stage 0 in 16 bit: bias correction must not see it."""
    updated = []
    for stage in (0, 1):
        engine = engine_of(process, corpus, None, "bf16", stage, bias_correction=True)
        updated.append(advance(engine, step_batches[0])[0])
    for name, weight in updated[0].items():
        torch.testing.assert_close(weight, updated[1][name], rtol=0, atol=5e-5)
