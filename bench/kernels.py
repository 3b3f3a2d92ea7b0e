"""Every fused op at the sizes of small, base and large, forward and backward.

    python bench/kernels.py [--presets small base large] [--output bench/results/kernels]

With a GPU: milliseconds, GB/s, TFLOP/s, share of the roofline measured in the same run (a copy for
bandwidth, a large product for arithmetic) and peak memory, beside eager PyTorch and torch.compile.
Without one: what the compiler makes of every kernel for four GPUs, with an estimate of the time the
traffic and the arithmetic alone would take on an H100. Writes OUTPUT.json and OUTPUT.png.
The vocabulary head of wide embeddings is all counted as forward, which makes its gradients too.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from fastelectra.kernels import aot
from measure import flush, milliseconds, provenance
from operations import Case, cases
from options import ROOT, check_outputs

from fastelectra import errors, kernels
from fastelectra.training.launch import device

PRESETS = ("small", "base", "large")
WAYS = ("fused", "eager", "compiled")
CAPABILITIES = (80, 89, 90, 100)
H100 = {"bytes_per_s": 3.0e12, "flop_per_s": 790e12}  # what copies and products reach


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
    outputs = case.call(case.make())
    if outputs[0].requires_grad:
        sum(output.sum() for output in outputs).backward()


def roofline(case: Case, rates: dict) -> tuple[float, float]:
    """Least milliseconds of forward and backward."""
    return tuple(
        1e3 * max(moved / rates["bytes_per_s"], flop / rates["flop_per_s"])
        for moved, flop in zip(case.bytes, case.flop, strict=True)
    )


def estimates(preset: str) -> Iterator[dict]:
    """Traffic, arithmetic and least time of every case on an H100."""
    for case in cases(preset, "meta", torch.bfloat16):
        forward, backward = roofline(case, H100)
        row = {
            "preset": preset, "op": case.op, "size": case.size,
            "megabytes": [moved / 1e6 for moved in case.bytes],
            "gflop": [flop / 1e9 for flop in case.flop],
            "estimated_least_ms": [forward, backward],
        }  # fmt: skip
        print(f"{preset:6s} {case.op:28s} {case.size:15s} {sum(case.bytes) / 1e6:8.1f} MB"
              f"  at least (estimate) {forward:.3f} + {backward:.3f} ms")  # fmt: skip
        yield row


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


def measure(preset: str, rates: dict) -> Iterator[dict]:
    """Times and peak memory of every case, fused, eager and compiled."""
    for case in cases(preset, "cuda", torch.bfloat16):
        least = roofline(case, rates)
        row = {"preset": preset, "op": case.op, "size": case.size, "least_ms": least}
        for way in WAYS:
            row[way] = measure_way(case, way, least)
            print(f"{preset:6s} {case.op:28s} {case.size:15s} {way:8s} {line(row[way])}")
        if case.op == "linear_cross_entropy_sample":
            row["products_ms"] = products(*case.make()[:2])
            print(f"{'':52s} its three products alone: {row['products_ms']:.3f} ms")
        yield row


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

    def forward_and_flush():
        output = forward()
        flush()  # backward comes long after forward: what it reads has left the cache
        return output

    def step():
        torch.autograd.grad(forward_and_flush(), wanted, gradients)

    try:
        gradients = [torch.randn_like(output) for output in forward()] if wanted else None
        times = [milliseconds(forward), 0.0]
        if wanted:
            times[1] = milliseconds(step) - milliseconds(forward_and_flush)
        if case.together:
            times = [sum(times), 0.0]
    except RuntimeError as error:  # what cannot be compiled, or held by a CUDA graph
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
    gpu = device().type == "cuda"
    result = {"provenance": provenance(), "measured": gpu, "rates": H100, "ops": []}
    written, picture = (Path(f"{arguments.output}.{kind}") for kind in ("json", "png"))
    check_outputs(written, picture)
    if gpu:
        kernels.set_backend("triton")
        result["rates"] = measured_rates()
    else:
        result["compiled"] = compile_table(arguments.presets)
    for preset in arguments.presets:  # a run that is cut short keeps what it has measured
        for row in measure(preset, result["rates"]) if gpu else estimates(preset):
            result["ops"].append(row)
            written.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {written}")
    print(draw(result, picture))
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
