"""The objectives of paper section 3.4: each whole step against transformers' networks and the loss
written out, in fp64; what is shared by the two networks; and sampling without the right token."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hugging_face import theirs
from packing import packed_batch, padded, randomize
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from fastelectra.config import OBJECTIVES, ModelConfig, ObjectiveConfig
from fastelectra.model import Electra, attention, electra
from fastelectra.model.hub_names import to_hub
from fastelectra.training.metrics import Meter, entropy

VOCAB_SIZE = 101
MODEL = ModelConfig(
    layers=2, hidden_size=24, intermediate_size=40, heads=2, embedding_size=20,
    generator_fraction=0.5, max_positions=33, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
LENGTHS = [33, 5, 17, 1, 2]
ONE_HEAD = ModelConfig(  # no projection, and a generator as wide as the main network
    layers=2, hidden_size=12, intermediate_size=20, heads=1, embedding_size=12,
    generator_fraction=1.0, max_positions=40, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
COPY = ("copy_weight", "copy_bias")


def network(name, model=MODEL, **objective):
    objective = {"temperature": 1.3} | objective if OBJECTIVES[name].generator else objective
    return randomize(Electra(model, VOCAB_SIZE, ObjectiveConfig(name, **objective))).double()


def batch_with_some_hits(model):
    """A padded batch; the generator, if there is one, draws some tokens right and some wrong."""
    batch = packed_batch(LENGTHS, VOCAB_SIZE, seed=3, room=(6, 2, 4))
    batch.totals *= torch.tensor([3.0, 2.0])  # this batch is a part of a larger one
    batch.masked_inputs[:5] = 4
    draws = []
    if model.generator:
        model.generator.head.register_forward_hook(lambda *call: draws.append(call[2][1]))
        model(batch)
        batch.labels[:4] = batch.tokens[batch.masked_positions[:4].long()] = draws.pop()[:4]
    return batch, draws


@pytest.mark.parametrize(
    ("name", "model"),
    [*((name, MODEL) for name in OBJECTIVES), ("electra", ONE_HEAD)],
    ids=[*OBJECTIVES, "electra of one head"],
)
def test_a_step_is_the_paper_s_written_out(name, model):
    kind = OBJECTIVES[name]
    ours = network(name, model, generator_weight=0.7, discriminator_weight=30.0)
    batch, draws = batch_with_some_hits(ours)
    loss, metrics = ours(batch)
    loss.backward()

    main_class = ElectraForPreTraining if kind.detects else ElectraForMaskedLM
    modules = {"discriminator": theirs(ours, "discriminator", VOCAB_SIZE, main_class)}
    main = modules["discriminator"]
    if not kind.detects:
        main.generator_lm_head.weight = main.electra.embeddings.word_embeddings.weight
    chosen = int((batch.labels >= 0).sum())
    places, originals = batch.masked_positions[:chosen].long(), batch.labels[:chosen].long()
    inputs = batch.tokens.clone()
    inputs[places] = batch.masked_inputs[:chosen]
    real_rows = padded(batch, inputs)["attention_mask"].bool()
    expected = 0.0
    if kind.generator:
        modules["generator"] = generator = theirs(ours, "generator", VOCAB_SIZE, ElectraForMaskedLM)
        generator.electra.embeddings = main.electra.embeddings
        generator.generator_lm_head.weight = main.electra.embeddings.word_embeddings.weight
        logits = generator(**padded(batch, inputs)).logits[real_rows][places]
        mlm_loss = F.cross_entropy(logits, originals, reduction="sum")
        expected = 0.7 * mlm_loss / batch.totals[0]
        torch.testing.assert_close(metrics["mlm_loss"], mlm_loss.detach(), rtol=1e-12, atol=0)
        assert metrics["mlm_correct"] == (logits.argmax(1) == originals).sum()
        inputs[places] = draws[0][:chosen]

    outputs = main(**padded(batch, inputs), output_hidden_states=True)
    scores, hidden = outputs.logits[real_rows], outputs.hidden_states[-1][real_rows]
    every, seen = batch.tokens[: sum(LENGTHS)].long(), inputs[: sum(LENGTHS)].long()
    replaced = (seen != every).double()
    weights = dict(ours.discriminator.head.named_parameters())
    copy = [weights[name].detach().clone().requires_grad_() for name in COPY if name in weights]
    main_loss, hits = written_out(name, scores, hidden, every, seen, places, copy)
    weight = 30 if kind.detects else 1
    expected = expected + weight * main_loss / batch.totals[int(kind.everywhere)]
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    scored = "disc_loss" if kind.detects else "main_loss"
    torch.testing.assert_close(metrics[scored], main_loss.detach(), rtol=1e-12, atol=0)
    assert (metrics["masked"], metrics["tokens"]) == (chosen, len(every))
    judged = replaced if kind.everywhere else replaced[places]
    assert_metrics(kind, metrics, judged, replaced.sum(), hits)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert len(copy) == 2 * (name == "all_tokens_mlm")
    for key, leaf in zip(COPY, copy, strict=False):
        torch.testing.assert_close(weights[key].grad, leaf.grad, rtol=1e-9, atol=1e-12)
    assert_gradients(gradients, modules)


def written_out(name, scores, hidden, every, seen, places, copy):
    """The main network's loss, and how many of its predictions are right, in plain PyTorch.

    Of all rows [n]: scores, hidden states, the original tokens and those seen; `places` are chosen.
    """
    replaced = (seen != every).double()
    if name == "electra":
        return F.binary_cross_entropy_with_logits(scores, replaced, reduction="sum"), None
    if name == "electra_15":
        scores, replaced = scores[places], replaced[places]
        return F.binary_cross_entropy_with_logits(scores, replaced, reduction="sum"), None
    if name == "all_tokens_mlm":
        copying = torch.sigmoid(hidden @ copy[0][0] + copy[1])[:, None]
        mixture = copying * F.one_hot(seen, VOCAB_SIZE) + (1 - copying) * scores.softmax(1)
        hits = (mixture.argmax(1) == every).sum()
        return -mixture[torch.arange(len(every)), every].log().sum(), hits
    scores, original = scores[places], every[places]
    return F.cross_entropy(scores, original, reduction="sum"), (scores.argmax(1) == original).sum()


def assert_metrics(kind, metrics, judged, replaced, hits):
    """Counts of what the main network judged, replaced or not, and of its right predictions."""
    assert metrics["predicted"] == len(judged)
    if kind.generator:
        assert 0 < replaced < metrics["masked"]  # some draws hit, some miss
        assert metrics["replaced"] == replaced
    if kind.detects:
        counts = [len(judged) - judged.sum(), judged.sum()]
        assert metrics["histogram"].sum(1).tolist() == counts
    else:
        assert metrics["main_correct"] == hits


def assert_gradients(gradients, modules):
    """Ours, by our names, are those of transformers' networks."""
    for part, module in modules.items():
        found = to_hub(gradients, part, isinstance(module, ElectraForMaskedLM))
        named = dict(module.named_parameters())
        assert set(found) == set(named)
        for key, parameter in named.items():
            torch.testing.assert_close(
                found[key], parameter.grad, rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("fixed", [False, True], ids=["cut as on CPU", "fixed shapes as on GPU"])
def test_padding_and_its_batches_change_nothing(name, fixed, monkeypatch):
    model = network(name)
    batch, _ = batch_with_some_hits(model)
    expected, metrics = model(batch)
    bare = electra.real_part(batch)
    empty = packed_batch([], VOCAB_SIZE, room=(30, 3, 8))
    if fixed:
        monkeypatch.setattr(electra, "real_part", lambda batch: batch)
    loss, again = model(bare)
    torch.testing.assert_close((loss, again), (expected, metrics))
    loss, metrics = model(empty)
    loss.backward()
    assert loss == 0
    assert all(metric.sum() == 0 for metric in metrics.values())
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_waits_for_the_device(name, monkeypatch):
    """The meta device has no values: a step that needed one, or a shape from one, would fail."""
    monkeypatch.setattr(attention, "backend", lambda *_: "torch flash")
    with torch.device("meta"):
        model = Electra(replace(MODEL, dropout=0.1), VOCAB_SIZE, ObjectiveConfig(name)).bfloat16()
    loss, metrics = model(packed_batch(LENGTHS, VOCAB_SIZE, room=(50, 7, 9)).to("meta"))
    loss.backward()
    assert all(value.dtype == torch.float32 for value in (loss, *metrics.values()))
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_scores_are_of_the_networks_that_there_are(name):
    kind, meter = OBJECTIVES[name], Meter()
    model = network(name)
    batch, _ = batch_with_some_hits(model)
    metrics = model(batch)[1]
    meter.add(metrics)
    scores = meter.read()
    assert ("mlm_loss" in scores) == ("fake_rate" in scores) == kind.generator
    assert ("disc_loss" in scores) == ("auc" in scores) == kind.detects
    assert ("main_loss" in scores) == ("main_accuracy" in scores) == (not kind.detects)
    scored = "disc_loss" if kind.detects else "main_loss"
    assert scores[scored] == pytest.approx(float(metrics[scored] / metrics["predicted"]), rel=1e-6)
    if kind.detects:  # a constant guess knows the share of fakes among what is judged
        share = float(metrics["replaced"] / metrics["predicted"])
        assert scores["prior_loss"] == pytest.approx(entropy(share), rel=1e-6)


def test_rows_of_logits_in_pieces_are_the_whole(monkeypatch):
    model = network("all_tokens_mlm")
    batch, _ = batch_with_some_hits(model)
    whole = model(batch)
    monkeypatch.setattr("fastelectra.model.heads.ROWS", 7)
    torch.testing.assert_close(model(batch), whole)


@pytest.mark.parametrize(
    ("sharing", "own"),
    [
        ("all", set()),
        ("tokens", {"segment", "position", "norm_weight", "norm_bias"}),
        ("none", {"word", "segment", "position", "norm_weight", "norm_bias"}),
    ],
)
def test_embedding_sharing(sharing, own):
    model = network("electra", replace(MODEL, embedding_sharing=sharing), temperature=1.0)
    weights = dict(model.named_parameters())
    prefix = "generator.embeddings."
    assert {name.removeprefix(prefix) for name in weights if name.startswith(prefix)} == own
    embeddings = model.generator.embeddings or model.embeddings
    assert (embeddings.word is model.embeddings.word) == (sharing != "none")
    assert model.generator.head.word is embeddings.word

    alike = network("electra", temperature=1.0)  # with these weights in both networks' embeddings
    with torch.no_grad():
        for name, value in alike.named_parameters():
            if name in weights:
                weights[name].copy_(value)
        for name in own:
            weights[prefix + name].copy_(weights[f"embeddings.{name}"])
    batch = packed_batch(LENGTHS, VOCAB_SIZE)
    for module in (model, alike):
        module(batch)[0].backward()
    torch.testing.assert_close(model(batch), alike(batch))
    for name, value in alike.named_parameters():
        gradient = model.get_parameter(name).grad
        if name.removeprefix("embeddings.") in own:  # the two networks' parts, not their sum
            gradient = gradient + weights["generator." + name].grad
        torch.testing.assert_close(gradient, value.grad)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampling_without_the_right_token(temperature, monkeypatch):
    monkeypatch.setattr("fastelectra.model.heads.ROWS", 4)
    model = network("electra", temperature=temperature, disallow_correct=True)
    with torch.no_grad():
        model.generator.head.output_bias.normal_(0, 1.5, generator=torch.Generator().manual_seed(5))
    batch = packed_batch(LENGTHS, VOCAB_SIZE)
    logits = model.generator_logits(batch) / temperature
    batch.labels[::2] = logits.argmax(1)[::2].int()  # the likeliest, and others
    batch.tokens[batch.masked_positions.long()] = batch.labels
    batch.uniforms[0], batch.uniforms[1] = 0.0, 1 - 2**-24
    draws = []
    model.generator.head.register_forward_hook(lambda *call: draws.append(call[2][1]))
    metrics = model(batch)[1]
    assert metrics["replaced"] == metrics["masked"] == len(batch.labels)
    for row, label, uniform, draw in zip(
        logits.double(), batch.labels, batch.uniforms, draws[0], strict=True
    ):
        others = [token for token in range(VOCAB_SIZE) if token != label]
        share = row[others].softmax(0).cumsum(0)
        assert draw == others[int((share <= uniform).sum().clamp(max=len(others) - 1))]
