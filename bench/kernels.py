"""Every fused op at the sizes of small, base and large, forward and backward.

    python bench/kernels.py [--presets small base large] [--output bench/results/kernels]

With a GPU: milliseconds, GB/s, TFLOP/s, share of the roofline measured in the same run (a copy for
bandwidth, a large product for arithmetic) and peak memory, beside eager PyTorch and torch.compile.
Without one: what the compiler makes of every kernel for four GPUs, with an estimate of the time the
traffic and the arithmetic alone would take on an H100. Writes OUTPUT.json and OUTPUT.png.
"""

import argparse
import functools
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from fastelectra.kernels import aot

from fastelectra import kernels
from fastelectra.config import generator_sizes, load_config
from fastelectra.data.batch import BatchShape

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("small", "base", "large")
WAYS = ("fused", "eager", "compiled")
VOCABULARY, MASK = 30_522, 103
CAPABILITIES = (80, 89, 90, 100)
H100 = {"bytes_per_s": 3.0e12, "flop_per_s": 790e12}  # what copies and products reach


@dataclass
class Case:
    """An op at one size: how to run it, and the least it must move and compute."""

    op: str
    size: str
    make: Callable[[], tuple]  # its inputs
    bytes: tuple[float, float]  # moved by forward and by backward
    flop: tuple[float, float] = (0, 0)

    def call(self, inputs: tuple, reference: bool = False):
        """The op's first output."""
        function = getattr(kernels, self.op + ("_reference" if reference else ""))
        output = function(*inputs)
        return output[0] if isinstance(output, tuple) else output


def cases(preset: str, device: str, dtype: torch.dtype, most_head_rows: int = 2**31) -> list[Case]:
    """The ops of a training step of a preset, the vocabulary head on not more than so many rows."""
    config = load_config(ROOT / "configs" / f"{preset}.json")
    model, tokens = config.model, config.training.micro_batch_tokens
    shape = BatchShape.of(tokens, config.data.max_length, config.data.mask_fraction)
    narrow, narrow_ffn, _ = generator_sizes(model)
    maker = Maker(device, dtype, tokens, shape.masked)
    heads = [
        Maker(device, dtype, tokens, min(rows, most_head_rows))
        for rows in (shape.masked, 4 * shape.masked)  # of one batch, and of a four times larger
    ]
    found = [
        maker.embed_layer_norm(model.embedding_size, model.max_positions, model.dropout),
        maker.masked_gather(narrow),
        maker.bias_gelu_layer_norm(model.embedding_size),
        heads[0].linear_cross_entropy_sample(model.embedding_size),
        heads[1].linear_cross_entropy_sample(model.embedding_size),
        maker.replace_tokens(),
        maker.replaced_token_loss(model.hidden_size),
    ]
    for hidden, ffn in ((narrow, narrow_ffn), (model.hidden_size, model.intermediate_size)):
        found += [maker.dropout_add_layer_norm(hidden, model.dropout), maker.bias_gelu(ffn)]
    return found


class Maker:
    """Cases on T tokens of which M are chosen."""

    def __init__(self, device: str, dtype: torch.dtype, tokens: int, masked: int):
        self.device, self.dtype, self.tokens, self.masked = device, dtype, tokens, masked
        self.item = dtype.itemsize
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()

    def _integers(self, high: int, size: int) -> torch.Tensor:
        return torch.randint(high, (size,), device=self.device, dtype=torch.int32)

    def _words(self) -> torch.Tensor:
        """Tokens as the generator sees them: 15 % [MASK], the others by Zipf's law."""
        u, masked = torch.rand(2, self.tokens, device=self.device)
        return torch.where(masked < 0.15, MASK, VOCABULARY**u).int()

    def _positions(self) -> torch.Tensor:
        return torch.linspace(0, self.tokens - 1, self.masked, device=self.device).int()

    def _case(self, op: str, rows: int, width: int, make, moved: tuple[float, float]) -> Case:
        """A case that moves so many [rows, width] matrices."""
        matrix = rows * width * self.item
        return Case(op, f"[{rows}, {width}]", make, (moved[0] * matrix, moved[1] * matrix))

    def bias_gelu(self, width):
        def make():
            return self._random(self.tokens, width), self._random(width)

        return self._case("bias_gelu", self.tokens, width, make, (2, 3))

    def bias_gelu_layer_norm(self, width):
        def make():
            return self._random(self.masked, width), *(self._random(width) for _ in range(3))

        return self._case("bias_gelu_layer_norm", self.masked, width, make, (2, 3))

    def dropout_add_layer_norm(self, width, p):
        def make():
            x, residual = (self._random(self.tokens, width) for _ in range(2))
            bias, *norm = (self._random(width) for _ in range(3))
            return x, bias, residual, *norm, p, self.seed

        return self._case("dropout_add_layer_norm", self.tokens, width, make, (3, 5))

    def embed_layer_norm(self, width, positions, p):
        def make():
            tables = [self._random(size, width) for size in (VOCABULARY, 2, positions)]
            index = (self._integers(size, self.tokens) for size in (2, positions))
            norm = self._random(width), self._random(width)
            return self._words(), *index, *tables, *norm, p, self.seed

        case = self._case("embed_layer_norm", self.tokens, width, make, (2, 5))
        table = (VOCABULARY + positions) * width * self.item  # its gradient is written whole
        return Case(case.op, case.size, make, (case.bytes[0], case.bytes[1] + table))

    def masked_gather(self, width):
        def make():
            return self._random(self.tokens, width), self._positions()

        share = self.masked / self.tokens
        return self._case("masked_gather", self.tokens, width, make, (2 * share, 1 + share))

    def replace_tokens(self):
        def make():
            return (self._integers(VOCABULARY, self.tokens), self._positions(),
                    self._integers(VOCABULARY, self.masked))  # fmt: skip

        return Case("replace_tokens", f"[{self.tokens}]", make,
                    (12 * self.tokens + 8 * self.masked, 0))  # fmt: skip

    def replaced_token_loss(self, width):
        def make():
            vectors = self._random(width), self._random(width), self._random(1)
            real = torch.tensor(self.tokens, dtype=torch.int32, device=self.device)
            return self._random(self.tokens, width), *vectors, self._integers(2, self.tokens), real

        return self._case("replaced_token_loss", self.tokens, width, make, (1, 2))

    def linear_cross_entropy_sample(self, width):
        def make():
            rows = self._random(self.masked, width), self._random(VOCABULARY, width)
            labels = self._integers(VOCABULARY, self.masked)
            uniforms = torch.rand(self.masked, device=self.device)
            return *rows, self._random(VOCABULARY), labels, uniforms

        product = 2.0 * self.masked * width * VOCABULARY
        table = (self.masked + VOCABULARY) * width * self.item
        return Case("linear_cross_entropy_sample", f"[{self.masked}, {width}]", make,
                    (table, 2 * table), (product, 2 * product))  # fmt: skip


