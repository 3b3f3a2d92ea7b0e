"""Full fp32 weights and Adam moments by parameter name, out of and into any engine.

DeepSpeed's own checkpoints fit one number of ranks and one ZeRO stage; these fit all. In the plain
engine parameters are parts of a few tensors; at stage 0 the torch optimizer holds each (in 16 bit
an fp32 copy of it); in stages 1 to 3 it holds this rank's parts in flat buffers, reached through
DeepSpeed's `safe_*` functions.
"""

import torch
import torch.nn.functional as F
from deepspeed import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from fastelectra.training.checkpoint import SCALE_KEYS, Tensors
from fastelectra.training.optimizer import MOMENT_KEYS
from fastelectra.training.plain import PlainEngine

Engine = DeepSpeedEngine | PlainEngine


def gather(engine: Engine) -> tuple[Tensors, Tensors]:
    """(weights, moments): this rank's share of them, in fp32 on the host; all ranks call it.

    Moments are named {parameter}.exp_avg and {parameter}.exp_avg_sq. A share is about 1/ranks of
    12 bytes a parameter; while it is put together each rank holds one whole parameter more.
    """
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        _link_states(engine)
    read = _read_parts if stage else _read_whole(engine)
    owners = _owners(engine)
    weights, moments = {}, {}
    for name, parameter in engine.module.named_parameters():
        weight, *states = read(parameter)
        if engine.global_rank == owners[name]:
            weights[name] = _to_host(weight)
            for key, state in zip(MOMENT_KEYS, states, strict=True):
                moments[f"{name}.{key}"] = _to_host(state)
    return weights, moments


def _owners(engine: Engine) -> dict[str, int]:
    """The rank that saves each parameter, largest first to the one with least to save."""
    sizes = {name: getattr(parameter, "ds_numel", parameter.numel())  # stage 3 has parts only
             for name, parameter in engine.module.named_parameters()}  # fmt: skip
    loads, owners = [0] * engine.world_size, {}
    for name in sorted(sizes, key=sizes.get, reverse=True):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def loss_scale(engine: Engine) -> dict[str, float]:
    """The state of DeepSpeed's dynamic loss scale: some of SCALE_KEYS, none but in fp16."""
    scaler = _scaler(engine)
    return {key: getattr(scaler, key) for key in SCALE_KEYS if hasattr(scaler, key)}


def _scaler(engine: Engine) -> object | None:
    """What holds the dynamic loss scale: stages 1 to 3 have one class for it, stage 0 another."""
    for name, dynamic in (("loss_scaler", "dynamic"), ("loss_scale_config", "dynamic_loss_scale")):
        scaler = getattr(engine.optimizer, name, None)
        if getattr(scaler, dynamic, False):
            return scaler
    return None


def restore(
    engine: Engine,
    weights: Tensors,
    moments: Tensors,
    adam_step: float,
    scale: dict[str, float],
) -> None:
    """Put what `gather` gave, on all ranks, into an engine of any stage, precision and world.

    `scale` is what `loss_scale` gave; an engine that has none does without.
    """
    scaler = _scaler(engine)
    for key, value in scale.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)
    prepare = {0: _write_whole, 3: _write_shard}.get(engine.zero_optimization_stage(), _write_parts)
    write = prepare(engine, adam_step)
    for name, parameter in engine.module.named_parameters():
        write(parameter, weights[name], {key: moments[f"{name}.{key}"] for key in MOMENT_KEYS})


def torch_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The engine's optimizer, without the wrapper that DeepSpeed may have put around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _masters(engine: Engine) -> dict[torch.Tensor, torch.Tensor]:
    """Stage 0: the tensor that the optimizer updates for each parameter of the module."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp16_groups"):  # also bf16
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {half: full for pair in groups for half, full in zip(*pair, strict=True)}
    return {parameter: parameter for parameter in engine.module.parameters()}


def _read_whole(engine: Engine):
    if isinstance(engine, PlainEngine):
        states = engine.states()
        return lambda p: [places[p] for places in states]
    masters, state = _masters(engine), torch_optimizer(engine).state
    return lambda p: [masters[p], *(state[masters[p]][key] for key in MOMENT_KEYS)]


def _write_whole(engine: Engine, adam_step: float):
    if isinstance(engine, PlainEngine):
        return _write_plain(engine, adam_step)
    masters, state = _masters(engine), torch_optimizer(engine).state

    def write(parameter: torch.Tensor, weight: torch.Tensor, moments: Tensors) -> None:
        master = masters[parameter]
        master.data.copy_(weight)
        state[master] = {key: value.to(master.device, copy=True) for key, value in moments.items()}
        state[master]["step"] = torch.tensor(adam_step, device=master.device)

    return write


def _write_plain(engine: PlainEngine, adam_step: float):
    for state in engine.optimizer.state.values():
        state["step"].fill_(adam_step)
    states = engine.states()

    def write(parameter: torch.Tensor, weight: torch.Tensor, moments: Tensors) -> None:
        for places, value in zip(states, (weight, *moments.values()), strict=True):
            places[parameter].copy_(value)
        parameter.data.copy_(weight)

    return write


def _read_parts(parameter: torch.Tensor) -> list[torch.Tensor]:
    """Stages 1 to 3: put together from all ranks."""
    states = (safe_get_full_optimizer_state(parameter, key) for key in MOMENT_KEYS)
    return [safe_get_full_fp32_param(parameter), *states]


def _fresh_states(engine: Engine, buffers: list[torch.Tensor], adam_step: float) -> None:
    for buffer in buffers:
        state = {key: torch.zeros_like(buffer) for key in MOMENT_KEYS}
        state["step"] = torch.tensor(adam_step, device=buffer.device)
        torch_optimizer(engine).state[buffer] = state


def _link_states(engine: Engine) -> None:
    """Stages 1 and 2: let `safe_*` find the optimizer's states.

    DeepSpeed does it after the first update of the first group, when the others have none yet.
    """
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def _write_parts(engine: Engine, adam_step: float):
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # bf16 accumulating gradients in fp32
        _fresh_states(engine, optimizer.fp32_groups_flat_partition, adam_step)
    else:
        _fresh_states(engine, optimizer.single_partition_of_fp32_groups, adam_step)
    _link_states(engine)

    def write(parameter: torch.Tensor, weight: torch.Tensor, moments: Tensors) -> None:
        safe_set_full_fp32_param(parameter, weight)
        for key, value in moments.items():
            safe_set_full_optimizer_state(parameter, value, key)

    return write


def _write_shard(engine: Engine, adam_step: float):
    _fresh_states(engine, engine.optimizer.fp32_partitioned_groups_flat, adam_step)

    def write(parameter: torch.Tensor, weight: torch.Tensor, moments: Tensors) -> None:
        size = safe_get_local_fp32_param(parameter).numel()

        def mine(full: torch.Tensor) -> torch.Tensor:
            padded = F.pad(full.flatten(), (0, size * engine.world_size - full.numel()))
            return padded[size * engine.global_rank :][:size]

        safe_set_local_fp32_param(parameter, mine(weight))
        for key, value in moments.items():
            safe_set_local_optimizer_state(parameter, mine(value), key)

    return write
