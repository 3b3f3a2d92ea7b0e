"""The benchmark as it is run, on a few tokens."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import scaling
import throughput
import torch
from measure import Runner, part_of, quartiles
from options import check_outputs

from fastelectra.errors import FastElectraError
from fastelectra.training import launch

BENCH = Path(__file__).parents[2] / "bench"
SIZES = ["--size", "small", "--seq", "16", "--tokens-per-step", "64"]


def test_a_run_reports_every_contender(tmp_path):
    file, picture = tmp_path / "a" / "result.json", tmp_path / "plot.png"
    command = [sys.executable, BENCH / "throughput.py", *SIZES, "--rounds", "2", "--warmup", "1"]
    command += ["--peers", "natural", "careful-flash", "natural", "--json", file, "--plot", picture]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert set(result["contenders"]) == {"ours", "natural"}
    assert set(result["unavailable"]) == {"careful-flash"}
    for row in result["contenders"].values():
        assert row["tokens_per_s"]["low"] <= row["tokens_per_s"]["median"]
        rate = row["tokens_per_s"]["median"]
        flops = rate * result["flop_per_token"] / result["gemm_flop_per_s"]["median"]
        assert row["mfu_of_gemm"] == pytest.approx(flops)
        assert row["full_run_hours"] is row["full_run_device_days"] is None  # of length 16
        assert row["losses"][0] == pytest.approx(10.3, abs=0.3)
        assert row["step_seconds"].keys() >= {"data wait", "optimizer", "elsewhere"}
    assert "forward and backward" in result["contenders"]["ours"]["step_seconds"]
    assert result["contenders"]["natural"]["step_seconds"].keys() >= {"forward", "backward"}
    assert result["contenders"]["ours"]["ours_is_times"]["median"] == 1
    assert result["provenance"]["versions"]["torch"]
    assert result["provenance"]["command"].startswith("bench/throughput.py ")
    assert picture.stat().st_size > 0


def test_a_bare_machine_is_enough(tmp_path):
    """As gpu.sh arranges where only torch and triton are installed."""
    for name in ("deepspeed", "transformers", "matplotlib"):
        reason = f"no {name}\\nhere\\n\\nSee its site."
        (tmp_path / f"{name}.py").write_text(
            f"raise ModuleNotFoundError('{reason}', name='{name}')"
        )
    file, places = tmp_path / "result.json", f"{BENCH / 'stand_ins'}:{tmp_path}"
    command = [sys.executable, BENCH / "throughput.py", *SIZES, "--rounds", "1", "--warmup", "1"]
    command += ["--no-data", "--peers", "natural", "--json", file]
    command += ["--seq", "128", "--tokens-per-step", "256"]
    environment = os.environ | {"PYTHONPATH": places}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert set(result["contenders"]) == {"ours"}
    row = result["contenders"]["ours"]
    seconds = 16_384e6 / row["tokens_per_s"]["median"]
    assert row["full_run_hours"] == pytest.approx(seconds / 3600)
    assert row["full_run_device_days"] == pytest.approx(seconds / 86_400)
    assert result["unavailable"] == {
        "natural": "ModuleNotFoundError: no transformers here See its site."
    }


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("throughput", ["--lengths", "corpus", "--data", "nowhere"]),
        ("throughput", ["--json", "a/file/result.json"]),
        ("throughput", ["--json", "a"]),
        ("throughput", ["--plot", "plot.text"]),
        ("attention", ["--json", "a/file/result.json"]),
        ("kernels", ["--output", "a/file/result"]),
        ("throughput", ["--seq", "2"]),
    ],
)
def test_a_mistake_is_one_line(script, flags, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").touch()
    command = [sys.executable, BENCH / f"{script}.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


@pytest.mark.parametrize(
    "flags",
    [["--data-only", "--json", "result.json"]]
    + [
        [f"--{name}", value]
        for name in ("rounds", "block", "warmup", "seq", "tokens-per-step", "micro-batch")
        for value in ("0", "-1")
    ],
)
def test_counts_are_above_zero(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        throughput.parse(flags)
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_scaling_measures_as_the_run_did(monkeypatch, tmp_path):
    commands = []

    def run(command, **_):
        commands.append(throughput.parse(command[2:]))
        row = {"tokens_per_s": {"median": 1}, "mfu_of_gemm": 1}
        commands[-1].json.write_text(json.dumps({"contenders": {"ours": row}}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    flags = ["--no-data", "--block", "4", "--warmup", "1", "--rounds", "3"]
    scaling._ours_alone(throughput.parse(flags), 1, 64, 32, 16, {})
    scaling._ours_alone(throughput.parse([]), 1, 64, 32, 16, {})
    told = [(a.no_data, a.block, a.warmup, a.rounds, a.micro_batch, a.peers) for a in commands]
    assert told == [(True, 4, 1, 3, 32, []), (False, None, None, 10, 32, [])]


@pytest.fixture
def bench():
    made = throughput.Bench.__new__(throughput.Bench)
    made.args = throughput.parse(["--rounds", "4"])
    made.process, made.block, made.cuda = launch.Process(0, 1), 2, False
    made.gemm, made.gemm_rates = SimpleNamespace(rate=lambda: 1.0), []
    batches = [SimpleNamespace(totals=[0, 100.0])]
    made.runners = {
        name: Runner(Contender(), itertools.repeat(batches), no_data=True)
        for name in ("ours", "natural", "careful")
    }
    made.unavailable = {}
    return made


def fail(bench, name, number, error):
    """Let the contender's step of this number raise."""
    contender = bench.runners[name].contender
    step = contender.step

    def failing(batches=None):
        if contender.steps == number - 1 and batches is not None:
            raise error
        step(batches)

    contender.step = failing


