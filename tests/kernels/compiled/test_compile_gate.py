"""Every kernel that the product launches compiles for every GPU, spills nothing, fits its memory.

What it launches is recorded from the model itself, in training and in evaluation, on tensors that
have shapes and no values.
"""

import functools
import importlib.util
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fastelectra.kernels import aot

from fastelectra import kernels
from fastelectra.config import load_config
from fastelectra.data.batch import Batch, BatchShape
from fastelectra.model import Electra, encoder

ROOT = Path(__file__).parents[3]
VOCABULARY = 30_522
OPERATIONS = {name for name in kernels.__all__ if f"{name}_reference" in kernels.__all__}
# (kernel and types, capability) → bytes a thread. Read in the machine code: attention's kernels
# store a number before their loop and load it after; LayerNorm's `_forward`, without loops, stores
# and loads a pair once, and fp32 on such a GPU is for comparisons.
SPILLS_TOLERATED = {
    ("flash_attention._backward_of_keys bf16/fp32", 80): 8,
    ("flash_attention._forward bf16/fp32", 80): 8,
    ("flash_attention._forward fp16/fp32", 80): 8,
    ("dropout_add_layer_norm._forward fp32", 90): 8,
}

spec = importlib.util.spec_from_file_location("bench_of_kernels", ROOT / "bench/kernels.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def shapes_of_a_batch(config) -> Batch:
    tokens = config.training.micro_batch_tokens
    shape = BatchShape.of(tokens, config.data.max_length, config.data.mask_fraction)

    def integers(size):
        return torch.zeros(size, dtype=torch.int32, device="meta")

    return Batch(
        **{name: integers(tokens) for name in ("tokens", "segments", "positions")},
        **{name: integers(shape.masked) for name in ("masked_positions", "masked_inputs")},
        cu_seqlens=integers(shape.sequences + 1), labels=integers(shape.masked),
        uniforms=torch.zeros(shape.masked, device="meta"),
        totals=torch.zeros(2, device="meta"), max_length=config.data.max_length, seed=0,
    )  # fmt: skip


def attention(qkv, layout, dropout, seed, bias):
    """What both implementations launch, a library's and ours, which takes 16 bit only."""
    out = sum(kernels.split_qkv(qkv, bias))
    if qkv.dtype == torch.float32:
        return out
    boundaries, longest = layout.cu_seqlens, layout.max_length
    return out + kernels.packed_attention(qkv, bias, boundaries, longest, dropout, seed)


@functools.cache
def launches(preset, dtype):
    """What training and evaluation of a preset launch, each kernel once."""
    config = load_config(ROOT / "configs" / f"{preset}.json")
    batch = shapes_of_a_batch(config)
    with torch.device("meta"):
        model = Electra(config.model, VOCABULARY, config.objective).to(dtype)

    def train_and_evaluate():
        model(batch)[0].backward()
        model.eval()
        with torch.no_grad():
            model(batch)
            model.discriminator_logits(batch)
            model.generator_logits(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "attention", attention)
        return list(dict.fromkeys(aot.record(train_and_evaluate)))


def module(launch):
    return launch.kernel.__module__.rpartition(".")[2]


@pytest.mark.parametrize("preset", bench.PRESETS)
def test_the_model_launches_every_op(preset):
    found = {module(launch) for launch in launches(preset, torch.bfloat16)}
    heads = {"flash_cross_entropy", "chunked_cross_entropy"}
    used = {"flash_cross_entropy"} if preset == "small" else {"chunked_cross_entropy"}
    assert found & heads == used
    elsewhere = {"linear_cross_entropy_sample", "packed_attention"}
    assert found - heads == OPERATIONS - elsewhere | {
        "flash_attention", "embedding_gradient", "language"
    }  # fmt: skip
    for name in OPERATIONS - elsewhere - {"replace_tokens"} | {"flash_attention"}:
        kernel_names = {x.kernel.__name__ for x in launches(preset, torch.bfloat16)
                        if module(x) == name}  # fmt: skip
        others = {  # split_qkv's forward is views
            "split_qkv": {"_backward"},
            "flash_attention": {"_forward", "_backward_of_queries", "_backward_of_keys"},
        }
        assert others.get(name, {"_forward", "_backward"}) <= kernel_names, name
    evaluated = [dict(x.constants) for x in launches(preset, torch.bfloat16)
                 if module(x) in ("dropout_add_layer_norm", "embed_layer_norm")]  # fmt: skip
    assert {c["THRESHOLD"] == 0 for c in evaluated if "THRESHOLD" in c} == {True, False}


@pytest.mark.parametrize("capability", bench.CAPABILITIES)
@pytest.mark.parametrize("preset", bench.PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_launch_of_a_preset(preset, dtype, capability):
    assert_good(launches(preset, dtype), capability)


def assert_good(recorded, capability):
    bad = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # most of the work is ptxas'
        compiled = list(threads.map(lambda launch: aot.compiled(launch, capability), recorded))
    for launch, code in zip(recorded, compiled, strict=True):
        kernel = " ".join(str(launch).split()[:2])
        tolerated = SPILLS_TOLERATED.get((kernel, capability), 0)
        if code.local > tolerated:
            bad.append(f"{launch} spills {code.local} bytes")
        if code.shared > aot.SHARED_LIMIT[capability]:
            bad.append(f"{launch} takes {code.shared} bytes of shared memory")
    assert not bad, "\n".join([f"on sm_{capability}:", *bad])


@pytest.mark.parametrize("capability", bench.CAPABILITIES)
def test_a_vocabulary_beyond_16_bits(capability):
    rows, width = 256, 128
    indices = [torch.zeros(rows, dtype=torch.int32, device="meta") for _ in range(3)]
    tables = [torch.zeros(n, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
              for n in (2**15 - 511, 2, 512)]  # fmt: skip
    vectors = [torch.zeros(width, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    seed = torch.zeros(1, dtype=torch.int64, device="meta")

    def step():
        kernels.embed_layer_norm(*indices, *tables, *vectors, 0.1, seed, 1e-12).sum().backward()

    found = aot.record(step)
    assert {dict(x.signature).get("sorted_ptr") for x in found} == {None, "*i32"}
    assert_good(dict.fromkeys(found), capability)


# between the presets: other widths and temperatures that a configuration may ask for
@pytest.mark.parametrize("capability", bench.CAPABILITIES)
@pytest.mark.parametrize(("width", "temperature"), [(256, 1.0), (200, 0.8), (128, 0.8), (768, 0.8)])
def test_other_vocabulary_heads(width, temperature, capability):
    hidden, weight = (
        torch.zeros(rows, width, dtype=torch.bfloat16, requires_grad=True, device="meta")
        for rows in (2432, VOCABULARY)
    )
    bias = torch.zeros(VOCABULARY, dtype=torch.bfloat16, device="meta")
    labels = torch.zeros(2432, dtype=torch.int32, device="meta")
    uniforms = torch.zeros(2432, device="meta")

    def step():
        kernels.linear_cross_entropy_sample(
            hidden, weight, bias, labels, uniforms, temperature
        )[0].backward()  # fmt: skip

    assert_good(dict.fromkeys(aot.record(step)), capability)


@pytest.mark.parametrize("capability", bench.CAPABILITIES)
@pytest.mark.parametrize(
    ("size", "longest"), [(8, 512), (64, 16), (40, 64), (40, 512), (64, 65), (32, 32)]
)
def test_other_heads_and_lengths(size, longest, capability):
    qkv = torch.zeros(256, 3, 2, size, dtype=torch.bfloat16, requires_grad=True, device="meta")
    bias = torch.zeros(6 * size, dtype=torch.bfloat16, device="meta")
    boundaries, seed = (torch.zeros(n, dtype=t, device="meta")
                        for n, t in ((9, torch.int32), (1, torch.int64)))  # fmt: skip

    def step():
        kernels.packed_attention(qkv, bias, boundaries, longest, 0.1, seed).sum().backward()

    assert_good(dict.fromkeys(aot.record(step)), capability)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_products_of_attention_do_not_wait_for_each_other(p):
    """By ptxas, from what the installed Triton gives it: another version's may differ."""
    qkv = torch.zeros(1024, 3, 2, 64, dtype=torch.bfloat16, requires_grad=True, device="meta")
    bias = torch.zeros(6 * 64, dtype=torch.bfloat16, device="meta")
    boundaries, seed = (torch.zeros(n, dtype=t, device="meta")
                        for n, t in ((9, torch.int32), (1, torch.int64)))  # fmt: skip

    def step():
        kernels.packed_attention(qkv, bias, boundaries, 512, p, seed).sum().backward()

    found = [x for x in aot.record(step) if module(x) == "flash_attention"]
    assert len(found) == 3
    for launch in found:
        code = aot.compiled(launch, 90)
        assert code.instructions()["HGMMA"], launch
        assert not code.serialized(), launch


@pytest.mark.parametrize("capability", bench.CAPABILITIES)
@pytest.mark.parametrize("width", [2048, 4096])
def test_layer_norm_of_wide_rows(width, capability):
    matrices = [torch.zeros(256, width, requires_grad=True, device="meta") for _ in range(2)]
    x_bias, weight, bias = torch.zeros(3, width, device="meta")
    seed = torch.zeros(1, dtype=torch.int64, device="meta")

    def step():
        x, residual = matrices
        once, twice = kernels.dropout_add_layer_norm(x, x_bias, residual, weight, bias, 0.1, seed)
        (once.sum() + twice.sum()).backward()

    assert_good(dict.fromkeys(aot.record(step)), capability)


def test_what_the_benchmark_compares_with_can_be_compiled():
    for case in bench.cases("small", "meta", torch.bfloat16, most_head_rows=16):
        torch._dynamo.reset()
        inputs = case.make()
        torch.compile(lambda c=case, i=inputs: c.call(i, reference=True), fullgraph=True,
                      backend="aot_eager", dynamic=False)()  # fmt: skip


def test_benchmark_covers_every_op():
    for preset in bench.PRESETS:
        assert {case.op for case in bench.cases(preset, "meta", torch.bfloat16)} == OPERATIONS


def test_narrow_head_never_holds_all_logits():
    rows = 9_830
    hidden = torch.zeros(rows, 128, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.zeros(VOCABULARY, *s, dtype=torch.bfloat16) for s in ((128,), ()))
    labels, uniforms = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows)

    def step():
        weight.requires_grad_()
        kernels.linear_cross_entropy_sample(hidden, weight, bias, labels, uniforms)[0].backward()

    with torch.profiler.profile(profile_memory=True) as profile:
        aot.record(step)
    events = profile.profiler.kineto_results.events()
    assert 0 < max(event.nbytes() for event in events) < rows * VOCABULARY * 2 / 10


def test_benchmark_without_a_gpu_writes_its_estimates(tmp_path, capsys, monkeypatch):
    few = bench.launches("small", torch.bfloat16)[:2]  # reading machine code takes .3 s each
    monkeypatch.setattr(bench, "launches", lambda *_: few)
    assert bench.main(["--presets", "small", "--output", str(tmp_path / "out" / "kernels")]) == 0
    result = json.loads((tmp_path / "out/kernels.json").read_text())
    assert (tmp_path / "out/kernels.png").read_bytes()[:4] == b"\x89PNG"
    assert result["measured"] is False
    assert {row["op"] for row in result["ops"]} == OPERATIONS
    assert all(row["instructions"] > 0 for row in result["compiled"])
    assert "estimate" in capsys.readouterr().out


def test_benchmark_draws_nothing_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.sys.modules, "matplotlib", None)  # as where it is not installed
    assert bench.draw({}, tmp_path / "a.png") == "no picture: matplotlib is not installed"
