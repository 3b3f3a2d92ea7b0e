"""Where a run starts: from nothing, from given weights, or where the same command left off."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import nn

from fastelectra.config import Config, config_from_dict, generator_sizes
from fastelectra.data import vocabulary
from fastelectra.data.shards import Corpus
from fastelectra.data.stream import Position
from fastelectra.errors import FastElectraError
from fastelectra.model.electra import parameter_shapes
from fastelectra.training import checkpoint
from fastelectra.training.optimizer import MOMENT_KEYS

# What decides the batches and what they are trained on; all else may change between two commands.
FIXED_SECTIONS = ("model", "data")
FIXED_FIELDS = ("objective.name", "training.seed", "training.micro_batch_tokens")
FREE_FIELDS = ("data.path", "training.output_dir")  # folders may move; the fingerprint tells


@dataclass(frozen=True)
class Start:
    """The state that training begins with."""

    step: int = 0  # updates made so far
    position: Position = field(default_factory=Position)  # of the next batch
    folder: Path | None = None  # checkpoint to read the weights from
    resumes: bool = False  # with optimizer state: the same run goes on
    skipped: int = 0  # of these updates: without numbers, so not made
    loss_scale: dict[str, float] = field(default_factory=dict)  # of fp16
    damaged: tuple[Path, ...] = ()  # newer checkpoints that cannot be used
    notes: tuple[str, ...] = ()  # what the user should know


def find_start(config: Config, corpus: Corpus) -> Start:
    """The newest undamaged checkpoint of the run, else `training.init_from`, else step 0.

    Raises FastElectraError when all are damaged, or the checkpoint does not fit the configuration
    or the corpus.
    """
    found, damaged = checkpoint.newest_good(Path(config.training.output_dir))
    if found:
        return _resumed(found, damaged, config, corpus)
    if config.training.init_from:
        folder = checkpoint.resolve(config.training.init_from)
        _check_vocabulary(folder, corpus)
        _check_networks(folder, config)
        return Start(folder=folder, notes=(f"weights from {folder}",))
    return Start()


def _resumed(folder: Path, damaged: dict[Path, str], config: Config, corpus: Corpus) -> Start:
    state = checkpoint.read_state(folder)
    before = _flat(config_from_dict(state["config"], str(folder / checkpoint.STATE)).to_dict())
    now = _flat(config.to_dict())
    changed = [name for name in {**now, **before}
               if name not in FREE_FIELDS and before.get(name) != now.get(name)]  # fmt: skip
    for name in changed:
        if name in FIXED_FIELDS or name.partition(".")[0] in FIXED_SECTIONS:
            raise FastElectraError(
                f"{config.training.output_dir} was trained with {name} = {before.get(name)}, now it"
                f" is {now.get(name)}: put it back, or start anew in another training.output_dir"
            )
    if state["fingerprint"] != corpus.fingerprint:
        raise FastElectraError(
            f"{corpus.path} was prepared with another tokenizer or other settings than the data of"
            f" {folder}: use that data, or start anew in another training.output_dir"
        )
    notes = [f"warning: passing over a damaged checkpoint: {r}" for r in damaged.values()]
    notes += [f"resuming from {folder}"]
    notes += [f"changed: {name} from {before.get(name)} to {now.get(name)}" for name in changed]
    return Start(
        state["step"], _position(state, folder), folder, resumes=True, skipped=state["skipped"],
        loss_scale=_loss_scale(state, folder), damaged=tuple(damaged), notes=tuple(notes),
    )  # fmt: skip


def _position(state: dict, folder: Path) -> Position:
    values = state["position"] or {}
    sound = values.keys() == asdict(Position()).keys()
    if not sound or not all(type(v) is int and 0 <= v < 2**53 for v in values.values()):
        raise FastElectraError(f"{folder / checkpoint.STATE} has no sound position in the data")
    return Position(**values)


def _loss_scale(state: dict, folder: Path) -> dict[str, float]:
    values = state["loss_scale"]
    sound = values.keys() <= set(checkpoint.SCALE_KEYS)
    sound = sound and all(type(v) in (int, float) and -1 <= v < 2**53 for v in values.values())
    if not sound or values.get("cur_scale", 1) <= 0:
        raise FastElectraError(f"{folder / checkpoint.STATE} has no sound loss_scale")
    return values


def _flat(config: dict) -> dict:
    """{"section.field": value}; the DeepSpeed section counts as sections of its own."""
    return {f"{section}.{name}": value for section, values in config.items()
            for name, value in values.items()}  # fmt: skip


def _check_vocabulary(folder: Path, corpus: Corpus) -> None:
    theirs, ours = folder / checkpoint.TOKENIZER, corpus.tokenizer_dir
    if _tokenizer(theirs) != _tokenizer(ours):
        raise FastElectraError(
            f"{corpus.path} was prepared with another tokenizer than {folder}: prepare it with"
            f" --vocab {theirs / 'tokenizer.json'}"
        )


def _tokenizer(folder: Path) -> tuple[dict[str, int], str]:
    """Its entries, and what it makes of capitals and accents. Raises FastElectraError, OSError."""
    tokenizer = vocabulary.load(folder)
    sample, normalizer = "An É, an e and an é", tokenizer.normalizer
    return tokenizer.get_vocab(), normalizer.normalize_str(sample) if normalizer else sample


def _check_networks(folder: Path, config: Config) -> None:
    """FastElectraError with the fields to set, where the checkpoint's weights need others."""
    values = checkpoint.read_state(folder)["config"]
    theirs = config_from_dict(values, str(folder / checkpoint.STATE))
    needed = ""
    for section in ("objective", "model"):
        part, ours = getattr(theirs, section), vars(getattr(config, section))
        for name, value in vars(part).items():
            changed = replace(theirs, **{section: replace(part, **{name: ours[name]})})
            if changed != theirs and _networks(changed) != _networks(theirs):
                needed += f" --set {section}.{name}={value}"
    if needed:
        raise FastElectraError(f"the config's model is not that of {folder}: start with{needed}")


def _networks(config: Config) -> tuple:
    """What two configurations agree in when the same weights compute the same."""
    generator = config.objective.kind.generator and generator_sizes(config.model)
    return parameter_shapes(config.model, 1, config.objective), config.model.heads, generator


def load_weights(model: nn.Module, folder: Path) -> checkpoint.Tensors:
    """Copy the checkpoint's weights into the model, and return them.

    Raises FastElectraError naming the first parameter that is not of the model's shape.
    """
    weights = checkpoint.read_weights(folder)
    parameters = dict(model.named_parameters())
    _check_shapes(folder, weights, parameters)
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
    return weights


def load_moments(model: nn.Module, folder: Path) -> checkpoint.Tensors:
    """The checkpoint's Adam moments. Raises FastElectraError as load_weights."""
    moments = checkpoint.read_moments(folder)
    expected = {f"{name}.{key}": parameter for name, parameter in model.named_parameters()
                for key in MOMENT_KEYS}  # fmt: skip
    _check_shapes(folder, moments, expected)
    return moments


def _check_shapes(folder: Path, theirs: checkpoint.Tensors, ours: checkpoint.Tensors) -> None:
    for name in sorted(theirs.keys() | ours.keys()):
        a, b = (list(t[name].shape) if name in t else None for t in (theirs, ours))
        if a != b:
            raise FastElectraError(
                f"{folder} does not fit the model section of the config or its objective: {name} is"
                f" {a} there and {b} here"
            )