def test_an_interrupted_run_keeps_its_whole_rounds(bench):
    fail(bench, "careful", 6, KeyboardInterrupt())
    bench.run()
    assert bench.rounds == 2
    assert [len(runner.rates) for runner in bench.runners.values()] == [2, 2, 2]
    assert [len(runner.waits) for runner in bench.runners.values()] == [2, 2, 2]


def test_a_run_interrupted_at_once_has_nothing_to_keep(bench):
    fail(bench, "natural", 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        bench.run()


def test_a_peer_that_fails_is_dropped(bench, capsys):
    fail(bench, "natural", 3, torch.OutOfMemoryError("no\nroom"))
    bench.run()
    assert list(bench.runners) == ["ours", "careful"]
    assert bench.rounds == len(bench.runners["careful"].rates) == 4
    assert bench.unavailable == {"natural": "OutOfMemoryError: no room"}
    assert capsys.readouterr().out == "natural cannot run: OutOfMemoryError: no room\n"
    fail(bench, "ours", 9, RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        bench.run()


def test_the_largest_is_told_size_by_size(bench, monkeypatch, capsys):
    room = {"ours": 700, "natural": 50, "careful": 2**40}
    training = SimpleNamespace(micro_batch_tokens=100)
    bench.workload = SimpleNamespace(config=SimpleNamespace(training=training))
    monkeypatch.setattr(throughput, "workload_of", lambda args, tokens, micro: tokens)

    def start(name, tokens):
        if tokens > room[name]:
            raise RuntimeError("full")
        return SimpleNamespace(close=lambda: None), None

    bench._start = start
    monkeypatch.setattr(throughput, "MOST_TOKENS", 1000)
    assert list(bench.largest()) == [
        ("ours", 100), ("ours", 200), ("ours", 400), ("ours", 600),
        ("careful", 100), ("careful", 200), ("careful", 400), ("careful", 800),
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        "ours in micro-batches of 800: RuntimeError: full",
        "natural in micro-batches of 100: RuntimeError: full",
    ]


INTERRUPTED = """
import sys
import measure, throughput
rates = iter([1e9, 1e9])
def rate(gemm):
    for value in rates:
        return value
    raise KeyboardInterrupt
measure.Gemm.rate = rate
sys.exit(throughput.main(sys.argv[1:]))
"""


def test_what_was_cut_short_is_reported(tmp_path):
    file = tmp_path / "result.json"
    command = [sys.executable, "-c", INTERRUPTED, *SIZES, "--rounds", "9", "--warmup", "1"]
    command += ["--block", "1", "--peers", "--json", file, "--profile"]
    environment = os.environ | {"PYTHONPATH": str(BENCH)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 130, done.stderr
    assert "2 rounds (cut short: of 9) of 1 steps each" in done.stdout
    result = json.loads(file.read_text())
    assert result["settings"]["rounds"] == 2
    assert len(result["contenders"]["ours"]["rates_by_round"]) == 2
    assert "profile_ms" not in result


def test_largest_is_for_gpus(monkeypatch):
    monkeypatch.setattr(launch, "prepare", lambda: launch.Process(0, 1))
    monkeypatch.setattr(launch, "device", lambda: torch.device("cpu"))
    with pytest.raises(FastElectraError, match="GPUs"):
        throughput.main(["--largest"])


def test_what_can_be_written_is_not_there_yet(tmp_path):
    check_outputs(None, tmp_path / "b/result.json", picture=tmp_path / "b/plot.png")
    assert not list((tmp_path / "b").iterdir())


def test_a_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FastElectraError, match="matplotlib"):
        check_outputs(picture=Path("plot.png"))


class Contender:
    """A matrix product that trains on nothing."""

    device = torch.device("cpu")

    def __init__(self):
        self.weight = torch.ones(64, 64, requires_grad=True)
        self.engine, self.steps = self, 0

    def prepared(self, batches):
        return batches

    def __call__(self, batch):
        return (self.weight @ self.weight).sum()

    def backward(self, loss):
        loss.backward()

    def step(self, batches=None):
        if batches is not None:  # as a contender, not as its engine
            self.steps += 1
            for batch in batches:
                self.engine.backward(self.engine(batch))
            self.engine.step()


@pytest.mark.parametrize("no_data", [False, True])
def test_a_runner_counts_and_clocks_every_step(no_data, tmp_path):
    batches = ([SimpleNamespace(totals=[0, 100.0])] for _ in itertools.count())
    runner = Runner(Contender(), batches, no_data)
    runner.block(5)
    assert runner.contender.steps == 5
    assert len(runner.rates) == len(runner.waits) == 1
    parts = runner.split(3)
    assert set(parts) == {"forward", "backward", "optimizer", "elsewhere"}
    assert all(seconds > 0 for seconds in parts.values())
    trace = tmp_path / "trace.json.gz"
    assert runner.profile(99, trace)["matrix products"] > 0
    assert trace.stat().st_size > 0
    assert runner.contender.engine is runner.contender
    assert runner.contender.steps == 9
    runner.close()


def test_quartiles():
    assert quartiles([1, 2, 3, 4, 5]) == {"low": 2, "median": 3, "high": 4}
    assert quartiles([7.0]) == {"low": 7, "median": 7, "high": 7}


def event(name, shapes=(), parent=None):
    return SimpleNamespace(name=name, input_shapes=shapes, cpu_parent=parent)


NATIVE = "void at::native::(anonymous namespace)::"  # as the profiler names PyTorch's kernels


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (
            f"{NATIVE}cunn_{way}<8, float, float, float, {NATIVE[5:]}Log{way}Epilogue>(float*)",
            "vocabulary head",
        )
        for way in ("SoftMaxForward", "SoftMaxBackward")
    ]
    + [
        (
            f"{NATIVE}cunn_SoftMaxForward<4, float, float, float, {NATIVE[5:]}"
            "SoftMaxForwardEpilogue>(float*, float const*, int)",
            "vocabulary head",
        ),
        (
            "void (anonymous namespace)::softmax_warp_forward<c10::BFloat16, c10::BFloat16, float,"
            " 7, false, false>(c10::BFloat16*, c10::BFloat16 const*, int, int, int)",
            "attention",
        ),
        (
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>()",
            "attention",
        ),
    ],
)
def test_kernels_of_the_gpu_are_told_by_their_names(name, part):
    assert part_of(event(name), 99) == part


@pytest.mark.parametrize(
    ("name", "shapes", "parent", "part"),
    [
        ("aten::mm", [[8, 4], [4, 4]], None, "matrix products"),
        ("aten::mm", [[8, 4], [4, 99]], None, "vocabulary head"),
        ("aten::copy_", [], "gelu_backward", "GELU"),
        ("aten::norm", [[99, 4]], "optimizer", "optimizer"),
        ("nvjet_tst_128x256", [], None, "matrix products"),
        ("aten::copy_", [], None, "other"),
    ],
)
def test_parts(name, shapes, parent, part):
    assert part_of(event(name, shapes, parent and event(parent)), 99) == part