def compile_table(presets: list[str]) -> list[dict]:
    """Registers, spills, shared memory and instructions of every launch, for every capability."""
    table, seen = [], set()
    for preset in presets:
        for launch in launches(preset, torch.bfloat16):
            if launch not in seen:
                seen.add(launch)
                for capability in CAPABILITIES:
                    code = aot.compiled(launch, capability)
                    table.append({
                        "kernel": str(launch), "capability": capability,
                        "registers": code.registers, "spilled_bytes": code.local,
                        "shared_bytes": code.shared,
                        "instructions": sum(code.instructions().values()),
                    })  # fmt: skip
                    print("sm_{capability} {registers:3d} registers {spilled_bytes:3d} spilled"
                          " {shared_bytes:6d} shared {instructions:5d} instructions  {kernel}"
                          .format(**table[-1]), flush=True)  # fmt: skip
    return table


def launches(preset: str, dtype: torch.dtype) -> list[aot.Launch]:
    """What the ops of a preset launch on a GPU; the same kernels whatever the rows of the head."""
    every = cases(preset, "cpu", dtype, most_head_rows=16)
    return aot.record(lambda: [run_once(case) for case in every])


def run_once(case: Case) -> None:
    """Forward, and backward where there is one."""
    output = case.call(case.make())
    if output.requires_grad:
        output.sum().backward()


def roofline(case: Case, rates: dict) -> tuple[float, float]:
    """Least milliseconds of forward and backward."""
    return tuple(
        1e3 * max(moved / rates["bytes_per_s"], flop / rates["flop_per_s"])
        for moved, flop in zip(case.bytes, case.flop, strict=True)
    )


def estimates(preset: str) -> list[dict]:
    """Traffic, arithmetic and least time of every case on an H100."""
    rows = []
    for case in cases(preset, "meta", torch.bfloat16):
        forward, backward = roofline(case, H100)
        rows.append({
            "preset": preset, "op": case.op, "size": case.size,
            "megabytes": [moved / 1e6 for moved in case.bytes],
            "gflop": [flop / 1e9 for flop in case.flop],
            "estimated_least_ms": [forward, backward],
        })  # fmt: skip
        print(f"{preset:6s} {case.op:28s} {case.size:15s} {sum(case.bytes) / 1e6:8.1f} MB"
              f"  at least (estimate) {forward:.3f} + {backward:.3f} ms")  # fmt: skip
    return rows


def measured_rates() -> dict:
    """What this GPU reaches: bytes per second of a copy, operations per second of a product."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = milliseconds(lambda: matrix @ matrix)
    return {
        "bytes_per_s": 2 * source.nbytes / copy * 1e3,
        "flop_per_s": 2 * 8192**3 / product * 1e3,
    }


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


def measure(preset: str, rates: dict) -> list[dict]:
    """Times and peak memory of every case, fused, eager and compiled."""
    rows = []
    for case in cases(preset, "cuda", torch.bfloat16):
        least = roofline(case, rates)
        row = {"preset": preset, "op": case.op, "size": case.size, "least_ms": least}
        for way in WAYS:
            row[way] = measure_way(case, way, least)
            print(f"{preset:6s} {case.op:28s} {case.size:15s} {way:8s} {line(row[way])}")
        if case.op == "linear_cross_entropy_sample":
            row["products_ms"] = products(*case.make()[:2])
            print(f"{'':52s} its three products alone: {row['products_ms']:.3f} ms")
        rows.append(row)
    return rows


@torch.no_grad()
def products(hidden: torch.Tensor, weight: torch.Tensor) -> float:
    """Milliseconds of a vocabulary head's products: logits, and the gradients of both factors."""
    logits = hidden @ weight.t()
    times = (
        milliseconds(lambda: torch.mm(hidden, weight.t(), out=logits)),
        milliseconds(lambda: logits @ weight),
        milliseconds(lambda: logits.t() @ hidden),
    )
    return sum(times)


