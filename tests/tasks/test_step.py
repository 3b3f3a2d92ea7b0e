"""A fine-tuning step against plain transformers and torch, in fp64; layer-wise rates; examples."""

import gc
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recording import captured_stand_in
from torch import nn
from transformers import AutoTokenizer, ElectraModel

from fastelectra import kernels
from fastelectra.config import ModelConfig, OptimizerConfig
from fastelectra.data import vocabulary
from fastelectra.model.hub_names import hub_names
from fastelectra.tasks import loop, pretrained
from fastelectra.tasks.classifier import Classifier, layer_groups, loss_of
from fastelectra.tasks.loop import Steps, Weights, batches, predict
from fastelectra.tasks.packing import Labelled, encode, pack
from fastelectra.tasks.table import GOOGLE, PLAIN
from fastelectra.training.optimizer import PaperAdam

TEXTS = [
    ("Fellow citizens of the Senate", "and of the House of Representatives"),
    ("I embrace with great satisfaction the opportunity", "which now presents itself"),
    ("The recent accession of the important State", ""),
    ("peace", "war and peace, and the means of preserving peace"),
]
RATE = 0.01


@pytest.fixture
def start(checkpoint):
    return pretrained.load(checkpoint)


def batch_of(start, labels=None, multiple=1):
    encoder = vocabulary.line_encoder(start.tokenizer)
    batch = pack(encode(encoder, start.special, TEXTS, 24), 24, multiple)
    return batch if labels is None else Labelled(*vars(batch).values(), labels)


class Reference(nn.Module):
    """ElectraModel, and a linear layer on the [CLS] vector."""

    def __init__(self, folder, classifier):
        super().__init__()
        self.encoder = ElectraModel.from_pretrained(folder).double().eval()
        self.head = nn.Linear(classifier.head.in_features, classifier.head.out_features).double()
        self.head.load_state_dict(classifier.head.state_dict())
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def forward(self):
        pairs = [pair if pair[1] else pair[:1] for pair in TEXTS]
        rows = [self.tokenizer(*pair, truncation=True, max_length=24) for pair in pairs]
        inputs = self.tokenizer.pad({k: [row[k] for row in rows] for k in rows[0]},
                                    return_tensors="pt")  # fmt: skip
        return self.head(self.encoder(**inputs).last_hidden_state[:, 0])

    def parameter(self, name):
        """Theirs, by the names of the checkpoint."""
        if name.startswith("head."):
            return self.get_parameter(name)
        return self.encoder.get_parameter(name.removeprefix("electra."))


@pytest.mark.parametrize("outputs", [1, 3])
def test_two_steps_are_those_of_transformers_and_torch(start, exported, outputs):
    classifier = start.classifier(outputs, seed=3).double().eval()
    reference = Reference(exported / "discriminator", classifier)
    labels = torch.tensor([0.2, 0.9, 1.0, 0.5]) if outputs == 1 else torch.tensor([0, 2, 1, 1])
    optimizer = PaperAdam(layer_groups(classifier, 0.8, GOOGLE), OptimizerConfig())
    moments = {}
    for step in (1, 2):
        logits = reference()
        if outputs == 1:
            loss = ((logits[:, 0] - labels) ** 2).mean()
        else:
            loss = F.nll_loss(logits.log_softmax(1), labels)
        loss.backward()
        gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()]))

        torch.testing.assert_close(classifier(batch_of(start)), logits, rtol=1e-9, atol=1e-9)
        if step == 1:  # gradients before they are clipped
            loss_of(classifier(batch_of(start)), labels).backward()
            for name, parameter in classifier.named_parameters():
                theirs = [name] if name.startswith("head.") else hub_names(name)
                theirs = torch.cat([reference.parameter(part).grad for part in theirs])
                if name == "embeddings.word":  # Hugging Face does not train [PAD]
                    parameter.grad[0] = theirs[0]
                torch.testing.assert_close(parameter.grad, theirs, rtol=1e-8, atol=1e-10)
            optimizer.zero_grad()
        ours = Steps(Weights(classifier, "fp32"), optimizer)(batch_of(start, labels), RATE)
        torch.testing.assert_close(ours, loss.detach(), rtol=1e-9, atol=1e-9)

        with torch.no_grad():
            for name, gradient in gradients.items():
                layer = re.search(r"\.layer\.(\d)\.", name)  # of two: the upper has decay²
                scale = 0.8 ** (3 - int(layer[1])) if layer else 0.8**4
                scale = 1 if name.startswith("head.") else scale
                clipped = gradient * min(1.0, 1.0 / (float(norm) + 1e-6))
                m, v = moments.get(name, (0.0, 0.0))
                m, v = 0.9 * m + 0.1 * clipped, 0.999 * v + 0.001 * clipped**2
                moments[name] = m, v
                reference.get_parameter(name).sub_(RATE * scale * m / (v.sqrt() + 1e-6))
        reference.zero_grad(set_to_none=True)
    for name, parameter in classifier.named_parameters():
        theirs = [name] if name.startswith("head.") else hub_names(name)
        theirs = torch.cat([reference.parameter(part) for part in theirs])
        torch.testing.assert_close(parameter, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("convention", "top", "embeddings"), [(GOOGLE, 0.8**2, 0.8**14), (PLAIN, 0.8, 0.8**13)]
)
def test_rates_of_the_twelve_layers(convention, top, embeddings):
    classifier = Classifier(ModelConfig(), 100, 2)
    names = {parameter: name for name, parameter in classifier.named_parameters()}
    scales = {
        names[parameter]: group["scale"]
        for group in layer_groups(classifier, 0.8, convention)
        for parameter in group["params"]
    }
    assert scales.keys() == set(names.values())
    assert scales["head.weight"] == scales["head.bias"] == 1
    for layer in range(12):
        prefix = f"discriminator.encoder.{layer}."
        (scale,) = {s for n, s in scales.items() if n.startswith(prefix)}
        assert scale == pytest.approx(top * 0.8 ** (11 - layer))
    below = ("embeddings.word", "embeddings.norm_bias", "discriminator.project.weight")
    for name in below:
        assert scales[name] == pytest.approx(embeddings)


