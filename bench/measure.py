"""The instruments of the benchmarks: rates, memory, where a step's time goes, on what machine."""

import ctypes
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch
from options import ROOT

from fastelectra.data.batch import Batch
from fastelectra.data.stream import prefetch
from fastelectra.training import launch

AHEAD = 4  # steps of batches made before they are needed, as the trainer does
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "flash-attn", "numpy", "numba")

OPTIMIZER = "optimizer"  # a part of the step

# Parts of a step by what the profiler calls an operation, a kernel or one that it is part of; the
# first that matches counts. An operation on the vocabulary's size belongs to its head.
PARTS = tuple(
    (part, re.compile(pattern, re.IGNORECASE))
    for part, pattern in (
        (  # cunn_SoftMax… takes rows longer than 1,024: not attention's
            "vocabulary head",
            "cross_?entropy|nll_loss|log_?softmax|cunn_softmax|multinomial|exponential|argmax",
        ),
        (OPTIMIZER, "adam|foreach|multi_tensor|linalg_vector_norm|flatten_dense"),
        ("attention", "scaled_dot|flash|attention|fmha|softmax|varlen|split_qkv"),
        ("GELU", "gelu"),
        ("matrix products", "mm$|matmul|gemm|linear|nvjet|cutlass|xmma|mkldnn|onednn|splitK"),
        ("embeddings", "embed|index_(select|put)|indexing|masked_gather|replace_tokens"),
        (
            "norm, dropout, residual",
            "norm|dropout|bernoulli|aten::add_?$|CUDAFunctor_add|column_sums|replaced_token_loss",
        ),
    )
)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: list[float]) -> dict[str, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return dict.fromkeys(("low", "median", "high"), values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": median, "high": high}


def milliseconds(call: Callable[[], object], repeats: int = 30) -> float:
    """Median time of a call on the GPU alone: a CUDA graph of it, the cache flushed before each."""
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(3):  # compiles, and fills the allocator
            call()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def flush() -> None:
    """Write more than any GPU's cache holds, so that what comes next reads from memory."""
    _flushed().zero_()


@functools.cache
def _flushed() -> torch.Tensor:
    return torch.empty(2**26, dtype=torch.int32, device="cuda")


class Gemm:
    """A large square product: the machine's own rate in this dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        size = 8192 if device.type == "cuda" else 2048
        self.device, self.flop = device, 2.0 * size**3
        self.repeats = 20 if device.type == "cuda" else 3
        self.left, self.right = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
        self.out = self.left @ self.right

    def rate(self) -> float:
        """FLOP/s, over a few products in a row."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.repeats):
            torch.mm(self.left, self.right, out=self.out)
        synchronize(self.device)
        return self.repeats * self.flop / (time.perf_counter() - start)


class Runner:
    """A contender with its stream of batches, and what has been measured of it."""

    def __init__(self, contender, steps: Iterator[list[Batch]], no_data: bool):
        self.contender, self.device = contender, contender.device
        self.rates, self.waits = [], []  # of each block: tokens/s, seconds a step waited for data
        source = ((contender.prepared(b), float(b[0].totals[1])) for b in steps)
        self.batches = itertools.repeat(next(source)) if no_data else prefetch(source, AHEAD)

    def step(self) -> None:
        """One step; does not wait for a GPU."""
        self.contender.step(next(self.batches)[0])

    def block(self, steps: int) -> None:
        """Time some steps in a row."""
        tokens, waited, start = 0.0, 0.0, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batches, real = next(self.batches)
            waited += time.perf_counter() - asked
            self.contender.step(batches)
            tokens += real
        synchronize(self.device)
        self.rates.append(tokens / (time.perf_counter() - start))
        self.waits.append(waited / steps)

    def split(self, steps: int) -> dict[str, float]:
        """Mean seconds of a step in forward and backward, optimizer and elsewhere.

        On a GPU it waits after each, so that their sum exceeds the time of a step left alone.
        """
        with self._clocked() as clock:
            spent = 0.0
            for _ in range(steps):
                batches, _ = next(self.batches)
                start = time.perf_counter()
                self.contender.step(batches)
                synchronize(self.device)
                spent += time.perf_counter() - start
        parts = {part: seconds / steps for part, seconds in clock.seconds.items()}
        rest = "elsewhere" if len(parts) > 1 else "forward, backward, elsewhere"  # one graph
        return parts | {rest: spent / steps - sum(parts.values())}

    @contextmanager
    def _clocked(self) -> Iterator["Clocked"]:
        engine = self.contender.engine
        self.contender.engine = clock = Clocked(engine, self.device)
        yield clock
        self.contender.engine = engine

    def profile(self, vocab_size: int, trace: Path | None = None) -> dict[str, float]:
        """Milliseconds of one step by part, on the device that computes; writes a chrome trace."""
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as torch_profile

        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with self._clocked(), torch_profile(activities=activities, record_shapes=True) as profiler:
            self.step()
            synchronize(self.device)
        if trace:
            profiler.export_chrome_trace(str(trace))
        spent = Counter()
        for event in profiler.events():
            if getattr(event, "is_user_annotation", False):  # a range, also shown as of the GPU
                continue
            on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
            microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
            if microseconds and on_gpu == cuda:
                spent[part_of(event, vocab_size)] += microseconds / 1e3
        return dict(spent.most_common())

    def close(self) -> None:
        """End the thread that makes batches, and let go of the contender."""
        if hasattr(self.batches, "close"):
            self.batches.close()
        self.contender = None


class Clocked:
    """An engine whose forward, backward (or both as one) and optimizer are clocked.

    It waits for a GPU after each.
    """

    def __init__(self, engine, device: torch.device):
        self.engine, self.device, self.seconds = engine, device, Counter()

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def _clock(self, part: str, function: Callable, *arguments):
        synchronize(self.device)  # what was launched before is not this part's
        start = time.perf_counter()
        with torch.profiler.record_function(part):
            result = function(*arguments)
            synchronize(self.device)
        self.seconds[part] += time.perf_counter() - start
        return result

    def __call__(self, batch):
        return self._clock("forward", self.engine, batch)

    def backward(self, loss):
        """As the engine's, clocked."""
        return self._clock("backward", self.engine.backward, loss)

    def learn(self, batch):
        """As the plain engine's, clocked."""
        return self._clock("forward and backward", self.engine.learn, batch)

    def step(self):
        """As the engine's, clocked."""
        return self._clock(OPTIMIZER, self.engine.step)


def step_memory(step: Callable[[], None]) -> int | None:
    """CPU: bytes by which a step's peak exceeds what is resident before it. None off Linux."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    except OSError:
        return None
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", text)[1])


def part_of(event, vocab_size: int) -> str:
    """The part of a step that a profiler's event belongs to."""
    around = [event]
    while around[-1].cpu_parent:
        around.append(around[-1].cpu_parent)
    if around[-1].name == OPTIMIZER:
        return OPTIMIZER
    for inner in around:
        if any(vocab_size in shape for shape in inner.input_shapes or () if shape):
            return "vocabulary head"
        for part, pattern in PARTS:
            if pattern.search(inner.name):
                return part
    return "other"


def provenance() -> dict:
    """What ran, where, when."""

    def git(*words):
        try:
            run = ["git", *words]
            return subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=True).stdout
        except (OSError, subprocess.CalledProcessError):  # a copy without its history
            return ""

    return {
        "command": " ".join(sys.argv).replace(f"{ROOT}/", ""),
        "time": datetime.now(timezone.utc).isoformat("T", "seconds"),
        "commit": git("rev-parse", "HEAD").strip() or os.environ.get("COMMIT"),
        "changed_files": git("status", "--porcelain", "-uno").splitlines(),
        "machine": platform.platform(), "cpu": _cpu_name(), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if launch.device().type == "cuda" else None,
        "python": platform.python_version(), "versions": versions(),
        "environment": {name: value for name, value in os.environ.items()
                        if name.startswith(("OMP_", "KMP_", "GOMP_", "PYTORCH_", "ONEDNN_"))},
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of the packages that matter and are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = re.findall(r"model name\s*:\s*(.+)", text)
    features = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in text]
    return f"{len(names)} × {names[0] if names else '?'} ({', '.join(features)})"


if __name__ == "__main__":
    print(json.dumps(provenance(), indent=1))
