"""The compiled loops that train on the CPU: as exact as PyTorch, same bits every time."""

import os
import subprocess
import sys

import kernel_cases
import masks
import pytest
import torch
import torch.nn.functional as F
from fastelectra.kernels import cpu, dispatch
from fastelectra.kernels.embedding_gradient import embedding_gradient
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastelectra import kernels

if cpu.numba is None:
    pytest.skip("the loops need numba", allow_module_level=True)
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


CASES = {
    name: kernel_cases.CASES[name]
    for name in (
        "packed_attention",
        "bias_gelu",
        "dropout_add_layer_norm",
        "embed_layer_norm",
        "chunked_cross_entropy",
    )
}
every_op = pytest.mark.parametrize("name", CASES)
every_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def cases(monkeypatch):
    monkeypatch.setattr(kernel_cases, "CASES", CASES)
    assert dispatch.use_loops(torch.zeros(1))
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    yield
    torch.use_deterministic_algorithms(False)


@every_op
@every_type
@pytest.mark.parametrize(("rows", "width"), [(300, 64), (70, 37), (513, 16)])
def test_error_is_at_most_twice_that_of_pytorch(name, dtype, rows, width):
    kernel_cases.assert_error_is_small(name, rows, width, dtype, slack_of_sums=1e-4)


@every_op
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(rows=st.integers(0, 150), width=st.integers(1, 80))
def test_any_shape(name, rows, width):
    if "layer_norm" in name:
        width += 3  # the deviation of few numbers may be next to 0: rounding is then everything
    inputs = kernel_cases.make(name, rows, width, torch.float32)
    loops = kernel_cases.with_gradients(kernel_cases.operation(name), inputs)
    plain = kernel_cases.with_gradients(kernel_cases.reference(name), inputs)
    for f, p in zip(loops, plain, strict=True):
        small = 2e-5
        if name == "packed_attention" and p.numel():  # sums of all rows, some of which cancel
            small += 3e-6 * p.abs().max().item()
        torch.testing.assert_close(f, p, rtol=2e-4, atol=small)


@pytest.mark.parametrize("used", [0, 1])
def test_either_use_of_a_layers_output_may_have_no_gradient(used):
    inputs = kernel_cases.make("dropout_add_layer_norm", 40, 24, torch.float32)
    loops, plain = (
        kernel_cases.with_gradients(lambda *inputs, way=way: way(*inputs)[used], inputs)
        for way in (
            kernels.dropout_add_layer_norm,
            kernels.dropout_add_layer_norm_reference,
        )
    )
    for f, p in zip(loops, plain, strict=True):
        torch.testing.assert_close(f, p, rtol=2e-4, atol=2e-5)


@pytest.mark.skipif(not cpu.HAS_BF16, reason="this CPU has no avx512_bf16: all other tests do it")
def test_without_instructions_for_bf16():
    here = [
        __file__ + "::test_error_is_at_most_twice_that_of_pytorch",
        "-k",
        "300 and dtype1 and attention",
    ]
    command = [sys.executable, "-m", "pytest", "-q", *here]
    run = subprocess.run(command, check=False, env={**os.environ, "NUMBA_CPU_NAME": "generic"},
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    ("name", "checked"),
    [("bias_gelu", 1), ("dropout_add_layer_norm", 3), ("embed_layer_norm", 5)],
)
def test_sums_over_many_rows_are_as_exact_as_over_few(name, checked):
    """In fp32 alone a sum of a hundred thousand equal numbers is off by a thousandth."""
    inputs = kernel_cases.make(name, 100_000, 16, torch.float32)
    exact = [kernel_cases.convert(value, torch.float64) for value in inputs]
    with kernel_cases.in_threads(1):
        for function, given in ((kernel_cases.operation, inputs), (kernel_cases.reference, exact)):
            output = function(name)(*given)
            width = output.shape[1]
            output.backward(torch.linspace(-1.05, 1, width, dtype=output.dtype).expand_as(output))
    for mine, its in zip(inputs, exact, strict=True):
        if isinstance(mine, torch.Tensor) and mine.requires_grad and len(mine) < 100:
            sums = its.grad.abs() > 1000  # the terms of others cancel
            assert (mine.grad / its.grad - 1)[sums].abs().max() < 2e-6
            checked -= 1
    assert not checked


