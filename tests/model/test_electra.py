"""The step as a whole: sizes, initial state, packing, padding, accumulation, dropout, sampling."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packing import packed_batch, randomize
from scipy.stats import chisquare

from fastelectra.config import ModelConfig, ObjectiveConfig, load_config
from fastelectra.model import Electra, attention, electra, encoder

CONFIGS = Path(__file__).parents[2] / "configs"
VOCAB_SIZE = 61
TINY = ModelConfig(
    layers=2, hidden_size=24, intermediate_size=40, heads=4, embedding_size=16,
    generator_fraction=0.5, max_positions=40, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
LENGTHS = [40, 3, 17, 1, 22]


def tiny(dtype=torch.float64, objective=None, **changes):
    model = Electra(replace(TINY, **changes), VOCAB_SIZE, objective or ObjectiveConfig())
    return randomize(model).to(dtype)


def losses_and_gradients(model, batches):
    """The summed losses and metrics of micro-batches, and the gradients they leave."""
    model.zero_grad()
    results = [model(batch) for batch in batches]
    loss = sum(loss for loss, _ in results)
    loss.backward()
    metrics = {name: sum(metrics[name] for _, metrics in results) for name in results[0][1]}
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "metrics": metrics, "gradients": gradients}


def only(batch, first, last):
    """The examples first..last-1 of a batch, as a batch of their own with the same totals."""
    start, end = batch.cu_seqlens[[first, last]].tolist()
    chosen = (batch.masked_positions >= start) & (batch.masked_positions < end)
    return replace(
        batch,
        **{name: getattr(batch, name)[start:end] for name in ("tokens", "segments", "positions")},
        **{name: getattr(batch, name)[chosen] for name in ("masked_inputs", "labels", "uniforms")},
        masked_positions=batch.masked_positions[chosen] - start,
        cu_seqlens=batch.cu_seqlens[first : last + 1] - start,
    )


def without(model, network):
    """How many parameters are not one network's own."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith(f"{network}."))


@pytest.mark.parametrize(
    ("preset", "discriminator", "generator", "both"),
    [
        ("small", 13_549_057, 4_620_026, 14_196_219),
        ("base", 109_483_009, 33_740_602, 119_386_427),
        ("large", 335_142_913, 51_295_290, 354_655_291),
    ],
)
def test_parameter_counts_are_the_papers(preset, discriminator, generator, both):
    config = load_config(CONFIGS / f"{preset}.json")
    with torch.device("meta"):
        model = Electra(config.model, 30_522, config.objective)
    assert without(model, "generator") == discriminator
    assert without(model, "discriminator") == generator
    assert without(model, "neither") == both


def test_initial_weights_are_berts_and_the_first_loss_is_that_of_guessing():
    torch.manual_seed(0)
    config = load_config(CONFIGS / "small.json")
    model = Electra(config.model, 30_522, config.objective)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and parameter.numel() > 10_000:
            assert parameter.abs().max() <= 0.04 * (1 + 1e-6), name
            assert parameter.mean().abs() < 4 * 0.0176 / parameter.numel() ** 0.5, name
            assert parameter.std().item() == pytest.approx(0.0175925, rel=0.02), (
                name
            )  # of the cut normal
        elif parameter.ndim == 1:
            assert (parameter == float(name.endswith("norm_weight"))).all(), name
    loss, metrics = model(packed_batch([128, 90, 30], 30_522))
    assert loss.item() == pytest.approx(math.log(30_522) + 50 * math.log(2), rel=0.005)
    assert metrics["replaced"] == metrics["masked"]  # nothing is guessed right among 30 522


def test_shared_embeddings_are_one_parameter_used_by_all():
    model = tiny()
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if "word" in name] == ["embeddings.word"]
    assert model.generator.head.word is model.embeddings.word
    assert len(names) == len({id(parameter) for parameter in model.parameters()})
    batch = packed_batch(LENGTHS, VOCAB_SIZE)
    parts = []
    for weights in ((1.0, 0.0), (0.0, 50.0)):
        part = tiny(objective=ObjectiveConfig("electra", *weights))
        parts.append(losses_and_gradients(part, [batch])["gradients"]["embeddings.word"])
    both = losses_and_gradients(model, [batch])["gradients"]["embeddings.word"]
    assert parts[0].abs().sum() > 0
    assert parts[1].abs().sum() > 0
    torch.testing.assert_close(parts[0] + parts[1], both)


def test_packed_equals_one_by_one_and_micro_batches_equal_one_batch():
    model, batch = tiny(), packed_batch(LENGTHS, VOCAB_SIZE)
    whole = losses_and_gradients(model, [batch])
    one_by_one = [only(batch, first, first + 1) for first in range(len(LENGTHS))]
    torch.testing.assert_close(losses_and_gradients(model, one_by_one), whole)
    ragged = [only(batch, 0, 1), only(batch, 1, 4), only(batch, 4, 5)]
    torch.testing.assert_close(losses_and_gradients(model, ragged), whole)


@pytest.mark.parametrize("cut", [True, False], ids=["cut as on CPU", "fixed shapes as on GPU"])
def test_padding_changes_nothing(cut, monkeypatch):
    plain = losses_and_gradients(model := tiny(), [packed_batch(LENGTHS, VOCAB_SIZE)])
    roomy = packed_batch(LENGTHS, VOCAB_SIZE, room=(50, 7, 9), max_length=40)
    if not cut:
        monkeypatch.setattr(electra, "real_part", lambda batch: batch)
    roomy.uniforms[: len(roomy.labels) - 9] = packed_batch(LENGTHS, VOCAB_SIZE).uniforms
    torch.testing.assert_close(losses_and_gradients(model, [roomy]), plain)


