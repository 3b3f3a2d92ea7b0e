"""Checkpoints as a run leaves them, without the run."""

import json

import torch

from fastelectra import cli, errors
from fastelectra.config import Config, ModelConfig, ObjectiveConfig
from fastelectra.data.shards import open_corpus
from fastelectra.model import Electra
from fastelectra.training import checkpoint

ODD = ModelConfig(  # a generator of one head; embeddings narrower than both networks
    layers=1, hidden_size=24, intermediate_size=40, heads=2, embedding_size=10,
    generator_fraction=0.5, max_positions=48, dropout=0.0, attention_dropout=0.1,
)  # fmt: skip


def electra(model, vocab_size, seed=0, objective="electra"):
    """Both networks with values that a mistake would show with: no zeros, no ones."""
    network = Electra(model, vocab_size, ObjectiveConfig(objective))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(float(name.endswith("norm_weight")), 0.1, generator=generator)
    return network.eval()


def write_checkpoint(target, corpus, model=ODD, step=7, objective="electra"):
    """What a training run leaves behind; returns its networks."""
    corpus = open_corpus(corpus)
    network = electra(model, corpus.vocab_size, objective=objective)
    config = Config(model=model, objective=ObjectiveConfig(objective))
    config.data.max_length = min(config.data.max_length, model.max_positions)
    checkpoint.write_checkpoint(
        target,
        {name: parameter.detach() for name, parameter in network.named_parameters()},
        corpus.tokenizer_dir,
        step=step,
        position=None,
        config=config.to_dict(),
        vocab_size=corpus.vocab_size,
        special_tokens=corpus.manifest.special_tokens,
        fingerprint=corpus.fingerprint,
    )
    return network


def fastelectra(*arguments):
    """Exit code of a command."""
    return errors.run(cli.main, [str(argument) for argument in arguments])


def files(folder):
    """What is in a folder, by path."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in found}


def change_json(path, **values):
    """Set fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