def measure_way(case: Case, way: str, least: tuple[float, float]) -> dict:
    """One implementation of a case: [forward, backward] of time and rates, and peak memory."""
    inputs = case.make()
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]

    def forward():
        return case.call(inputs, reference=way != "fused")

    if way == "compiled":
        torch._dynamo.reset()  # else all cases share the few recompilations that one function may
        # take, and run eagerly when they are used up; with fullgraph that would be an error
        forward = torch.compile(forward, fullgraph=True, dynamic=False)
    gradient = torch.randn_like(forward()) if wanted else None

    def forward_and_flush():
        output = forward()
        flush()  # backward comes long after forward: what it reads has left the cache
        return output

    def step():
        torch.autograd.grad(forward_and_flush(), wanted, gradient)

    try:
        times = [milliseconds(forward), 0.0]
        if wanted:
            times[1] = milliseconds(step) - milliseconds(forward_and_flush)
    except RuntimeError as error:  # an eager operation that a CUDA graph cannot hold
        return {"error": str(error).partition("\n")[0]}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step() if wanted else forward()
    return {
        "ms": times,
        "gb_per_s": [b / t / 1e6 if t else 0.0 for b, t in zip(case.bytes, times, strict=True)],
        "tflop_per_s": [f / t / 1e9 if t else 0.0 for f, t in zip(case.flop, times, strict=True)],
        "roofline": [m / t if t else 0.0 for m, t in zip(least, times, strict=True)],
        "peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6,
    }


def line(result: dict) -> str:
    """A measurement as text."""
    if "error" in result:
        return f"not measured: {result['error']}"
    return (
        "{ms[0]:8.3f} + {ms[1]:8.3f} ms {gb_per_s[0]:6.0f} {gb_per_s[1]:6.0f} GB/s"
        " {tflop_per_s[0]:4.0f} {tflop_per_s[1]:4.0f} TFLOP/s"
        " {roofline[0]:4.0%} {roofline[1]:4.0%} of roofline {peak_mb:7.1f} MB".format(**result)
    )


def provenance() -> dict:
    """What ran, where, when."""

    def output(*command):
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        return run.stdout.strip()

    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(sys.argv), "time": datetime.now(timezone.utc).isoformat("T", "seconds"),
        "commit": output("git", "rev-parse", "HEAD"),
        "changed_files": output("git", "status", "--porcelain", "-uno").splitlines(),
        "gpu": gpu, "machine": platform.platform(), "python": platform.python_version(),
        "torch": torch.__version__, "triton": triton.__version__,
    }  # fmt: skip


def draw(result: dict, path: Path) -> str:
    """Bars: times beside eager and compiled on a GPU, estimates of the least time without one.

    Returns what became of the picture.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return "no picture: matplotlib is not installed"
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["ops"]
    names = [f"{row['preset']} {row['op']} {row['size']}" for row in rows]
    figure, axes = plt.subplots(figsize=(10, 0.35 * len(rows) + 1.5), layout="constrained")
    places = list(range(len(rows)))
    if result["measured"]:
        for shift, way in enumerate(WAYS):
            totals = [sum(row[way].get("ms", (0,))) for row in rows]
            axes.barh([p + 0.27 * (shift - 1) for p in places], totals, 0.27, label=way)
        axes.plot([sum(row["least_ms"]) for row in rows], places, "k|", ms=14, label="roofline")
        axes.set_title(f"forward + backward on {result['provenance']['gpu']}")
    else:
        totals = [sum(row["estimated_least_ms"]) for row in rows]
        axes.barh(places, totals, label="least time (estimate)")
        axes.set_title("forward + backward on an H100: estimate from traffic and arithmetic alone")
    axes.set_yticks(places, names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlabel("ms")
    axes.legend()
    figure.savefig(path, dpi=120)
    return f"wrote {path}"


def main(argv=None) -> int:
    """Measure or compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/kernels")
    arguments = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    result = {"provenance": provenance(), "measured": gpu, "rates": H100, "ops": []}
    written, picture = (arguments.output.with_suffix(end) for end in (".json", ".png"))
    written.parent.mkdir(parents=True, exist_ok=True)
    if gpu:
        kernels.set_backend("triton")
        result["rates"] = measured_rates()
    else:
        result["compiled"] = compile_table(arguments.presets)
    for preset in arguments.presets:  # a run that is cut short keeps what it has measured
        result["ops"] += measure(preset, result["rates"]) if gpu else estimates(preset)
        written.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {written}")
    print(draw(result, picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
