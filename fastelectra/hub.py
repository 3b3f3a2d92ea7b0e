"""Hugging Face checkpoints: `fastelectra export` and `fastelectra import`. Needs no transformers.

OUT/discriminator/      for AutoModel, ElectraForPreTraining, ElectraForSequenceClassification …
OUT/generator/          for ElectraForMaskedLM and pipeline("fill-mask")
OUT/mlm/                the same, where the objective's main network predicts tokens
    model.safetensors  config.json  tokenizer files
"""

import dataclasses
import json
import os
import shlex
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer

from fastelectra.config import (
    SHORTEST,
    Config,
    DataConfig,
    ModelConfig,
    Objective,
    ObjectiveConfig,
    config_from_dict,
    generator_sizes,
)
from fastelectra.data import vocabulary
from fastelectra.errors import FastElectraError
from fastelectra.model import Electra
from fastelectra.model.electra import parameter_shapes
from fastelectra.model.hub_names import to_hub
from fastelectra.model.hub_reader import (
    ARCHITECTURES,
    FIXED,
    SHARED,
    SIZES,
    Networks,
    check_folder,
    hub_folders,
    read_json,
    read_networks,
)
from fastelectra.training import checkpoint

EMBEDDINGS_DIFFER = "the two networks' embeddings differ: took the discriminator's"


@dataclass(frozen=True)
class Pretrained:
    """A discriminator, its generator if there is one, and how to make tokens for them."""

    electra: Electra  # fp32 on the CPU, in evaluation mode; a generator it lacks is untrained
    tokenizer: Tokenizer
    special: dict[str, int]  # ids of pad, unk, cls, sep, mask
    has_generator: bool


def load_pretrained(path: str | Path, generator: str | Path | None = None) -> Pretrained:
    """Load a checkpoint, run or export folder, or an ElectraForPreTraining folder of Hugging Face.

    `generator` is an ElectraForMaskedLM folder to go with the latter. Raises FastElectraError.
    """
    folders = hub_folders(Path(path))
    if folders:
        if generator:
            check_folder(Path(generator))
            folders += [Path(generator)]
        networks = read_networks(folders)
        if "discriminator" not in networks.folders:
            raise FastElectraError(f"{path} holds no discriminator (ElectraForPreTraining)")
        if networks.embeddings_differ:
            print(EMBEDDINGS_DIFFER, file=sys.stderr)
        electra = _build(networks.model, networks.vocab_size, networks.weights)
        return _pretrained(electra, networks.tokenizer_dir, "generator" in networks.folders)
    return checkpoint.use(path, lambda folder: _load_checkpoint(folder, generator))


def _load_checkpoint(folder: Path, generator: str | Path | None) -> Pretrained:
    if generator:
        raise FastElectraError(f"{folder} has a generator of its own: leave out {generator}")
    config, vocab_size, weights = _read_checkpoint(folder)
    electra = _build(config.model, vocab_size, weights, config.objective)
    return _pretrained(electra, folder / checkpoint.TOKENIZER, electra.generator is not None)


def _pretrained(electra: Electra, tokenizer_dir: Path, has_generator: bool) -> Pretrained:
    tokenizer, special = read_tokenizer(tokenizer_dir, len(electra.embeddings.word))
    return Pretrained(electra.eval(), tokenizer, special, has_generator)


def _build(
    model: ModelConfig,
    vocab_size: int,
    weights: dict[str, torch.Tensor],
    objective: ObjectiveConfig | None = None,
) -> Electra:
    """The networks of an objective; what `weights` lacks is as in a fresh run of seed 0."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        electra = Electra(model, vocab_size, objective or ObjectiveConfig())
        for name, parameter in electra.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    return electra


def read_tokenizer(folder: Path, vocab_size: int) -> tuple[Tokenizer, dict[str, int]]:
    """The tokenizer of a folder and its special tokens' ids; from vocab.txt alone if need be."""
    file = vocabulary.file_of(folder)
    tokenizer = vocabulary.read(file, **vocabulary.normalisation(file))
    if tokenizer.get_vocab_size() > vocab_size:
        raise FastElectraError(
            f"{file} has {tokenizer.get_vocab_size()} entries, more than the model's {vocab_size}"
        )
    return tokenizer, dataclasses.asdict(vocabulary.SpecialTokens.of(tokenizer, str(file)))


# --- export ---------------------------------------------------------------------------------------


def add_export_arguments(parser: ArgumentParser) -> None:
    """Arguments of `fastelectra export`."""
    parser.add_argument("checkpoint", help="a checkpoint, or a run folder: its newest checkpoint")
    parser.add_argument("out", help="folder to write, new or empty")


def run_export(args: Namespace) -> int:
    """Write both networks for Hugging Face, all or nothing.

    Raises FastElectraError: not a sound checkpoint, OUT is not empty or cannot be written.
    """
    checkpoint.use(args.checkpoint, lambda folder: _export(folder, Path(args.out)))
    return 0


def _export(folder: Path, out: Path) -> None:
    config, vocab_size, weights = _read_checkpoint(folder)
    model, objective = config.model, config.objective
    tokenizer, special = read_tokenizer(folder / checkpoint.TOKENIZER, vocab_size)
    parts = exported_parts(objective.kind)
    try:
        with checkpoint.write_folder(out) as aside:
            for part, (network, architecture) in parts.items():
                vocabulary.write(tokenizer, aside / part, config.data.max_length)
                fields = hub_config(model, network, vocab_size, special["pad"])
                text = json.dumps({"architectures": [architecture], **fields}, indent=2)
                (aside / part / "config.json").write_text(text + "\n", encoding="utf-8")
                tensors = to_hub(weights, network, architecture == ARCHITECTURES["generator"])
                save_file(tensors, aside / part / "model.safetensors", {"format": "pt"})
    except (OSError, SafetensorError) as error:  # the second wraps the first
        reason = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]
        raise FastElectraError(f"cannot write {out}: {reason}") from None
    print(f"wrote {' and '.join(str(out / part) for part in parts)} from {folder}")
    if objective.name == "all_tokens_mlm":
        print("left out, since ElectraForMaskedLM has no place for it: the probability of copying")


