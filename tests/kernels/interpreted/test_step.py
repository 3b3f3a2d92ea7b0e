"""A whole training step through the Triton kernels is the step through PyTorch."""

import copy

import pytest
import torch

from fastelectra import kernels
from fastelectra.config import ModelConfig, ObjectiveConfig
from fastelectra.data.batch import Batch
from fastelectra.model import Electra

VOCABULARY, LENGTHS, PADDING = 67, (11, 4, 9), 6
SIZES = ModelConfig(
    layers=1, hidden_size=24, intermediate_size=40, heads=4, embedding_size=16,
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


def step(model, backend):
    """[loss, each metric, each gradient] by name."""
    kernels.set_backend(backend)
    model.zero_grad()
    loss, metrics = model(batch())
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **metrics, **gradients}


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = Electra(SIZES, VOCABULARY, ObjectiveConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.bfloat16()


def test_exactly_in_double_precision(model):
    model.double()
    fused, plain = step(model, "triton"), step(model, "torch")
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_twice_pytorchs_error(model, dtype):
    truth = step(copy.deepcopy(model).double(), "torch")
    model.to(dtype)
    fused, plain = step(model, "triton"), step(model, "torch")
    for name, value in truth.items():
        error, allowed = ((way[name].double() - value).norm() for way in (fused, plain))
        # the errors of a sum may cancel by chance
        slack = 5e-4 if dtype == torch.bfloat16 and not value.ndim else 1e-6
        assert error <= 2 * allowed + slack * value.norm(), name
