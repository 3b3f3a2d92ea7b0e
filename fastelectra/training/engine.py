"""The engine: DeepSpeed's section of the configuration checked and completed, and one started."""

import difflib
import json
import os
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch

from fastelectra.config import Config
from fastelectra.errors import FastElectraError
from fastelectra.kernels import dispatch
from fastelectra.model.electra import Electra
from fastelectra.training import launch
from fastelectra.training.launch import Process
from fastelectra.training.optimizer import PaperAdam, parameter_groups
from fastelectra.training.plain import PlainEngine

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

SET_BY = {  # keys of the section that other fields decide
    "train_batch_size": "training.batch_tokens",
    "train_micro_batch_size_per_gpu": "training.micro_batch_tokens",
    "gradient_accumulation_steps": "training.batch_tokens and micro_batch_tokens",
    "gradient_allreduce_op": "the trainer, which sums over the global batch",
    "optimizer": "the optimizer section",
    "scheduler": "optimizer.peak_lr and optimizer.warmup_steps",
    "tensor_parallel": "the trainer, which only shares batches among processes",
    "sequence_parallel_size": "the trainer, which only shares batches among processes",
    "torch_autocast": "deepspeed.bf16, with which the optimizer has weights in fp32 too",
}
PRECISIONS = ("bf16", "bfloat16", "fp16")  # keys by which a user may choose one


@dataclass(frozen=True)
class Plan:
    """What engine a run has, and what DeepSpeed is asked for."""

    section: dict  # the complete DeepSpeed configuration
    precision: str  # bf16, fp16 or fp32
    why: str  # this precision
    plain: bool  # who asks DeepSpeed for nothing does without it
    stage: int  # of ZeRO
    accumulation: int  # micro-batches of one rank in one step
    device: torch.device
    graphs: bool  # whether CUDA graphs are replayed

    @property
    def tells_norm(self) -> bool:
        """Whether the engine knows the gradients' norm: DeepSpeed at stage 0 in fp32 does not."""
        return self.plain or self.stage > 0 or self.precision != "fp32"


def plan_engine(config: Config, process: Process) -> Plan:
    """Check `config.deepspeed` and complete it. Raises FastElectraError naming the wrong field."""
    user = config.deepspeed
    for key in SET_BY.keys() & user.keys():
        raise FastElectraError(f"remove deepspeed.{key}: it is set by {SET_BY[key]}")
    if config.training.kernels == "triton" and dispatch.triton is None:
        raise FastElectraError("training.kernels is triton: pip install triton, or set it to auto")
    accumulation = launch.accumulation(config, process)
    parsed = _parse_section(user)
    device = launch.device()
    precision, why = _precision(user, parsed, device)
    zero = user.get("zero_optimization", {})
    if not zero.get("compute_grad_norm", True):
        raise FastElectraError(
            "remove deepspeed.zero_optimization.compute_grad_norm: a step whose gradients are not"
            " finite is known by their norm"
        )
    section = {
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,  # the trainer reports
        "zero_force_ds_cpu_optimizer": False,  # with offload too
        **user,
        "train_micro_batch_size_per_gpu": 1,  # a sample, to DeepSpeed, is a micro-batch
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {
            "stage": int(precision != "fp32"),
            "memory_efficient_linear": False,  # else stage 3 replaces F.linear everywhere
            **zero,
        },
    }
    if not any(key in user for key in PRECISIONS) and precision == "bf16":
        section["bf16"] = {"enabled": True}
    stage = parsed.zero_optimization_stage if "stage" in zero else int(precision != "fp32")
    if precision == "fp16" and stage == 0:
        raise FastElectraError(
            "deepspeed.fp16 needs deepspeed.zero_optimization.stage 1, 2 or 3: at stage 0 DeepSpeed"
            " does not scale the loss"
        )
    if precision == "bf16" and stage > 0:  # a sum of many micro-batches in bf16 would lose bits
        section["data_types"] = {"grad_accum_dtype": "fp32", **user.get("data_types", {})}
    graphs = config.training.cuda_graphs and device.type == "cuda" and stage < 3
    plain = precision != "fp16" and not _asks_for_more(user)
    stage = 0 if plain else stage
    return Plan(section, precision, why, plain, stage, accumulation, device, graphs)


def _asks_for_more(user: dict) -> bool:
    """Whether the section has anything that only DeepSpeed's engine does."""
    return bool(
        user.keys() - {"bf16", "gradient_clipping"} or user.get("bf16", {}).keys() - {"enabled"}
    )


