"""The whole configuration: JSON in, strict; every field is documented here and only here.

Defaults are the paper's (arXiv 2003.10555, table 6, ELECTRA-small); the files in configs/ state
what a preset changes. An unknown field is an error that names the nearest valid one, an ill-typed
one says what it takes.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os.path
import typing
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fastelectra.errors import FastElectraError


@dataclass
class ModelConfig:
    """Sizes of the discriminator, and of the generator as a fraction of them."""

    layers: int = 12  # of both networks
    hidden_size: int = 256
    intermediate_size: int = 1024  # of the feed-forward layers
    heads: int = 4
    embedding_size: int = 128  # shared by both networks
    generator_fraction: float = 0.25  # of hidden size, feed-forward size and heads
    max_positions: int = 512  # rows of the position table
    dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02  # σ of tables and matrices; a narrow model starts better at .08
    embedding_sharing: str = "all"  # all | tokens (the word table alone) | none


@dataclass
class DataConfig:
    """Which prepared corpus, and how examples are cut from it and masked."""

    path: str = ""  # folder written by `fastelectra prepare`
    max_length: int = 128  # tokens of an example, [CLS] and [SEP] included
    mask_fraction: float = 0.15  # of an example's tokens are chosen for prediction
    google_parity: bool = False  # drop truncated tails, mask with replacement, as google-research


@dataclass(frozen=True)
class Objective:
    """What the main network, the one that is kept, learns."""

    generator: bool = True  # fills in what is masked; else the main network sees [MASK]
    detects: bool = True  # which tokens were replaced; else it predicts the original ones
    everywhere: bool = True  # at all tokens; else at the chosen ones only


OBJECTIVES = {  # paper section 3.4
    "electra": Objective(),
    "electra_15": Objective(everywhere=False),
    "replace_mlm": Objective(detects=False, everywhere=False),
    "all_tokens_mlm": Objective(detects=False),  # it may copy the token it sees
    "mlm": Objective(generator=False, detects=False, everywhere=False),  # BERT, without NSP
}


@dataclass
class ObjectiveConfig:
    """What is learnt, the weights of the losses, the generator's sampling (sections 3.2, 3.4).

    Each loss is a mean over the tokens that are predicted. `mlm` masks as the generator's input is
    masked (85 % [MASK], 15 % kept), as Google's code does; what is said of the generator has no
    effect there.
    """

    name: str = "electra"  # electra | electra_15 | replace_mlm | all_tokens_mlm | mlm
    generator_weight: float = 1.0
    discriminator_weight: float = 50.0  # a main network that predicts tokens instead weighs 1
    temperature: float = 1.0  # of the softmax the replacements are drawn from
    disallow_correct: bool = False  # never draw the original token

    @property
    def kind(self) -> Objective:
        """What `name` stands for."""
        return OBJECTIVES[self.name]

    @property
    def main_weight(self) -> float:
        """Of the main network's loss."""
        return self.discriminator_weight if self.kind.detects else 1.0


@dataclass
class OptimizerConfig:
    """Adam as the paper uses it. The clip norm is `deepspeed.gradient_clipping` (default 1.0)."""

    peak_lr: float = 5e-4
    warmup_steps: int = 10_000
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6
    weight_decay: float = 0.01  # not on biases and LayerNorm
    bias_correction: bool = False


@dataclass
class TrainingConfig:
    """The run: its length, batch, outputs and how often it reports."""

    output_dir: str = ""  # run folder; the same command with the same folder resumes
    steps: int = 1_000_000
    batch_tokens: int = 16_384  # token budget of one optimizer step, over all ranks
    micro_batch_tokens: int = 16_384  # token budget of one forward pass on one rank
    seed: int = 0
    init_from: str = ""  # folder written by `fastelectra import`: weights to start from
    kernels: str = "auto"  # auto | triton (attention on more GPUs) | torch
    cuda_graphs: bool = True  # a step in a few launches, up to ZeRO stage 2
    log_every: int = 100  # steps
    eval_every: int = 5_000
    eval_tokens: int = 500_000  # at most so many held-out tokens an evaluation
    checkpoint_every: int = 5_000
    keep_last: int = 3  # checkpoints kept
    keep_every: int = 0  # steps: checkpoints of a multiple are kept for good; 0: none
    stop_when_not_saved: bool = True  # false: go on, unless it is the last that cannot be written
    max_skipped: int = 20  # updates in a row without numbers, each skipped, that end the run
    tensorboard: bool = True  # where the package is installed
    wandb_project: str = ""  # empty: off

    @property
    def micro_batches(self) -> int:
        """Forward passes of one step, over all ranks."""
        return self.batch_tokens // self.micro_batch_tokens