def exported_parts(kind: Objective) -> dict[str, tuple[str, str]]:
    """Folder of an export → our network, their class. A main network that predicts tokens is an
    ElectraForMaskedLM, as a generator is."""
    masked_lm = ARCHITECTURES["generator"]
    main = ("discriminator", ARCHITECTURES["discriminator"]) if kind.detects else (
        "mlm", masked_lm)  # fmt: skip
    parts = {main[0]: ("discriminator", main[1])}
    return parts | ({"generator": ("generator", masked_lm)} if kind.generator else {})


def hub_config(model: ModelConfig, network: str, vocab_size: int, pad: int) -> dict:
    """config.json of one network."""
    sizes = [getattr(model, name) for name in SIZES]
    sizes = generator_sizes(model) if network == "generator" else sizes
    return {
        "model_type": "electra",
        "vocab_size": vocab_size,
        **{theirs: getattr(model, ours) for ours, theirs in SHARED.items()},
        **dict(zip(SIZES.values(), sizes, strict=True)),
        **FIXED,
        "pad_token_id": pad,
        "tie_word_embeddings": True,
    }


def _read_checkpoint(folder: Path) -> tuple[Config, int, dict[str, torch.Tensor]]:
    """Configuration, vocabulary size, weights; FastElectraError if they do not fit together."""
    state = checkpoint.read_state(folder)
    config = config_from_dict(state["config"], str(folder / checkpoint.STATE))
    weights, vocab_size = checkpoint.read_weights(folder), state["vocab_size"]
    expected = parameter_shapes(config.model, vocab_size, config.objective)
    if {name: weights[name].shape for name in weights} != expected:
        raise FastElectraError(f"{folder}: {checkpoint.WEIGHTS} and {checkpoint.STATE} disagree")
    return config, vocab_size, weights


# --- import ---------------------------------------------------------------------------------------


def add_import_arguments(parser: ArgumentParser) -> None:
    """Arguments of `fastelectra import`."""
    parser.add_argument(
        "folders", nargs="+", metavar="HF_DIR",
        help="ElectraForPreTraining and ElectraForMaskedLM folders, one or both, or an export",
    )  # fmt: skip
    parser.add_argument(
        "--out", required=True, type=os.path.expanduser,  # shells leave the ~ in --out=~/start
        help="folder to write, for training.init_from",
    )  # fmt: skip
    parser.add_argument(
        "--generator-fraction", type=float, default=ModelConfig.generator_fraction,
        help="the generator's size relative to the discriminator's, where only one of them is given"
        " (default %(default)s)",
    )  # fmt: skip


def _trained_length(networks: Networks) -> int:
    """What an export's tokenizer is cut at; of others as many tokens as there are positions."""
    path, positions = networks.tokenizer_dir / "tokenizer_config.json", networks.model.max_positions
    told = read_json(path).get("model_max_length") if path.is_file() else None
    return told if isinstance(told, int) and SHORTEST <= told < positions else positions


def run_import(args: Namespace) -> int:
    """Write a folder that `training.init_from` takes."""
    folders = [part for name in args.folders for part in hub_folders(Path(name)) or [Path(name)]]
    networks = read_networks(folders, args.generator_fraction)
    tokenizer, special = read_tokenizer(networks.tokenizer_dir, networks.vocab_size)
    vocab_size = tokenizer.get_vocab_size()
    shapes = parameter_shapes(networks.model, vocab_size)
    weights = {name: weight[: shapes[name][0]] for name, weight in networks.weights.items()}
    electra = _build(networks.model, vocab_size, weights)
    config = Config(model=networks.model)
    config.data.max_length = min(_trained_length(networks), config.training.micro_batch_tokens)
    with tempfile.TemporaryDirectory() as tokenizer_dir:
        vocabulary.write(tokenizer, Path(tokenizer_dir))
        checkpoint.write_checkpoint(
            Path(args.out),
            {name: parameter.detach() for name, parameter in electra.named_parameters()},
            Path(tokenizer_dir),
            step=0,
            position=None,
            config=config.to_dict(),
            vocab_size=vocab_size,
            special_tokens=special,
            fingerprint="",  # of no corpus
        )
    for network in ARCHITECTURES:
        print(f"{network}: {networks.folders.get(network, 'not given, initialised afresh')}")
    if networks.embeddings_differ:
        print(EMBEDDINGS_DIFFER)
    if vocab_size < networks.vocab_size:
        print(f"left out: embeddings {vocab_size} to {networks.vocab_size - 1}, of no token")
    names = ("layers", "embedding_size", "max_positions", *SIZES, "generator_fraction")
    fields = [f"model.{name}={getattr(networks.model, name)}" for name in names]
    if networks.model.max_positions < DataConfig.max_length:
        fields.append(f"data.max_length={networks.model.max_positions}")
    fields.insert(0, f"training.init_from={args.out}")
    print(f"wrote {args.out}: start with", *(f"--set {shlex.quote(field)}" for field in fields))
    return 0