def test_bf16_keeps_fp32_weights(start):
    classifier = start.classifier(2, seed=0)
    weights = Weights(classifier, "bf16")
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    assert weights.model.head.weight.dtype == torch.float32
    assert weights.model.embeddings.word.dtype == torch.bfloat16
    optimizer = PaperAdam(layer_groups(classifier, 0.8, GOOGLE), OptimizerConfig())
    labels, before = torch.tensor([0, 1, 0, 1]), classifier.embeddings.word.clone()
    torch.manual_seed(0)  # else dropout is what earlier tests have left
    first = Steps(weights, optimizer)(batch_of(start, labels), 1e-5)
    assert not torch.equal(before, classifier.embeddings.word)
    assert torch.equal(weights.model.embeddings.word, classifier.embeddings.word.bfloat16())
    expected = loss_of(start.classifier(2, seed=0).eval()(batch_of(start)), labels)
    torch.testing.assert_close(first, expected.detach(), rtol=0.2, atol=0.2)  # dropout


def steps(start, captures, device="cpu"):
    """Losses and weights after five steps of two sizes, with growing rates and dropout."""
    classifier = start.classifier(2, seed=0).to(device)
    weights = Weights(classifier, "bf16")
    learn = Steps(weights, PaperAdam(layer_groups(classifier, 0.8, GOOGLE), OptimizerConfig()))
    if captures:
        learn.capture()
    elif device != "cpu":
        learn.replays = None
    torch.manual_seed(3)
    labels = torch.tensor([0, 1, 0, 1])
    sizes = (64, 64, 96, 64, 96)  # tokens, for both ways
    losses = [learn(batch_of(start, labels + 0, size), 1e-3 * n) for n, size in enumerate(sizes, 1)]
    return [torch.stack(losses), *classifier.parameters(), *weights.model.parameters()]


def test_replays_are_the_same_steps(start, monkeypatch):
    monkeypatch.setattr("fastelectra.training.graphs.captured", captured_stand_in)
    monkeypatch.setattr(loop, "BATCH", len(TEXTS))
    kernels.set_backend("torch")  # loops on the CPU are no calls on tensors
    try:
        eager, replayed = steps(start, False), steps(start, True)
    finally:
        kernels.set_backend("auto")
    assert all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures graphs")
def test_replays_on_a_gpu_are_the_same_steps(start, monkeypatch):
    monkeypatch.setattr(loop, "BATCH", len(TEXTS))
    start = replace(start, model=replace(start.model, heads=3))  # of 8, which GPUs take
    eager = steps(start, False, "cuda:0")
    for _ in range(2):  # the second when the first's graphs are gone
        for one, other in zip(steps(start, True, "cuda:0"), eager, strict=True):
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
        gc.collect()


def test_padding_changes_nothing(start):
    classifier = start.classifier(2, seed=0).double().eval()
    padded = batch_of(start, multiple=50)
    assert len(padded.tokens) % 50 == 0 != len(batch_of(start).tokens) % 50
    torch.testing.assert_close(classifier(padded), classifier(batch_of(start)))


def test_examples_are_cut_as_google_cuts_them():
    rng = np.random.default_rng(0)
    special = {"cls": 1, "sep": 2}
    lengths = rng.integers(0, 14, (200, 2))
    texts = [([5] * a, [6] * b) for a, b in lengths]
    for pair, example in zip(texts, encode(list, special, texts, 12), strict=True):
        a, b = map(list, pair)
        while len(a) + len(b) > (9 if b else 10):
            (a if len(a) > len(b) else b).pop()
        expected = [1, *a, 2] + ([*b, 2] if b else [])
        assert example.tokens.tolist() == expected
        assert example.first == len(a) + 2
    single = encode(list, special, [([5] * 20,)], 12)[0]
    assert single.tokens.tolist() == [1, *[5] * 10, 2]


def test_packed_examples():
    batch = pack(encode(list, {"cls": 1, "sep": 2}, [([7, 8], [9]), ([5], [])], 12), 12)
    assert batch.tokens.tolist() == [1, 7, 8, 2, 9, 2, 1, 5, 2]
    assert batch.segments.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 6, 9]


def test_every_epoch_has_all_examples_in_an_order_of_its_own():
    found = list(batches(70, 2, seed=1))
    assert [len(batch) for batch in found] == [32, 32, 6] * 2
    epochs = np.concatenate(found[:3]), np.concatenate(found[3:])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(70))
    assert list(epochs[0]) != list(epochs[1])
    again = np.concatenate(list(batches(70, 2, seed=1)))
    assert np.array_equal(again, np.concatenate(epochs))
    assert not np.array_equal(again, np.concatenate(list(batches(70, 2, seed=2))))


def test_predictions_come_in_the_order_of_the_examples(start, monkeypatch):
    monkeypatch.setattr("fastelectra.tasks.loop.PREDICTED", 48)  # two at a time
    classifier = start.classifier(3, seed=0).eval()
    examples = encode(vocabulary.line_encoder(start.tokenizer), start.special, TEXTS, 24)
    outputs = predict(classifier, examples, 24)
    expected = torch.cat([classifier(pack([example], 24)) for example in examples])
    np.testing.assert_allclose(outputs, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
