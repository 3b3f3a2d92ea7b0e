"""A whole training step through the Triton kernels is the step through PyTorch."""

import collections
import copy
import dataclasses

import kernel_cases
import pytest
import torch

from fastelectra import kernels
from fastelectra.config import ModelConfig, ObjectiveConfig
from fastelectra.data.batch import Batch
from fastelectra.model import Electra, embeddings, encoder

VOCABULARY, LENGTHS, PADDING = 67, (11, 4, 9), 6
SIZES = ModelConfig(  # heads of 8, the least that attention on GPUs takes
    layers=1, hidden_size=32, intermediate_size=40, heads=4, embedding_size=16,
    generator_fraction=0.5, max_positions=16, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def batch():
    """Three examples, four chosen positions, and padding of every kind."""
    g = torch.Generator().manual_seed(0)
    real = sum(LENGTHS)
    total = real + PADDING
    tokens = torch.randint(5, VOCABULARY, (total,), generator=g, dtype=torch.int32)
    chosen = torch.tensor([2, 9, 12, 20, total, total], dtype=torch.int32)
    labels = torch.where(chosen < total, tokens[chosen.clamp(max=total - 1)], -1)
    positions = torch.cat([torch.arange(n) for n in (*LENGTHS, PADDING)]).int()
    boundaries = torch.tensor([0, *LENGTHS, 0]).cumsum(0).int()
    return Batch(
        tokens=tokens, segments=(positions > 5).int(), positions=positions, cu_seqlens=boundaries,
        masked_positions=chosen, masked_inputs=torch.full_like(chosen, 4), labels=labels,
        uniforms=torch.rand(len(chosen), generator=g), totals=torch.tensor([4.0, float(real)]),
        max_length=max(LENGTHS), seed=0,
    )  # fmt: skip


def middles(model):
    """For each chosen position the middle of its likeliest token's step: rounding moves no draw."""
    chances = model.generator_logits(batch()).softmax(1)
    largest, token = chances.max(1)
    return chances.cumsum(1).gather(1, token[:, None])[:, 0] - largest / 2


def step(model, backend, uniforms):
    """[loss, each metric, each gradient] by name."""
    kernels.set_backend(backend)
    model.zero_grad()
    device = model.embeddings.word.device
    loss, metrics = model(dataclasses.replace(batch(), uniforms=uniforms).to(device))
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    found = {"loss": loss.detach(), **metrics, **gradients}
    return {name: value.cpu() for name, value in found.items()}


def model(seed):
    torch.manual_seed(seed)
    model = Electra(SIZES, VOCABULARY, ObjectiveConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.bfloat16().double()


@pytest.mark.skipif(kernel_cases.ON_GPU, reason="attention on GPUs takes no fp64")
def test_exactly_in_double_precision():
    fused, plain = (step(model(1), way, batch().uniforms) for way in ("triton", "torch"))
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_twice_pytorchs_error(dtype):
    squares = collections.defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    for seed in range(4):  # as the errors of a small tensor may cancel by chance in one way
        exact = model(seed)
        kernels.set_backend("torch")
        uniforms = middles(exact)[: len(batch().labels)]
        uniforms = torch.nn.functional.pad(uniforms, (0, len(batch().labels) - len(uniforms)))
        truth = step(copy.deepcopy(exact), "torch", uniforms)
        exact.to(kernel_cases.device, dtype)
        fused, plain = step(exact, "triton", uniforms), step(exact, "torch", uniforms)
        histogram = truth.pop("histogram").sum(1)  # rounding moves a logit to the next bin
        assert torch.equal(fused["histogram"].sum(1), histogram)
        for name, value in truth.items():
            errors = fused[name].double() - value, plain[name].double() - value, value
            squares[name] += torch.stack([error.square().sum() for error in errors])
    for name, (error, allowed, size) in squares.items():
        assert error.sqrt() <= 2 * allowed.sqrt() + 1e-6 * size.sqrt(), name


def test_every_dropout_of_every_step_has_a_seed_of_its_own(monkeypatch):
    seeds = []

    def noting(function, place):
        def call(*arguments):
            seeds.append(arguments[place].item())
            return function(*arguments)

        return call

    for module, name, place in (
        (encoder, "dropout_add_layer_norm", 6),
        (encoder, "attention", 3),
        (embeddings, "embed_layer_norm", 9),
    ):
        monkeypatch.setattr(module, name, noting(getattr(module, name), place))
    model = Electra(
        dataclasses.replace(SIZES, layers=2, dropout=0.1), VOCABULARY, ObjectiveConfig()
    )
    model.to(kernel_cases.device)
    losses = [model(batch().to(kernel_cases.device))[0].item() for _ in range(2)]
    assert losses[0] != losses[1]
    assert len(seeds) == 2 * 2 * (1 + 3 * 2)  # steps, networks, embedding and layers
    assert len(set(seeds)) == len(seeds)