@every_op
@every_type
def test_two_runs_are_bitwise_equal(name, dtype):
    inputs = kernel_cases.make(name, 200, 24, dtype)
    once, twice = (
        kernel_cases.with_gradients(kernel_cases.operation(name), inputs) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_many_runs_on_narrow_rows_are_bitwise_equal():
    """Wherever their small arrays come to lie in memory."""
    inputs = kernel_cases.make("dropout_add_layer_norm", 200, 24, torch.float32)
    operation = kernel_cases.operation("dropout_add_layer_norm")
    with kernel_cases.in_threads(3):
        first, *others = (kernel_cases.with_gradients(operation, inputs) for _ in range(300))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@every_op
@pytest.mark.parametrize("threads", [2, 3], indirect=True)
def test_any_number_of_threads(name, threads):
    inputs = kernel_cases.make(name, 130, 24, torch.float32)
    actual = kernel_cases.with_gradients(kernel_cases.operation(name), inputs)
    with kernel_cases.in_threads(1):
        expected = kernel_cases.with_gradients(kernel_cases.operation(name), inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@every_op
def test_not_a_number_is_passed_on(name):
    inputs = kernel_cases.make(name, 40, 24, torch.bfloat16)
    with torch.no_grad():
        if inputs[0].is_floating_point():
            inputs[0][33] = torch.nan
        else:  # an index
            inputs[3][inputs[0][33]] = torch.nan
    assert kernel_cases.operation(name)(*inputs).isnan().any()


@pytest.mark.parametrize("which", [0, 1], ids=["query", "key"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_attention_passes_on_a_score_that_is_not_a_number(which, value):
    boundaries = torch.tensor([0, 5, 38], dtype=torch.int32)
    qkv = torch.randn(38, 3, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    qkv[20, which, 0, 0] = value  # values are sound: only probabilities can tell
    qkv.requires_grad_()
    seen = []
    for attention in (kernels.packed_attention, kernels.packed_attention_reference):
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fast one makes 0 of inf - inf in places
            out = attention(qkv, torch.zeros(48), boundaries, 33, 0.0, torch.tensor([0]))
        seen.append([out.isnan(), torch.autograd.grad(out.square().sum(), qkv)[0].isnan()])
    assert seen[1][0].any()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*seen, strict=True))


@pytest.mark.parametrize(("p", "seed"), [(0.1, 3), (0.5, 2**40 + 11), (0.9, 2**62)])
@pytest.mark.parametrize("name", ["dropout_add_layer_norm", "embed_layer_norm"])
def test_dropout_drops_what_it_drops_on_a_gpu(name, p, seed):
    rows, width = 37, 44
    *inputs, _, _, eps = kernel_cases.make(name, rows, width, torch.float32)
    scale = masks.mask(rows, width, 64, p, seed).float()

    def expected(*inputs):
        if name == "embed_layer_norm":
            return scale * kernels.embed_layer_norm_reference(*inputs, 0.0, None, eps)
        x, x_bias, residual, *rest = inputs
        inputs = (x + x_bias) * scale, torch.zeros_like(x_bias), residual, *rest
        return kernels.dropout_add_layer_norm_reference(*inputs, 0.0, None, eps)[0]

    def actual(*inputs):
        out = CASES[name][1](*inputs, p, torch.tensor([seed]), eps)
        return out if name == "embed_layer_norm" else out[:, :width]

    for a, e in zip(
        kernel_cases.with_gradients(actual, inputs),
        kernel_cases.with_gradients(expected, inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("size", [1_000, 2**16, 2**16 + 1])  # sorted by 16 bits, and by more
@pytest.mark.parametrize("lengths", [[1] * 130, [129], [10, 3_000, 200, 500, 7], []])
def test_a_table_sums_runs_of_any_length(lengths, size, threads):
    """Those that parts of the work begin within, too."""
    g = torch.Generator().manual_seed(0)
    numbers = size - 1 - 2 * torch.randperm(len(lengths), generator=g).int()
    indices = numbers.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    indices = indices[torch.randperm(len(indices), generator=g)]
    dz = torch.randn(len(indices), 20, generator=g)
    both = torch.cat([indices, indices.flip(0)])
    once = embedding_gradient(dz, indices, size, torch.float32)
    twice = embedding_gradient(dz, both, size, torch.float32)
    expected = torch.zeros(size, 20, dtype=torch.float64).index_add_(0, indices, dz.double())
    torch.testing.assert_close(once.double(), expected, rtol=1e-5, atol=1e-5)
    expected.index_add_(0, indices.flip(0), dz.double())
    torch.testing.assert_close(twice.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["token", "segment", "position"])
@pytest.mark.parametrize("index", [-1, 40])
def test_an_index_beyond_its_table_is_an_error(which, index):
    inputs = kernel_cases.make("embed_layer_norm", 9, 8, torch.float32)
    inputs[which][5] = index
    with pytest.raises(IndexError, match="of its table"):
        kernels.embed_layer_norm(*inputs)


@pytest.mark.parametrize("which", range(1, 8))
def test_sizes_that_do_not_fit_are_an_error(which):
    """Loops would read beyond the end."""
    inputs = kernel_cases.make("embed_layer_norm", 9, 8, torch.float32)
    inputs[which] = inputs[which][..., :5]
    with pytest.raises(ValueError, match="not of one"):
        kernels.embed_layer_norm(*inputs)


@pytest.mark.parametrize(("p", "seed"), [(0.1, 3), (0.6, 2**62 + 5)])
def test_attention_drops_what_it_drops_on_a_gpu(p, seed):
    boundaries = torch.tensor([0, 18, 18, 25, 70, 200], dtype=torch.int32)
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(200, 3, 2, 12, generator=g).requires_grad_()

    def expected(qkv):
        return masks.masked_attention(qkv, boundaries, 130, p, seed)

    def actual(qkv):
        seeds = torch.tensor([seed])
        return kernels.packed_attention(qkv, torch.zeros(72), boundaries, 130, p, seeds)

    for a, e in zip(
        kernel_cases.with_gradients(actual, [qkv]),
        kernel_cases.with_gradients(expected, [qkv]),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@every_type
def test_sequences_of_attention_know_nothing_of_each_other(dtype):
    boundaries, seed = torch.tensor([0, 70, 76, 110], dtype=torch.int32), torch.tensor([3])
    g = torch.Generator().manual_seed(0)
    sound = torch.randn(110, 3, 1, 20, generator=g).to(dtype)
    spoiled, bias = sound.clone(), torch.zeros(60, dtype=dtype)
    spoiled[:70] = torch.nan
    seen = []
    for qkv in (sound.requires_grad_(), spoiled.requires_grad_()):  # one after the other in a part
        with kernel_cases.in_threads(1):
            out = kernels.packed_attention(qkv, bias, boundaries, 70, 0.1, seed)
            gradient = torch.autograd.grad(out[70:].float().square().sum(), qkv)[0]
        seen.append([out[70:], gradient[70:]])
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))


@every_type
@pytest.mark.parametrize("case", ["sharp scores", "values with an offset"])
def test_attentions_error_is_at_most_twice_that_of_pytorch_for_trained_inputs(dtype, case):
    boundaries, seed = torch.tensor([0, 200, 512], dtype=torch.int32), torch.tensor([0])
    g = torch.Generator().manual_seed(0)
    qkv, d_out = (torch.randn(512, *size, generator=g) for size in ((3, 2, 64), (2, 64)))
    if case == "sharp scores":
        qkv[:, :2] *= 3
    else:
        qkv[:, 2] += 10
    gradients = []
    for attention, kind in (
        (kernels.packed_attention, dtype),
        (kernels.packed_attention_reference, dtype),
        (kernels.packed_attention_reference, torch.float64),
    ):
        x = qkv.to(dtype).to(kind).requires_grad_()
        out = attention(x, torch.zeros(384, dtype=kind), boundaries, 312, 0.0, seed)
        gradients.append(torch.autograd.grad(out, x, d_out.to(dtype).to(kind))[0].double())
    ours, theirs, exact = gradients
    for part in range(3):
        error, allowed = ((x - exact)[:, part].norm() for x in (ours, theirs))
        assert error <= 2 * allowed + 5e-6 * exact[:, part].norm(), part


def test_attention_refuses_a_sequence_longer_than_the_longest():
    boundaries, seed = torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor([0])
    with pytest.raises(ValueError, match="longer than 4"):
        kernels.packed_attention(torch.zeros(8, 3, 1, 4), torch.zeros(12), boundaries, 4, 0.0, seed)


def test_attention_of_extreme_scores():
    boundaries = torch.tensor([0, 4], dtype=torch.int32)
    qkv = torch.zeros(4, 3, 1, 4)
    qkv[:, 0, 0, 0], qkv[:, 1, 0, 0] = 100, torch.tensor([-100.0, 0.0, 100.0, 99.99])
    qkv[:, 2, 0, 0] = torch.arange(4)
    qkv, bias = qkv.requires_grad_(), torch.zeros(12)
    out = kernels.packed_attention(qkv, bias, boundaries, 4, 0.0, torch.tensor([0]))
    expected = kernels.packed_attention_reference(qkv, bias, boundaries, 4, 0.0, None)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)  # scores of 5 000
    assert torch.autograd.grad(out.sum(), qkv)[0].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_invert_the_distribution_over_many_tiles(temperature):
    g = torch.Generator().manual_seed(4)
    rows, width, vocabulary = 300, 16, 3_000
    hidden, weight = torch.randn(rows, width, generator=g), torch.randn(vocabulary, width)
    bias = torch.randn(vocabulary, generator=g)
    bias[:500] = -torch.inf  # whole tiles without mass, and a part of one
    uniforms = torch.rand(rows, generator=g)
    uniforms[:3] = torch.tensor([0.0, 1 - 2.0**-24, 1e-12])
    labels = torch.randint(500, vocabulary, (rows,), generator=g, dtype=torch.int32)
    _, sampled, _ = kernels.linear_cross_entropy_sample(
        hidden, weight, bias, labels, uniforms, temperature
    )
    exact = kernel_cases.exact_distribution(hidden, weight, bias, temperature)
    kernel_cases.assert_inverse_of(exact, uniforms, sampled)


def test_gelu_of_every_number_in_bf16():
    x = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)[:, None].requires_grad_()
    y = kernels.bias_gelu(x, torch.zeros(1, dtype=torch.bfloat16))
    slope = torch.autograd.grad(y.sum(), x)[0].double()
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact)
    of_it = torch.autograd.grad(expected.sum(), exact)[0]
    finite = exact.isfinite()
    for found, true, far in ((y.double(), expected, 2e-6), (slope, of_it, 3e-6)):
        assert found[exact.isnan()].isnan().all()
        assert ((found - true).abs() <= 2.0**-8 * true.abs() + far)[finite].all()
    assert y[exact == torch.inf] == torch.inf


def test_gelu_in_fp32_is_exact_far_from_zero():
    x = torch.tensor([[-8.0], [-4.5], [8.0]])
    y = kernels.bias_gelu(x, torch.zeros(1))[:, 0].double()
    assert ((y - F.gelu(x.double())[:, 0]).abs() < torch.tensor([1e-10, 1e-7, 1e-6])).all()


def test_the_discriminators_gelu_is_a_loop():
    hidden = torch.randn(40, 24, requires_grad=True)
    one, zeros, replaced = torch.ones(1), torch.zeros(24), torch.zeros(40, dtype=torch.int32)
    loss, _ = kernels.replaced_token_loss(
        hidden, zeros, zeros + 1, one, replaced, torch.tensor(40, dtype=torch.int32)
    )
    nodes, names = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [following for following, _ in node.next_functions if following]
    assert "bias_geluBackward" in names
