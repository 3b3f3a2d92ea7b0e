"""Reads the folders that Hugging Face's `save_pretrained` writes, in our terms."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastelectra.config import Config, ModelConfig, config_from_dict, generator_sizes
from fastelectra.errors import FastElectraError
from fastelectra.model.electra import parameter_shapes
from fastelectra.model.hub_names import from_hub

ARCHITECTURES = {"discriminator": "ElectraForPreTraining", "generator": "ElectraForMaskedLM"}
SHARED = {  # fields of our model configuration that both of theirs have → their names
    "layers": "num_hidden_layers",
    "embedding_size": "embedding_size",
    "max_positions": "max_position_embeddings",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
}
SIZES = {  # those that differ between the networks, in the order of generator_sizes()
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "heads": "num_attention_heads",
}
FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2}


@dataclass(frozen=True)
class Networks:
    """What Hugging Face folders hold, in our terms."""

    folders: dict[str, Path]  # of the networks that are there
    model: ModelConfig
    vocab_size: int
    weights: dict[str, torch.Tensor]  # of those networks and the shared embeddings
    embeddings_differ: bool  # the networks', which ours share: the discriminator's were taken

    @property
    def tokenizer_dir(self) -> Path:
        return self.folders.get("discriminator") or self.folders["generator"]


def check_folder(path: Path) -> None:
    """Raise FastElectraError where there is no such folder, perhaps as it is a name on the Hub."""
    if not path.is_dir():
        hint = ""
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):  # owner/name
            hint = (
                "; if it is a model on the Hugging Face Hub, download it first:"
                f" hf download {path} --local-dir {path.name}"
            )
        raise FastElectraError(f"{path}: no such folder{hint}")


def hub_folders(path: Path) -> list[Path]:
    """The folder itself, or the parts of an export; empty if it is neither.

    Raises FastElectraError for an export without a discriminator, and where there is no folder.
    """
    check_folder(path)
    if (path / "checkpoints").is_dir():
        return []  # a run folder: its config.json is the run's
    if (path / "config.json").is_file():
        return [path]
    if (path / "mlm").is_dir():
        raise FastElectraError(
            f"{path} holds no discriminator: its main network, {path}/mlm, predicts tokens. Use"
            ' that part in pipeline("fill-mask"), or import it as a generator'
        )
    return [path / part for part in ARCHITECTURES if (path / part / "config.json").is_file()]


def read_networks(
    paths: Sequence[Path], fraction: float = ModelConfig.generator_fraction
) -> Networks:
    """Read one or two networks; `fraction` gives the sizes of the one that is missing."""
    folders, configs, tensors = {}, {}, {}
    for path in paths:
        config, loaded = _read_hub_config(path), _read_tensors(path)
        found = [name for name in ARCHITECTURES if f"{name}_predictions.dense.weight" in loaded]
        if len(found) != 1:
            known = " nor ".join(ARCHITECTURES.values())
            raise FastElectraError(f"{path}: the weights are neither of {known}")
        if found[0] in folders:
            raise FastElectraError(f"{folders[found[0]]} and {path} are both a {found[0]}")
        folders[found[0]], configs[found[0]], tensors[found[0]] = path, config, loaded
    model, vocab_size = _model_config(folders, configs, fraction)
    shapes, weights, differ = parameter_shapes(model, vocab_size), {}, False
    for network in (name for name in ARCHITECTURES if name in folders):
        for name, shape in shapes.items():
            if name.startswith(("embeddings.", f"{network}.")):
                tensor = encoder_tensor(name, shape, folders[network], tensors[network])
                differ |= not torch.equal(weights.setdefault(name, tensor), tensor)
    return Networks(folders, model, vocab_size, weights, differ)


def _read_hub_config(folder: Path) -> dict:
    """config.json, with Hugging Face's defaults, which are ours, for what it leaves out."""
    path, model = folder / "config.json", ModelConfig()
    config = read_json(path)
    if config.get("model_type") != "electra":
        raise FastElectraError(f"{path} is not the configuration of an Electra model")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise FastElectraError(f"{path}: {name} is {config[name]!r}, supported is {value!r}")
    defaults = {theirs: getattr(model, ours) for ours, theirs in {**SHARED, **SIZES}.items()}
    config = {"vocab_size": 30_522, **defaults, **config}
    for name, default in {"vocab_size": 30_522, **defaults}.items():
        if type(config[name]) not in (int, type(default)):
            raise FastElectraError(f"{path}: {name} must be a number, got {config[name]!r}")
    return config


