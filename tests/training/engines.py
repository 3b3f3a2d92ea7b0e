"""Engines of every stage and precision, for tests in this process; stage None is the plain one."""

import torch
from launching import tiny_config

from fastelectra.config import Config, config_from_dict
from fastelectra.model.electra import Electra
from fastelectra.training.engine import plan_engine, start_engine

PRECISIONS = {
    "fp32": {"bf16": {"enabled": False}},
    "bf16": {"bf16": {"enabled": True}},  # gradients are summed in fp32 from stage 1 on
    "bf16, bf16 gradients": {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16"},
    },
}


def config_of(corpus, precision, stage, **optimizer) -> Config:
    """The tiny configuration at a stage and precision."""
    config = tiny_config(corpus, "unused")
    config["optimizer"] |= optimizer
    config["deepspeed"] = dict(PRECISIONS[precision])
    if stage is not None:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config["deepspeed"]["zero_optimization"] = zero
    return config_from_dict(config)


def engine_of(process, corpus, weights, precision, stage, **optimizer):
    """An engine of the tiny model with given weights, or those of seed 0."""
    config = config_of(corpus, precision, stage, **optimizer)
    torch.manual_seed(0)
    model = Electra(config.model, 1000, config.objective)
    for name, value in (weights or {}).items():
        model.get_parameter(name).data.copy_(value)
    return start_engine(model, config, plan_engine(config, process))
