"""Both networks against transformers' Electra, and a whole training step of theirs in fp64."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hugging_face import theirs
from packing import packed_batch, padded, randomize
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from fastelectra.config import ModelConfig, ObjectiveConfig, load_config
from fastelectra.model import Electra
from fastelectra.model.hub_names import to_hub

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
PARTS = "electra.embeddings.", "electra.encoder.", "electra.embeddings_project."


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


@pytest.mark.parametrize("model", [ODD, ONE_HEAD], ids=["odd", "one head"])
def test_a_training_step_equals_transformers_in_fp64(model):
    vocab_size, lengths = 53, [33, 5, 17, 1, 2]
    objective = ObjectiveConfig(generator_weight=0.7, discriminator_weight=30.0, temperature=1.3)
    electra = randomize(Electra(model, vocab_size, objective)).double()
    batch = packed_batch(lengths, vocab_size, seed=3, room=(6, 2, 4))
    batch.totals *= torch.tensor([3.0, 2.0])  # this batch is a part of a larger one
    draws = []
    electra.generator.head.register_forward_hook(lambda *call: draws.append(call[2][1]))
    batch.masked_inputs[:5] = 4
    electra(batch)  # a draw depends on what is masked, not on what was there: let some be right
    batch.labels[:4] = batch.tokens[batch.masked_positions[:4].long()] = draws.pop()[:4]
    loss, metrics = electra(batch)
    loss.backward()

    generator = theirs(electra, "generator", vocab_size, ElectraForMaskedLM)
    discriminator = theirs(electra, "discriminator", vocab_size, ElectraForPreTraining)
    discriminator.electra.embeddings = generator.electra.embeddings
    generator.generator_lm_head.weight = generator.electra.embeddings.word_embeddings.weight
    chosen = int((batch.labels >= 0).sum())
    places, labels = batch.masked_positions[:chosen].long(), batch.labels[:chosen].long()
    sampled = draws[0][:chosen]
    masked, corrupted = batch.tokens.clone(), batch.tokens.clone()
    masked[places], corrupted[places] = batch.masked_inputs[:chosen], sampled
    real_rows = padded(batch, masked)["attention_mask"].bool()

    logits = generator(**padded(batch, masked)).logits[real_rows][places]
    mlm_loss = F.cross_entropy(logits, labels, reduction="sum")
    scores = discriminator(**padded(batch, corrupted)).logits[real_rows]
    replaced = (corrupted != batch.tokens)[: sum(lengths)].double()
    disc_loss = F.binary_cross_entropy_with_logits(scores, replaced, reduction="sum")
    expected = 0.7 * mlm_loss / batch.totals[0] + 30 * disc_loss / batch.totals[1]
    expected.backward()

    assert 0 < replaced.sum() < chosen  # some draws hit, some miss
    torch.testing.assert_close(metrics["mlm_loss"], mlm_loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["disc_loss"], disc_loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert metrics["replaced"] == replaced.sum()
    assert metrics["masked"] == chosen
    assert metrics["tokens"] == sum(lengths)
    assert metrics["mlm_correct"] == (logits.argmax(1) == labels).sum()
    assert metrics["histogram"].sum(1).tolist() == [sum(lengths) - replaced.sum(), replaced.sum()]
    gradients = {name: parameter.grad for name, parameter in electra.named_parameters()}
    for module, network in ((generator, "generator"), (discriminator, "discriminator")):
        ours = to_hub(gradients, network)
        named = dict(module.named_parameters())
        assert set(ours) == set(named)
        for name, parameter in named.items():
            torch.testing.assert_close(
                ours[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
