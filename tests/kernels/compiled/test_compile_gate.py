"""Every kernel of every preset compiles for every GPU, spills no register and fits its memory."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from fastelectra.kernels import aot

from fastelectra import kernels

# All but the CPU's attention: on GPUs FlashAttention does it.
OPERATIONS = {name for name in kernels.__all__ if f"{name}_reference" in kernels.__all__}
OPERATIONS -= {"packed_attention"}
SPILLS_TOLERATED = {}  # (kernel, capability) → bytes a thread, with the reason

path = Path(__file__).parents[3] / "bench" / "kernels.py"
spec = importlib.util.spec_from_file_location("bench_of_kernels", path)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
launches = functools.cache(bench.launches)


@pytest.mark.parametrize("capability", bench.CAPABILITIES)
@pytest.mark.parametrize("preset", bench.PRESETS)
def test_every_launch_of_a_preset(preset, capability):
    assert_good(launches(preset, torch.bfloat16), capability)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_precisions(dtype):
    assert_good(launches("small", dtype), 90)


def assert_good(recorded, capability):
    for launch in dict.fromkeys(recorded):
        code = aot.compiled(launch, capability)
        tolerated = SPILLS_TOLERATED.get((launch.kernel.__name__, capability), 0)
        assert code.local <= tolerated, f"{launch} spills {code.local} bytes on sm_{capability}"
        assert code.shared <= aot.SHARED_LIMIT[capability], f"{launch} on sm_{capability}"


@pytest.mark.parametrize("width", [128, 768])
def test_sampling_at_another_temperature(width):
    hidden, weight = (
        torch.zeros(rows, width, dtype=torch.bfloat16, requires_grad=True) for rows in (16, 30_522)
    )
    labels, uniforms = torch.zeros(16, dtype=torch.int32), torch.zeros(16)
    inputs = hidden, weight, torch.zeros(30_522, dtype=torch.bfloat16), labels, uniforms
    assert_good(aot.record(lambda: kernels.linear_cross_entropy_sample(*inputs, 0.8)), 90)


def test_presets_use_every_op():
    for preset in bench.PRESETS:
        assert {case.op for case in bench.cases(preset, "meta", torch.bfloat16)} == OPERATIONS


def test_narrow_head_never_holds_all_logits():
    rows, vocabulary = 9_830, 30_522
    hidden = torch.zeros(rows, 128, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.zeros(vocabulary, *s, dtype=torch.bfloat16) for s in ((128,), ()))
    labels, uniforms = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows)

    def step():
        weight.requires_grad_()
        kernels.linear_cross_entropy_sample(hidden, weight, bias, labels, uniforms)[0].backward()

    with torch.profiler.profile(profile_memory=True) as profile:
        aot.record(step)
    events = profile.profiler.kineto_results.events()
    assert 0 < max(event.nbytes() for event in events) < rows * vocabulary * 2 / 10


def test_benchmark_without_a_gpu_writes_its_estimates(tmp_path, capsys, monkeypatch):
    few = launches("small", torch.bfloat16)[:2]  # to read machine code takes a third of a second
    monkeypatch.setattr(bench, "launches", lambda *_: few)
    assert bench.main(["--presets", "small", "--output", str(tmp_path / "out" / "kernels")]) == 0
    result = json.loads((tmp_path / "out/kernels.json").read_text())
    assert (tmp_path / "out/kernels.png").read_bytes()[:4] == b"\x89PNG"
    assert result["measured"] is False
    assert {row["op"] for row in result["ops"]} == OPERATIONS
    assert all(row["instructions"] > 0 for row in result["compiled"])
    assert "estimate" in capsys.readouterr().out