SHORTEST = 5  # tokens of an example: two segments of one, [CLS] and two [SEP]
PATHS = (("data", "path"), ("training", "output_dir"), ("training", "init_from"))


@dataclass
class Config:
    """A run. `deepspeed` goes to DeepSpeed as it is, batch sizes added by the trainer; where it
    asks for no more than bf16 and clipping, training does without DeepSpeed's engine."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    deepspeed: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The configuration as plain JSON values."""
        return dataclasses.asdict(self)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and --set, for `load_config`."""
    parser.add_argument(
        "--config",
        required=True,
        type=os.path.expanduser,
        metavar="FILE",
        help="JSON, see configs/",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE",
        help="override one field; may be repeated",
    )  # fmt: skip


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a JSON file, apply `section.field=value` overrides, check everything.

    Raises FastElectraError for an unreadable file, bad JSON, or a bad field or value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # as some editors write it
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise FastElectraError(f"cannot read the config {path}: {reason}") from None
    try:
        values = json.loads(text, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise FastElectraError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise FastElectraError(f"{path}: expected an object of sections, got {_kind(values)}")
    for override in overrides:
        _apply_override(values, override)
    return config_from_dict(values, str(path))


def _once_each(pairs: list[tuple[str, typing.Any]]) -> dict:
    """A JSON object; ValueError if a name comes twice, of which Python keeps the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice in one object")
    return values


def config_from_dict(values: dict, where: str = "config") -> Config:
    """Build and check a Config from plain values; `where` names their source in errors.

    A `~` at the start of a path is the user's home, which a shell leaves alone after `=`.
    """
    config = _build(Config, values, where, "")
    for section, name in PATHS:
        values = getattr(config, section)
        setattr(values, name, os.path.expanduser(getattr(values, name)))
    _check_values(config, where)
    return config