def start_engine(
    model: Electra, config: Config, plan: Plan
) -> deepspeed.DeepSpeedEngine | PlainEngine:
    """Join the other ranks and hand the model to DeepSpeed, or to the plain engine.

    Raises FastElectraError for what only starting it shows, as an operation that CPUs lack.
    """
    if plan.device.type == "cpu":  # else it compiles an op that training never uses
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(verbose=False)
    if plan.plain:
        dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
        return PlainEngine(model.to(plan.device), config, plan.accumulation, dtype)
    groups = parameter_groups(model, config.optimizer.weight_decay)
    optimizer = PaperAdam(groups, config.optimizer)
    if PaperAdam not in ZERO_SUPPORTED_OPTIMIZERS:  # it is element-wise, as torch's own
        ZERO_SUPPORTED_OPTIMIZERS.append(PaperAdam)
    try:
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=plan.section)[0]
    except (AssertionError, ValueError, NotImplementedError) as error:
        raise FastElectraError(f"DeepSpeed cannot do what deepspeed asks: {error!r}") from error
    for state in optimizer.state.values():  # of a trial step that must not count (stage 0, 16 bit)
        state["step"].fill_(optimizer.adam_step(0))
    return engine


def _precision(user: dict, parsed: DeepSpeedConfig, device: torch.device) -> tuple[str, str]:
    """(name, reason): as asked, or what the hardware is fast at."""
    if parsed.float16_config.enabled and device.type == "cpu":
        raise FastElectraError("deepspeed.fp16: training on a CPU takes bf16 or fp32, not fp16")
    if any(key in user for key in PRECISIONS):
        chosen = {"fp16": parsed.float16_config.enabled, "bf16": parsed.bfloat16_config.enabled}
        return next((name for name, enabled in chosen.items() if enabled), "fp32"), "as asked"
    kind = "CPU" if device.type == "cpu" else "GPU"
    if launch.fast_at_bf16(device):
        return "bf16", f"this {kind} is fast at it"
    return "fp32", f"this {kind} has no fast bf16"


class _Asked(dict):
    """A section that notes which keys DeepSpeed looks up: those are the ones it knows."""

    known: ClassVar[set[str]] = set()  # shared with the copies DeepSpeed makes

    def __contains__(self, key):
        self.known.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.known.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.known.add(key)
        return super().get(key, default)

    def keys(self):
        return self


def _parse_section(user: dict) -> DeepSpeedConfig:
    """DeepSpeed ignores keys that it does not know and reports others at length: ask it here."""
    for key, value in user.items():
        where = f"deepspeed.{key}"
        if key in (*PRECISIONS, "zero_optimization") and not isinstance(value, dict):
            raise FastElectraError(f"{where} must be an object, got {json.dumps(value)}")
        _parse({key: value}, where)
    parsed = _parse(user, "deepspeed")
    for key in user.keys() - _Asked.known:
        raise FastElectraError(f"unknown field deepspeed.{key}{_nearest(key, _Asked.known)}")
    clip = user.get("gradient_clipping", 1.0)
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 <= clip < float("inf"):
        raise FastElectraError(f"deepspeed.gradient_clipping must be a number ≥ 0, got {clip!r}")
    return parsed


def _parse(section: dict, where: str) -> DeepSpeedConfig:
    if '"auto"' in json.dumps(section):
        raise FastElectraError(f'{where}: DeepSpeed does not understand "auto": remove that field')
    try:
        return DeepSpeedConfig(_Asked(section, train_micro_batch_size_per_gpu=1))
    except (TypeError, AttributeError):
        raise FastElectraError(f"{where} is not of the type that DeepSpeed expects") from None
    except Exception as error:  # its own, pydantic's, bare assertions
        if not hasattr(error, "errors"):
            raise FastElectraError(f"{where}: {error}") from None
        first = error.errors()[0]
        field = ".".join([where, *map(str, first["loc"])])
        if first["type"] != "extra_forbidden":
            raise FastElectraError(f"{field}: {first['msg']}, got {first['input']!r}") from None
        names = {n for kind in DeepSpeedConfigModel.__subclasses__() for n in kind.model_fields}
        hint = _nearest(str(first["loc"][-1]), names)
        raise FastElectraError(f"unknown field {field}{hint}") from None


def _nearest(name: str, names: set[str]) -> str:
    near = difflib.get_close_matches(name, map(str, names), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
