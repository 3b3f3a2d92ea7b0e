"""Both networks against transformers' Electra."""

from pathlib import Path

import pytest
import torch
from hugging_face import theirs
from packing import packed_batch, padded, randomize
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from fastelectra.config import ModelConfig, ObjectiveConfig, load_config
from fastelectra.model import Electra

CONFIGS = Path(__file__).parents[2] / "configs"
ODD = ModelConfig(  # embedding ≠ hidden, generator of one head and of its own width, one layer
    layers=1,
    hidden_size=24,
    intermediate_size=40,
    heads=2,
    embedding_size=20,
    generator_fraction=0.5,
    max_positions=33,
    dropout=0.0,
    attention_dropout=0.0,
)
ONE_HEAD = ModelConfig(
    layers=2, hidden_size=12, intermediate_size=20, heads=1, embedding_size=12,
    generator_fraction=1.0, max_positions=40, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def preset(name):
    return load_config(CONFIGS / f"{name}.json").model


@pytest.mark.parametrize(
    ("model", "vocab_size", "lengths"),
    [
        (ODD, 101, [33, 5, 17, 1, 2]),
        (ONE_HEAD, 67, [40, 39, 3]),
        (preset("small"), 30_522, [128, 77, 5]),
        (preset("base"), 30_522, [130, 77, 5]),
    ],
    ids=["odd", "one head", "small", "base"],
)
def test_logits_and_hidden_states_equal_transformers(model, vocab_size, lengths):
    electra = randomize(Electra(model, vocab_size, ObjectiveConfig())).eval()
    batch = packed_batch(lengths, vocab_size, room=(7, 2, 3))
    real, chosen = sum(lengths), (batch.labels >= 0).sum()

    hidden = {}
    for network in (electra.generator, electra.discriminator):
        network.register_forward_hook(lambda module, _, out: hidden.update({module: out}))
    ours = electra.discriminator_logits(batch)[:real]
    inputs = padded(batch, batch.tokens)
    with torch.no_grad():
        discriminator = theirs(electra, "discriminator", vocab_size, ElectraForPreTraining)
        outputs = discriminator.eval()(**inputs, output_hidden_states=True)
    real_rows = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours, outputs.logits[real_rows], atol=1e-5, rtol=0)
    last = outputs.hidden_states[-1][real_rows]
    torch.testing.assert_close(hidden[electra.discriminator][:real], last, atol=1e-5, rtol=0)

    ours = electra.generator_logits(batch)[:chosen]
    places = batch.masked_positions[:chosen].long()
    masked = batch.tokens.clone()
    masked[places] = batch.masked_inputs[:chosen]
    with torch.no_grad():
        generator = theirs(electra, "generator", vocab_size, ElectraForMaskedLM)
        outputs = generator.eval()(**padded(batch, masked), output_hidden_states=True)
    expected = outputs.logits[real_rows][places]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    last = outputs.hidden_states[-1][real_rows][places]  # it computes them there only
    torch.testing.assert_close(hidden[electra.generator][:chosen], last, atol=1e-5, rtol=0)
