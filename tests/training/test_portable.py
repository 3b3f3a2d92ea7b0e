"""Weights and Adam moments go through every ZeRO stage and precision unchanged."""

import copy
import json

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from engines import PRECISIONS, engine_of

from fastelectra.training import engine, portable
from fastelectra.training.plain import PlainEngine


def advance(engine, batches, lr=1e-3):
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    for batch in batches:
        torch.manual_seed(batch.seed)
        if isinstance(engine, PlainEngine):
            engine.learn(batch)
        else:
            engine.backward(engine(batch)[0] * len(batches))
        engine.step()
    return portable.gather(engine)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_stage_continues_what_another_began(process, corpus, step_batches, precision):
    first, second = step_batches
    began = advance(engine_of(process, corpus, None, precision, 1), first)
    kept = copy.deepcopy(began)
    expected = None
    for stage in (0, 1, 2, 3, None):
        if stage is None and precision == "bf16, bf16 gradients":
            continue  # only DeepSpeed does that
        engine = engine_of(process, corpus, began[0], precision, stage)
        portable.restore(engine, *began, portable.torch_optimizer(engine).adam_step(1), {})
        assert isinstance(engine, PlainEngine) == (stage is None)
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
    for stage in (0, 1, None):
        engine = engine_of(process, corpus, None, "bf16", stage, bias_correction=True)
        updated.append(advance(engine, step_batches[0])[0])
    for name, weight in updated[0].items():
        torch.testing.assert_close(updated[1][name], weight, rtol=0, atol=5e-5)
        # DeepSpeed rounds gradients to bf16, and their sums, of which some cancel: then rounding is
        # all that Adam sees. The plain engine sums in fp32.
        off = (updated[2][name] - weight).abs()
        assert off.max() < 5e-4, name
        assert (off > 3e-4).double().mean() < 1e-4, name


@pytest.mark.parametrize(("stage", "other"), [(1, 2), (2, 3), (3, 1)])
def test_the_loss_scale_of_fp16_goes_on(process, corpus, step_batches, monkeypatch, stage, other):
    """CPUs can train in fp16, though so slowly that nobody is let."""
    monkeypatch.setattr(engine, "_precision", lambda *_: ("fp16", "for this test"))
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    fp16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1}
    monkeypatch.setitem(PRECISIONS, "fp16", {"fp16": fp16})
    began = engine_of(process, corpus, None, "fp16", stage)
    tensors = advance(began, step_batches[0])
    scale = portable.loss_scale(began)
    assert (scale["cur_scale"], scale["cur_iter"]) == (256, 1)
    assert json.loads(json.dumps(scale)) == scale
    went_on = engine_of(process, corpus, tensors[0], "fp16", other)
    adam_step = portable.torch_optimizer(went_on).adam_step(1)
    changed = scale | {"cur_scale": 128, "cur_hysteresis": 1}
    portable.restore(went_on, *tensors, adam_step, changed)
    restored = portable.loss_scale(went_on)
    assert restored == {key: changed[key] for key in restored}
    advance(went_on, step_batches[1])
    # doubled, since there were two updates without an overflow now
    assert portable.loss_scale(went_on)["cur_scale"] == 256
