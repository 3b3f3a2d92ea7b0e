"""Attention with dropout at the sizes of small, base and large, by all that runs here.

    python bench/attention.py [--presets small base large] [--tokens N] [--json FILE]

Milliseconds and TFLOP/s, forward and backward, and the error of forward without dropout against
fp32. On a GPU the trainer's own choice is among those of `fastelectra.model.attention`; "torch
cudnn" is not used by the trainer. "Triton", the trainer's own, also joins the gradients in one
tensor and sums the bias', which for the others takes `split_qkv` on top, timed with them here. On a
CPU: the trainer's own beside PyTorch's on padded rows.
FLOPs are those of two products forward and, as probabilities are computed anew, five backward.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fastelectra.training import launch

launch.prepare()  # before torch, which reads what it sets

# ruff: noqa: E402
import torch
from fastelectra.kernels import packed_attention, split_qkv
from measure import milliseconds, provenance
from operations import padded
from options import ROOT, check_outputs

from fastelectra import errors
from fastelectra.config import generator_sizes, load_config
from fastelectra.data.batch import BatchShape
from fastelectra.model.attention import BACKENDS, backend, layout_of
from fastelectra.tasks.finetune import positive

PRESETS = ("small", "base", "large")


def cudnn(q, k, v, boundaries, longest: int, dropout: float) -> torch.Tensor:
    """cuDNN's attention through PyTorch: as the implementations in BACKENDS."""
    if torch.__version__ < "2.14":
        raise RuntimeError("PyTorch before 2.14 passes the head size as the sequences' length")
    return torch.ops.aten._cudnn_attention_forward(
        q, k, v, None, boundaries, boundaries, longest, longest, True, dropout, False, False
    )[0]


def packed(qkv, boundaries, longest: int, dropout: float) -> torch.Tensor:
    """The trainer's own."""
    bias = qkv.new_zeros(qkv.shape[1:].numel(), requires_grad=True)
    seed = torch.zeros(1, dtype=torch.int64, device=qkv.device)
    return packed_attention(qkv, bias, boundaries, longest, dropout, seed)


def ways(device: torch.device) -> dict[str, Callable]:
    """Implementations by name: of qkv [T, 3, heads, d], boundaries, the longest and dropout."""
    if device.type == "cpu":
        return {"packed": packed, "padded": apart(padded)}
    found = {name: way for name, way in BACKENDS.items() if name != "flash-attn 4"}  # no dropout
    ways = {name: apart(way) for name, way in (found | {"padded": padded}).items()}
    return {"Triton": packed, **ways}


def apart(way: Callable) -> Callable:
    """The same of queries, keys and values in one tensor, to which a bias has been added."""

    def call(qkv, *others):
        bias = qkv.new_zeros(qkv.shape[1:].numel(), requires_grad=True)
        return way(*split_qkv(qkv, bias), *others)

    return call


def measure(
    preset: str, tokens: int | None, device: torch.device, ways: dict[str, Callable]
) -> Iterator[dict]:
    """A row for each implementation and network of a preset."""
    config = load_config(ROOT / "configs" / f"{preset}.json")
    model, length = config.model, config.data.max_length
    tokens = max(1, (tokens or config.training.micro_batch_tokens) // length) * length
    room = BatchShape.of(tokens, length, config.data.mask_fraction, length).sequences
    boundaries = torch.arange(room + 1, device=device).mul(length).clamp(max=tokens).int()
    layout = layout_of(boundaries, tokens, length)
    narrow, _, few = generator_sizes(model)
    for width, heads in ((model.hidden_size, model.heads), (narrow, few)):
        qkv = torch.randn(tokens, 3, heads, width // heads, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            exact = apart(padded)(qkv.float(), None, length, 0.0)
        flop = 4 * tokens * length * width
        for name, way in ways.items():
            row = {"preset": preset, "tokens": tokens, "length": length, "heads": heads,
                   "head_size": width // heads, "way": name}  # fmt: skip
            row["chosen"] = name == backend(device, qkv.dtype, width // heads, True, "auto")
            try:
                row |= timed(way, qkv, layout, model.attention_dropout)
                with torch.no_grad():
                    out = way(qkv, layout.cu_seqlens, length, 0.0).float()
                row["error"] = ((out - exact).norm() / exact.norm()).item()
                row["tflop_per_s"] = [flop / row["ms"][0] / 1e9, 2.5 * flop / row["ms"][1] / 1e9]
            except Exception as error:  # not installed, or not for this GPU
                row["cannot_run"] = str(error).strip().partition("\n")[0]
            yield row


def timed(way: Callable, qkv: torch.Tensor, layout, dropout: float) -> dict:
    """Milliseconds of forward, and of backward."""
    qkv.requires_grad_()
    gradient = torch.randn_like(qkv[:, 0])
    clock = milliseconds if qkv.is_cuda else on_cpu

    def forward():
        return way(qkv, layout.cu_seqlens, layout.max_length, dropout)

    both = clock(lambda: torch.autograd.grad(forward(), qkv, gradient))
    alone = clock(forward)
    return {"ms": [alone, both - alone]}


def on_cpu(call: Callable[[], object], repeats: int = 5) -> float:
    """Median milliseconds of a call."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def line(row: dict) -> str:
    """A row as text; the trainer's choice has a star."""
    start = "{preset:6s} {tokens:6d} tokens {length:4d} {heads:3d} × {head_size:<3d}".format(**row)
    start += f" {'*' if row['chosen'] else ' '} {row['way']:16s}"
    if "cannot_run" in row:
        return f"{start} cannot run: {row['cannot_run']}"
    return start + (
        " {ms[0]:8.3f} + {ms[1]:8.3f} ms {tflop_per_s[0]:7.2f} {tflop_per_s[1]:7.2f} TFLOP/s"
        "  error {error:.1e}".format(**row)
    )


def main(argv=None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--tokens", type=positive(int), help="whole examples of so many tokens")
    parser.add_argument("--json", type=Path, help="also write the results there")
    arguments = parser.parse_args(argv)
    check_outputs(arguments.json)
    device = launch.device()
    result = {"provenance": provenance(), "rows": []}
    turns = [ways(device)]
    if device.type == "cuda":
        turns.append({"torch cudnn": apart(cudnn)})  # last: it may fail, and take CUDA along
    for found, preset in itertools.product(turns, arguments.presets):
        for row in measure(preset, arguments.tokens, device, found):
            print(line(row), flush=True)
            result["rows"].append(row)
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