def _apply_override(values: dict, override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.strip().split(".")
    if not separator or len(keys) < 2 or not all(keys):
        raise FastElectraError(f"--set {override}: expected section.field=value")
    value = _value(text, dict(_fields()).get(name.strip()))
    target = values
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise FastElectraError(f"--set {override}: {key} is not a section")
    target[keys[-1]] = value


def _value(text: str, kind: type | None):
    """What stands behind `=`: JSON, a number as .5, or a bare word."""
    if kind is str and not text.startswith('"'):
        return text
    for read in (json.loads, float) if kind in (int, float) else (json.loads,):
        with suppress(ValueError, RecursionError):
            return read(text)
    return text


def _build(cls, values, where: str, prefix: str):
    if not isinstance(values, dict):
        raise FastElectraError(f"{where}: {prefix[:-1]} must be an object, got {_kind(values)}")
    types = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in types:
            raise FastElectraError(f"{where}: unknown field {prefix}{name}{_hint(name, prefix)}")
        if dataclasses.is_dataclass(types[name]):
            arguments[name] = _build(types[name], value, where, f"{prefix}{name}.")
        else:
            arguments[name] = _checked(types[name], value, where, f"{prefix}{name}")
    return cls(**arguments)


def _hint(name: str, prefix: str) -> str:
    """The nearest valid name: in the same section first, then anywhere."""
    everywhere = [path for path, _ in _fields()]
    siblings = [path for path in everywhere if path.rpartition(".")[0] == prefix.rstrip(".")]
    for paths in (siblings, everywhere):
        leaves = {path.rpartition(".")[2]: path for path in paths}
        near = difflib.get_close_matches(name, leaves, n=1, cutoff=0.7)
        near = near or [leaf for leaf in leaves if leaf.startswith(f"{name}_")]
        if near:
            return f"; did you mean {leaves[near[0]]}?"
    return f"; valid here: {', '.join(path.rpartition('.')[2] for path in siblings)}"


def _fields(cls=Config, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every section and field by its path, and its type."""
    for name, kind in typing.get_type_hints(cls).items():
        yield prefix + name, kind
        if dataclasses.is_dataclass(kind):
            yield from _fields(kind, f"{prefix}{name}.")


def _checked(kind: type, value, where: str, name: str):
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf  # which no field takes
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e6 steps
    if type(value) is not kind:
        raise FastElectraError(f"{where}: {name} must be {_NAMES[kind]}, got {_kind(value)}")
    return value


_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false",
          dict: "an object"}  # fmt: skip


def _kind(value) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_values(config: Config, where: str) -> None:
    """Reject values that no run could use, naming the field."""
    model, data, objective, optimizer, training = (
        config.model, config.data, config.objective, config.optimizer, config.training)  # fmt: skip

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise FastElectraError(f"{where}: {message}")

    for name, value, valid in (
        ("objective.name", objective.name, tuple(OBJECTIVES)),
        ("model.embedding_sharing", model.embedding_sharing, ("all", "tokens", "none")),
    ):
        near = difflib.get_close_matches(value, valid, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        require(value in valid, f"{name} must be {_either(valid)}, got {value!r}{hint}")
    positive = {
        "model": ("layers", "hidden_size", "intermediate_size", "heads", "embedding_size",
                  "max_positions", "initializer_range"),
        "objective": ("temperature",),
        "optimizer": ("peak_lr", "epsilon"),
        "training": ("steps", "batch_tokens", "micro_batch_tokens", "log_every", "eval_every",
                     "eval_tokens", "checkpoint_every", "keep_last", "max_skipped"),
    }  # fmt: skip
    for section, names in positive.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            limit = float("inf") if isinstance(value, float) else 2**53
            require(
                0 < value < limit,
                f"{section}.{name} must be above 0 and below {limit:.2g}, got {value}",
            )
    for name in ("generator_weight", "discriminator_weight"):
        value = getattr(objective, name)
        require(0 <= value < float("inf"), f"objective.{name} must be 0 or more, got {value}")
    for section, name in (("model", "dropout"), ("model", "attention_dropout"),
                          ("optimizer", "beta1"), ("optimizer", "beta2")):  # fmt: skip
        value = getattr(getattr(config, section), name)
        require(0 <= value < 1, f"{section}.{name} must be in [0, 1), got {value}")
    require(optimizer.warmup_steps >= 0, "optimizer.warmup_steps must be 0 or more")
    require(0 <= optimizer.weight_decay < float("inf"), "optimizer.weight_decay must be ≥ 0")
    require(0 <= training.keep_every < 2**53, "training.keep_every must be 0 or more")
    require(0 <= training.seed < 2**63, "training.seed must be in [0, 2^63)")
    require(0 < data.mask_fraction < 1, "data.mask_fraction must be between 0 and 1")
    require(0 < model.generator_fraction <= 1, "model.generator_fraction must be in (0, 1]")
    require(
        model.hidden_size % model.heads == 0,
        f"model.heads = {model.heads} does not divide hidden_size = {model.hidden_size}",
    )
    hidden, heads = generator_sizes(model)[0], generator_sizes(model)[2]
    require(
        hidden >= 1 and hidden % heads == 0,
        f"model.generator_fraction = {model.generator_fraction} gives a generator of hidden"
        f" size {hidden} with {heads} heads, which do not divide it",
    )
    require(
        SHORTEST <= data.max_length <= model.max_positions,
        f"data.max_length = {data.max_length} must be between {SHORTEST} and model.max_positions ="
        f" {model.max_positions}: lower it or raise model.max_positions",
    )
    require(
        training.micro_batch_tokens >= data.max_length,
        f"training.micro_batch_tokens = {training.micro_batch_tokens} is below data.max_length"
        f" = {data.max_length}: not one example would fit",
    )
    require(
        training.batch_tokens % training.micro_batch_tokens == 0,
        f"training.batch_tokens = {training.batch_tokens} is not a multiple of"
        f" training.micro_batch_tokens = {training.micro_batch_tokens}",
    )
    require(
        objective.kind.generator
        or not (objective.disallow_correct or model.embedding_sharing != "all"),
        f"objective.name = {objective.name} trains no generator: leave objective.disallow_correct"
        " and model.embedding_sharing out",
    )
    require(
        objective.name != "electra_15" or not objective.disallow_correct,
        "with objective.disallow_correct every token that electra_15 judges is a fake: leave it out"
        " or set objective.name to electra",
    )
    require(
        training.kernels in ("auto", "triton", "torch"),
        f"training.kernels must be auto, triton or torch, got {training.kernels!r}",
    )


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def generator_sizes(model: ModelConfig) -> tuple[int, int, int]:
    """(hidden size, feed-forward size, heads) of the generator (paper section 3.2)."""
    scale = model.generator_fraction
    return (
        round(model.hidden_size * scale),
        round(model.intermediate_size * scale),
        max(1, round(model.heads * scale)),
    )