def _model_config(
    folders: dict[str, Path], configs: dict[str, dict], fraction: float
) -> tuple[ModelConfig, int]:
    """Our configuration and the vocabulary size, from one or two of theirs."""
    if not 0 < fraction <= 1:
        raise FastElectraError(f"--generator-fraction {fraction} must be above 0 and at most 1")
    first = next(name for name in ARCHITECTURES if name in configs)
    config, generator = configs[first], configs.get("generator")
    for name in ("vocab_size", *list(SHARED.values())[:3]):
        if generator and generator[name] != config[name]:
            raise FastElectraError(
                f"{folders[first]} and {folders['generator']} are no pair: {name} is"
                f" {config[name]} in one and {generator[name]} in the other"
            )
    sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
    if len(configs) == 2:
        fraction = generator["hidden_size"] / config["hidden_size"]
    elif generator:
        sizes = {ours: round(size / fraction) for ours, size in sizes.items()}
    shared = {ours: config[theirs] for ours, theirs in SHARED.items()}
    where = str(folders[first] / "config.json")
    values = {**shared, **sizes, "generator_fraction": fraction}
    length = {"max_length": min(Config().data.max_length, shared["max_positions"])}
    model = config_from_dict({"model": values, "data": length}, where).model
    given = generator and tuple(generator[name] for name in SIZES.values())
    if generator and generator_sizes(model) != given:
        raise FastElectraError(
            f"{folders['generator']}: hidden size, feed-forward size and heads are {given}, but"
            f" {fraction:.4g} of the discriminator's would be {generator_sizes(model)}"
        )
    return model, config["vocab_size"]


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, from one file or several that an index lists."""
    for name, load in (("model.safetensors", load_file), ("pytorch_model.bin", _load_pickle)):
        index = folder / f"{name}.index.json"
        files = [folder / name] if (folder / name).is_file() else []
        if index.is_file():
            files = _listed_files(index)
        tensors = {}
        for file in files:
            try:
                tensors.update(load(file))
            except (OSError, SafetensorError) as error:
                raise FastElectraError(f"cannot read {file}: {error}") from None
        if files:
            return tensors
    raise FastElectraError(f"{folder} has no weights: expected model.safetensors")


def _listed_files(index: Path) -> list[Path]:
    """The files that an index lists, which lie beside it."""
    listed = read_json(index).get("weight_map")
    names = listed.values() if isinstance(listed, dict) else [listed]
    if not all(
        isinstance(name, str) and Path(name).name == name not in ("", "..") for name in names
    ):
        raise FastElectraError(f"{index}: weight_map must name files in the same folder")
    return sorted({index.parent / name for name in names})


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # of any kind, from a damaged file; their messages fill a page
        loaded = None
    tensors = isinstance(loaded, dict) and all(map(torch.is_tensor, loaded.values()))
    if not tensors or not all(isinstance(name, str) for name in loaded):
        raise FastElectraError(f"{path} is damaged, or holds more than tensors")
    return loaded


def encoder_tensor(
    name: str, shape: torch.Size, folder: Path, tensors: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Our parameter `name` of theirs, in fp32. Raises FastElectraError: not there, or misshapen."""
    try:
        tensor = from_hub(name, tensors)
    except KeyError as error:
        raise FastElectraError(f"{folder}: the weights lack {error.args[0]}") from None
    output_table = tensors.get("generator_lm_head.weight")
    if name == "embeddings.word" and not (
        output_table is None or torch.equal(output_table, tensor)
    ):
        raise FastElectraError(f"{folder}: its output table is not its word embeddings")
    if tensor.shape != shape:
        raise FastElectraError(
            f"{folder}: {name} has shape {list(tensor.shape)}, its config.json says {list(shape)}"
        )
    return tensor


def read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not valid JSON"
        raise FastElectraError(f"cannot read {path}: {reason}") from None
    if not isinstance(values, dict):
        raise FastElectraError(f"{path} is not a JSON object")
    return values


def read_encoder(folder: Path) -> tuple[ModelConfig, int, dict[str, torch.Tensor]]:
    """Sizes, vocabulary size and tensors of any Electra model, whatever its head; the encoder's
    names begin with `electra.`, as those of a bare ElectraModel do not in its file."""
    config, tensors = _read_hub_config(folder), _read_tensors(folder)
    if "embeddings.word_embeddings.weight" in tensors:
        tensors = {f"electra.{name}": tensor for name, tensor in tensors.items()}
    network = {"discriminator": folder}, {"discriminator": config}
    return *_model_config(*network, fraction=1.0), tensors
