"""The vocabulary head: samples, their independence of how the work is cut, and odd inputs."""

import math

import kernel_cases
import pytest
import torch
from fastelectra.kernels import (
    chunked_cross_entropy,
    flash_cross_entropy,
    linear_cross_entropy_sample,
    linear_cross_entropy_sample_reference,
)

WIDTH = {"flash": 24, "chunked": 144}  # in fp32 a row of 128 columns is the widest for flash
HEAD = "linear_cross_entropy_sample"
either_way = pytest.mark.parametrize("way", WIDTH)


def head(way, rows, vocabulary=400, seed=0):
    """hidden, weight, bias, labels, uniforms."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH[way], generator=g)
    weight = torch.randn(vocabulary, WIDTH[way], generator=g) * (2 / WIDTH[way] ** 0.5)
    bias = torch.randn(vocabulary, generator=g)
    labels = torch.randint(-1, vocabulary, (rows,), generator=g, dtype=torch.int32)
    return hidden, weight, bias, labels, torch.rand(rows, generator=g)


def test_width_decides_the_way():
    for way, module in (("flash", flash_cross_entropy), ("chunked", chunked_cross_entropy)):
        called = []
        original = module.forward
        module.forward = lambda *inputs, f=original, c=called: c.append(1) or f(*inputs)
        try:
            linear_cross_entropy_sample(*head(way, 1))
        finally:
            module.forward = original
        assert called, way


@either_way
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_invert_the_exact_distribution(way, temperature):
    hidden, weight, bias, labels, uniforms = head(way, 40)
    uniforms[:3] = torch.tensor([0.0, 1 - 2.0**-24, 1e-12])
    loss, sampled, correct = linear_cross_entropy_sample(
        hidden, weight, bias, labels, uniforms, temperature
    )
    exact = kernel_cases.exact_distribution(hidden, weight, bias, temperature)
    kernel_cases.assert_inverse_of(exact, uniforms, sampled)
    expected = linear_cross_entropy_sample_reference(
        hidden, weight, bias, labels, uniforms, temperature
    )
    torch.testing.assert_close(loss, expected[0])
    assert torch.equal(correct, expected[2])


@either_way
def test_labels_at_the_largest_logit_are_correct(way):
    hidden, weight, bias, labels, uniforms = head(way, 20)
    best = (hidden @ weight.t() + bias).argmax(1).int()
    labels = torch.where(torch.arange(20) < 7, best, (best + 1) % 400)
    labels[:2] = -1
    assert linear_cross_entropy_sample(hidden, weight, bias, labels, uniforms)[2] == 5


@pytest.mark.parametrize("size", [{"TILE": 64}, {"TILE": 256}, {"SLOTS": 1}, {"SLOTS": 5}])
def test_samples_do_not_depend_on_tiles_and_parts(size, monkeypatch):
    inputs = head("flash", 50)
    before = linear_cross_entropy_sample(*inputs)
    for name, value in size.items():
        monkeypatch.setattr(flash_cross_entropy, name, value)
    after = linear_cross_entropy_sample(*inputs)
    assert torch.equal(before[1], after[1])
    torch.testing.assert_close(before[0], after[0], rtol=1e-6, atol=0)


def test_samples_do_not_depend_on_chunks_or_on_other_rows(monkeypatch):
    inputs = head("chunked", 50)
    before = linear_cross_entropy_sample(*inputs)[1]
    monkeypatch.setitem(chunked_cross_entropy.CHUNK, "cpu", 7)
    assert torch.equal(before, linear_cross_entropy_sample(*inputs)[1])


@either_way
def test_samples_of_a_full_vocabulary_follow_it(way):
    rows, vocabulary = 240, 30_522
    g = torch.Generator().manual_seed(3)
    hidden = torch.zeros(rows, WIDTH[way])
    hidden[rows // 2 :, 0] = 3  # half the rows have a flat distribution, half a peaked one
    weight = torch.zeros(vocabulary, WIDTH[way])
    weight[:, 0] = torch.randn(vocabulary, generator=g)
    labels = torch.zeros(rows, dtype=torch.int32)
    uniforms = torch.rand(rows, generator=g)
    bias = torch.zeros(vocabulary)
    loss, sampled, _ = linear_cross_entropy_sample(hidden, weight, bias, labels, uniforms)
    exact = kernel_cases.exact_distribution(hidden[[0, -1]], weight, bias, 1.0)
    kernel_cases.assert_inverse_of(exact.repeat_interleave(rows // 2, 0), uniforms, sampled)
    for distribution, samples in zip(exact, sampled.chunk(2), strict=True):
        kernel_cases.assert_follows(distribution, samples, groups=10)
    nll = -exact.diff()[:, 0].log().mean().item()
    assert math.isclose(loss.item() / rows, nll, rel_tol=1e-5)


@either_way
def test_extreme_logits_and_forbidden_tokens(way):
    hidden, weight, bias, labels, uniforms = head(way, 12)
    hidden[:6] *= 1e4
    bias[300:] = -math.inf  # padding of the vocabulary: a whole tile and a part of one
    labels.clamp_(max=299)
    low = [t.requires_grad_() for t in (hidden, weight, bias)]
    rest = labels, uniforms
    assert (linear_cross_entropy_sample(*low, *rest)[1] < 300).all()
    exact = [t.detach().double().requires_grad_() for t in low]
    truth = kernel_cases.with_gradients(kernel_cases.reference(HEAD), [*exact, *rest])
    fused = kernel_cases.with_gradients(kernel_cases.operation(HEAD), [*low, *rest])
    rounding = 2.0**-23 * (exact[0] @ exact[1].t()).abs().max()  # of a logit: of p, relatively
    for t, f in zip(truth, fused, strict=True):
        assert (f - t).norm() <= 2 * rounding * t.norm()
    assert not fused[2][300:].any()
    assert not fused[3][300:].any()


@either_way
@pytest.mark.parametrize("rows", [0, 5])
def test_no_rows_and_no_labels_give_zero(way, rows):
    hidden, weight, bias, labels, uniforms = head(way, rows)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss, sampled, correct = linear_cross_entropy_sample(*inputs, labels.fill_(-1), uniforms)
    assert loss == 0
    assert correct == 0
    assert sampled.shape == (rows,)
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, inputs))


@either_way
def test_only_the_loss_has_a_gradient(way):
    hidden, *rest = head(way, 3)
    loss, sampled, correct = linear_cross_entropy_sample(hidden.requires_grad_(), *rest)
    assert loss.requires_grad
    assert not sampled.requires_grad
    assert not correct.requires_grad


@pytest.mark.parametrize("module", [flash_cross_entropy, chunked_cross_entropy])
def test_opcheck(module):
    hidden, *rest = head("flash", 4, vocabulary=150)
    wanted = (True,) if module is chunked_cross_entropy else ()
    torch.library.opcheck(module.forward, (hidden.requires_grad_(), *rest, 0.8, *wanted))