def test_attention_in_three_parts_gives_the_same_gradients(monkeypatch):
    """As on GPUs, where a library's attention takes queries, keys and values apart."""
    batches = [packed_batch(LENGTHS, VOCAB_SIZE)]
    joined = attention.attention

    def by_autograd(qkv, layout, dropout, seed, bias):
        qkv = qkv - bias.detach().view(qkv.shape[1:]) + bias.view(qkv.shape[1:])
        return joined(qkv, layout, dropout, seed, torch.zeros_like(bias))

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "attention", by_autograd)
        expected = losses_and_gradients(tiny(), batches)

    def backend(q, k, v, boundaries, longest, dropout):
        qkv, seed = torch.stack([q, k, v], 1), torch.zeros(1, dtype=torch.int64)
        no_bias = torch.zeros(qkv[0].numel(), dtype=q.dtype)
        return attention.packed_attention(qkv, no_bias, boundaries, longest, dropout, seed)

    monkeypatch.setattr(attention, "backend", lambda *_: "torch flash")
    monkeypatch.setitem(attention.BACKENDS, "torch flash", backend)
    found = losses_and_gradients(tiny(), batches)
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, msg=name)


def test_bf16_weights_give_the_loss_of_fp32_within_their_precision():
    batch = packed_batch(LENGTHS, VOCAB_SIZE)
    exact, _ = tiny(torch.float32)(batch)
    rough, metrics = tiny(torch.bfloat16)(batch)
    assert rough.dtype == metrics["mlm_loss"].dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.03)
    assert rough != exact


def test_dropout_is_seeded_everywhere_in_training_and_nowhere_in_evaluation():
    batch = packed_batch(LENGTHS, VOCAB_SIZE)
    for changes in ({"dropout": 0.3}, {"attention_dropout": 0.3}):
        model, plain = tiny(**changes), tiny()
        torch.manual_seed(1)
        first, second = model(batch)[0], model(batch)[0]
        torch.manual_seed(1)
        assert model(batch)[0] == first != second
        assert model.eval()(batch)[0] == plain(batch)[0]
        for logits in ("generator_logits", "discriminator_logits"):
            assert torch.equal(getattr(model, logits)(batch), getattr(plain, logits)(batch))
            assert not torch.equal(
                getattr(model.train(), logits)(batch), getattr(plain, logits)(batch)
            )
            model.eval()


def test_shapes_of_logits():
    model, batch = tiny(torch.float32).eval(), packed_batch(LENGTHS, VOCAB_SIZE, room=(5, 1, 2))
    assert model.discriminator_logits(batch).shape == batch.tokens.shape
    assert model.generator_logits(batch).shape == (len(batch.labels), VOCAB_SIZE)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_replacements_follow_the_generators_distribution(temperature):
    """The same masked sentence many times over: chi-square of what is drawn in its place."""
    copies, length, place = 4000, 4, 2
    objective = ObjectiveConfig(temperature=temperature)
    model = tiny(torch.float32, objective)
    with torch.no_grad():
        model.generator.head.output_bias.normal_(0, 1.5, generator=torch.Generator().manual_seed(5))
    one = packed_batch([length], VOCAB_SIZE)
    one.masked_positions[:], one.masked_inputs[:] = place, 4
    probabilities = (model.generator_logits(one)[0].double() / temperature).softmax(0)
    one.labels[:] = one.tokens[place] = probabilities.argmax()
    starts = torch.arange(copies, dtype=torch.int32) * length
    many = replace(
        one,
        **{name: getattr(one, name).repeat(copies) for name in (
            "tokens", "segments", "positions", "masked_inputs", "labels")},
        cu_seqlens=torch.arange(copies + 1, dtype=torch.int32) * length,
        masked_positions=starts + place,
        uniforms=torch.rand(copies, generator=torch.Generator().manual_seed(6)),
    )  # fmt: skip
    draws = []
    model.generator.head.register_forward_hook(lambda *call: draws.append(call[2][1]))
    metrics = model(many)[1]
    counts = torch.bincount(draws[0].long(), minlength=VOCAB_SIZE).double()
    common = probabilities * copies >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([probabilities[common], probabilities[~common].sum()[None]]) * copies
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3
    right = counts[one.labels[0]]
    assert right > 0
    assert metrics["replaced"] == copies - right  # a draw of the original replaces nothing


def test_nothing_of_the_generators_graph_is_left_when_the_main_network_begins():
    """Else gradients of what they share would wait for its backward, which runs beside."""
    model = tiny()
    losses = model.losses(packed_batch(LENGTHS, VOCAB_SIZE))

    def node():
        return torch.autograd.graph.get_gradient_edge(model.embeddings.word).node

    loss, _ = next(losses)
    node().metadata["of"] = "generator"
    torch.autograd.grad(loss, model.embeddings.word)
    assert node().metadata["of"] == "generator"
    loss = loss.detach()
    term, _ = next(losses)
    assert "of" not in node().metadata
    whole, _ = model(packed_batch(LENGTHS, VOCAB_SIZE))
    torch.testing.assert_close(loss + term, whole)
