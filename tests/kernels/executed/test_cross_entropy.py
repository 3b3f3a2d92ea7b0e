"""The vocabulary head: samples, their independence of how the work is cut, and odd inputs."""

import importlib
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

from fastelectra import kernels

WIDTH = 24
either_way = pytest.mark.parametrize("way", kernel_cases.WAYS)


def head(rows, vocabulary=400, seed=0):
    """hidden, weight, bias, labels, uniforms."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=g)
    weight = torch.randn(vocabulary, WIDTH, generator=g) * (2 / WIDTH**0.5)
    bias = torch.randn(vocabulary, generator=g)
    labels = torch.randint(-1, vocabulary, (rows,), generator=g, dtype=torch.int32)
    return kernel_cases.placed(hidden, weight, bias, labels, torch.rand(rows, generator=g))


@pytest.mark.parametrize(
    ("width", "dtype", "way"),
    [
        (256, torch.bfloat16, "flash_cross_entropy"),
        (256, torch.float16, "flash_cross_entropy"),
        (272, torch.bfloat16, "chunked_cross_entropy"),
        (64, torch.float32, "chunked_cross_entropy"),
    ],
)
def test_width_and_type_decide_the_way(width, dtype, way, monkeypatch):
    class Taken(Exception):
        pass

    def raising(*_):
        raise Taken

    monkeypatch.setattr(getattr(kernels, way), "forward", raising)
    shapes = (1, width), (9, width), (9,)
    tables = [torch.zeros(*shape, dtype=dtype) for shape in shapes]
    with pytest.raises(Taken):
        linear_cross_entropy_sample(
            *kernel_cases.placed(*tables, torch.zeros(1).int(), torch.zeros(1))
        )


def test_older_gpus_have_no_room_for_the_tiles(monkeypatch):
    for capability, room in (((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, of=capability: of)
        module = importlib.import_module("fastelectra.kernels.linear_cross_entropy_sample")
        assert module._has_room(torch.device("cuda")) == room


@either_way
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_invert_the_exact_distribution(way, temperature):
    hidden, weight, bias, labels, uniforms = head(40)
    uniforms[:3] = torch.tensor([0.0, 1 - 2.0**-24, 1e-12])
    loss, sampled, correct = kernel_cases.WAYS[way](
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
    hidden, weight, bias, labels, uniforms = head(20)
    best = (hidden @ weight.t() + bias).argmax(1).int()
    labels = torch.where(torch.arange(20, device=best.device) < 7, best, (best + 1) % 400)
    labels[:2] = -1
    assert kernel_cases.WAYS[way](hidden, weight, bias, labels, uniforms, 1.0)[2] == 5


@pytest.mark.parametrize("size", [{"TILE": 64}, {"TILE": 256}, {"SLOTS": 1}, {"SLOTS": 5}])
def test_samples_do_not_depend_on_tiles_and_parts(size, monkeypatch):
    inputs = *head(50), 1.0
    before = kernel_cases.flash(*inputs)
    for name, value in size.items():
        monkeypatch.setattr(flash_cross_entropy, name, value)
    after = kernel_cases.flash(*inputs)
    assert torch.equal(before[1], after[1])
    torch.testing.assert_close(before[0], after[0], rtol=1e-6, atol=0)


def test_samples_do_not_depend_on_chunks_or_on_other_rows(monkeypatch):
    inputs = *head(130), 1.0
    before = kernel_cases.chunked(*inputs)[1]
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK", {"cpu": 64, "cuda": 64})
    assert torch.equal(before, kernel_cases.chunked(*inputs)[1])


@either_way
def test_samples_of_a_full_vocabulary_follow_it(way):
    rows, vocabulary = 80, 30_522
    g = torch.Generator().manual_seed(3)
    hidden = torch.zeros(rows, WIDTH)
    hidden[rows // 2 :, 0] = 3  # half the rows have a flat distribution, half a peaked one
    weight = torch.zeros(vocabulary, WIDTH)
    weight[:, 0] = torch.randn(vocabulary, generator=g)
    labels, bias = torch.zeros(rows, dtype=torch.int32), torch.zeros(vocabulary)
    hidden, weight, bias, labels, uniforms = kernel_cases.placed(
        hidden, weight, bias, labels, torch.rand(rows, generator=g)
    )
    loss, sampled, _ = kernel_cases.WAYS[way](hidden, weight, bias, labels, uniforms, 1.0)
    exact = kernel_cases.exact_distribution(hidden[[0, -1]], weight, bias, 1.0)
    kernel_cases.assert_inverse_of(exact.repeat_interleave(rows // 2, 0), uniforms, sampled)
    for distribution, samples in zip(exact, sampled.chunk(2), strict=True):
        kernel_cases.assert_follows(distribution, samples, groups=8)
    nll = -exact.diff()[:, 0].log().mean().item()
    assert math.isclose(loss.item() / rows, nll, rel_tol=1e-5)


@either_way
def test_extreme_logits_and_forbidden_tokens(way):
    hidden, weight, bias, labels, uniforms = head(12)
    hidden[:6] *= 1e4
    bias[300:] = -math.inf  # padding of the vocabulary: a whole tile and a part of one
    labels.clamp_(max=299)
    low = [t.requires_grad_() for t in (hidden, weight, bias)]
    rest = labels, uniforms, 1.0
    assert (kernel_cases.WAYS[way](*low, *rest)[1] < 300).all()
    exact = [t.detach().double().requires_grad_() for t in low]
    truth = kernel_cases.with_gradients(kernel_cases.reference(way), [*exact, *rest])
    fused = kernel_cases.with_gradients(kernel_cases.operation(way), [*low, *rest])
    rounding = 2.0**-23 * (exact[0] @ exact[1].t()).abs().max()  # of a logit: of p, relatively
    for t, f in zip(truth, fused, strict=True):
        assert (f - t).norm() <= 2 * rounding * t.norm()
    assert not fused[2][300:].any()
    assert not fused[3][300:].any()


@either_way
@pytest.mark.parametrize("rows", [0, 5])
def test_no_rows_and_no_labels_give_zero(way, rows):
    hidden, weight, bias, labels, uniforms = head(rows)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    labels.fill_(-1)
    loss, sampled, correct = kernel_cases.WAYS[way](*inputs, labels, uniforms, 1.0)
    assert loss == 0
    assert correct == 0
    assert sampled.shape == (rows,)
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, inputs))


@either_way
def test_only_the_loss_has_a_gradient(way):
    hidden, *rest = head(3)
    loss, sampled, correct = kernel_cases.WAYS[way](hidden.requires_grad_(), *rest, 1.0)
    assert loss.requires_grad
    assert not sampled.requires_grad
    assert not correct.requires_grad


@either_way
def test_a_hit_is_a_label_at_the_top_and_nothing_else(way):
    hidden, weight = torch.ones(5, WIDTH), torch.zeros(300, WIDTH)
    bias = torch.full((300,), -9.0)
    bias[7], bias[200], bias[299] = -3.0, -3.001, -3.1
    labels = torch.tensor([7, -1, 200, 299, -1], dtype=torch.int32)
    inputs = kernel_cases.placed(hidden, weight, bias, labels, torch.rand(5))
    assert kernel_cases.WAYS[way](*inputs, 1.0)[2] == 1


@either_way
def test_a_hit_is_one_whichever_block_has_the_top(way):
    hidden, weight = torch.ones(4, WIDTH), torch.zeros(2500, WIDTH)
    bias = torch.linspace(4, 0, 2500)
    labels = torch.tensor([0, 50, 2400, -1], dtype=torch.int32)
    inputs = kernel_cases.placed(hidden, weight, bias, labels, torch.rand(4))
    assert kernel_cases.WAYS[way](*inputs, 1.0)[2] == 1


@either_way
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_the_last_token_with_mass_may_lie_blocks_before_the_end(way, temperature):
    hidden, weight, bias, labels, uniforms = head(64, vocabulary=2500)
    bias[900:] = -70
    uniforms[:] = 1 - 2.0**-24 * torch.arange(1, 65)
    sampled = kernel_cases.WAYS[way](hidden, weight, bias, labels, uniforms, temperature)[1]
    exact = kernel_cases.exact_distribution(hidden, weight, bias, temperature)
    kernel_cases.assert_inverse_of(exact, uniforms, sampled)


@either_way
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_tokens_of_negligible_mass_are_never_drawn(way, temperature):
    """Neither the first nor the last of a tile, though a sum may end below its own total."""
    hidden, weight, bias, labels, uniforms = head(64)
    bias[::128] = bias[127::128] = bias[-1] = -70
    uniforms[:] = 1 - 2.0**-24 * torch.arange(1, 65)
    uniforms[32:] = 2.0**-24 * torch.arange(32)
    sampled = kernel_cases.WAYS[way](hidden, weight, bias, labels, uniforms, temperature)[1]
    assert (bias[sampled.long()] > -70).all()
    exact = kernel_cases.exact_distribution(hidden, weight, bias, temperature)
    kernel_cases.assert_inverse_of(exact, uniforms, sampled)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_of_many_blocks(temperature):
    """Logits that rise from block to block; of the first block, none at all."""
    g = torch.Generator().manual_seed(5)
    vocabulary, rows = 9_000, 6
    hidden, weight = torch.randn(rows, WIDTH, generator=g), torch.randn(vocabulary, WIDTH)
    bias = torch.linspace(0, 4, vocabulary)
    bias[:4_500] = -math.inf
    labels = torch.tensor([4_500, 8_192, -1, 8_191, 8_999, 6_000], dtype=torch.int32)
    uniforms = torch.tensor([0.0, 0.3, 0.5, 0.7, 0.9, 1 - 2.0**-24])
    tables = [t.double().requires_grad_() for t in (hidden / 4, weight, bias)]
    inputs = [kernel_cases.convert(t, kernel_cases.EXACT) for t in (*tables, labels, uniforms)]
    inputs.append(temperature)
    fused = kernel_cases.with_gradients(kernel_cases.operation("chunked_cross_entropy"), inputs)
    plain = kernel_cases.with_gradients(kernel_cases.reference("chunked_cross_entropy"), inputs)
    for f, p in zip(fused, plain, strict=True):
        torch.testing.assert_close(f, p, **kernel_cases.CLOSE)
    _, sampled, _ = kernel_cases.chunked(*inputs)
    exact = kernel_cases.exact_distribution(*inputs[:3], temperature)
    kernel_cases.assert_inverse_of(exact, inputs[4], sampled)


@pytest.mark.skipif(not kernel_cases.ON_GPU, reason="needs CUDA's allocator")
@pytest.mark.parametrize(("width", "share"), [(128, 0.1), (768, 1)])
def test_all_logits_are_never_held(width, share):
    rows, vocabulary = 9_830, 30_522
    shapes = (rows, width), (vocabulary, width), (vocabulary,)
    tables = [torch.zeros(s, dtype=torch.bfloat16, device="cuda").requires_grad_() for s in shapes]
    rest = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows)

    def step():
        loss, *_ = linear_cross_entropy_sample(*tables, *placed)
        torch.autograd.grad(loss, tables)

    placed = kernel_cases.placed(*rest)
    step()  # the library's workspaces
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    assert torch.cuda.max_memory_allocated() - before < share * rows * vocabulary * 2


@pytest.mark.parametrize("module", [flash_cross_entropy, chunked_cross_entropy])
def test_opcheck(module):
    hidden, *rest = head(4, vocabulary=150)
    wanted = (True,) if module is chunked_cross_entropy else ()
    torch.library.opcheck(module.forward.custom_op, (hidden.requires_grad_(), *rest, 0.8, *wanted))
