"""Ours over micro-batch, length and ranks: bench/throughput.py again, for each in a process."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from options import ROOT

from fastelectra.training import launch

THROUGHPUT = ROOT / "bench/throughput.py"


def scaling(args: argparse.Namespace, result: dict, environment: dict) -> list[dict]:
    """Ours alone at other sizes, each in a process of its own: [{by, value, tokens/s}]."""
    settings = result["settings"]
    tokens, length = settings["tokens_per_step"], settings["max_length"]
    micro = settings["micro_batch_tokens"]
    points = [("micro-batch", n, 1, n, length) for n in (micro // 4, micro // 2, micro, 2 * micro)]
    points += [("length", n, 1, tokens, n) for n in (64, 128, 256, 512)]
    most = torch.cuda.device_count() if launch.device().type == "cuda" else 2
    points += [("ranks", n, n, tokens // n, length) for n in (1, 2, 4, 8) if n <= most]
    measured = []
    for by, value, ranks, micro_batch, longest in points:
        step = tokens if by == "ranks" else micro_batch
        if micro_batch < longest:
            continue
        point = {"by": by, "value": value}
        try:
            ours = _ours_alone(args, ranks, step, micro_batch, longest, environment)
            point |= {"tokens_per_s": ours["tokens_per_s"], "mfu_of_gemm": ours["mfu_of_gemm"]}
        except (OSError, RuntimeError) as error:
            point["unavailable"] = str(error)
        measured.append(point)
        print(f"scaling: {_scaling_line(point)}", flush=True)
    return measured


def _ours_alone(args, ranks: int, tokens: int, micro: int, length: int, environment: dict) -> dict:
    """What throughput.py measures of ours on so many ranks, through the real launcher."""
    start = [sys.executable]
    if ranks > 1:
        start = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    same = ["--no-data"] * args.no_data
    for name in ("block", "warmup"):
        if given := getattr(args, name):
            same += [f"--{name}", given]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [
            *start, THROUGHPUT, "--size", args.size, "--seq", length, "--tokens-per-step", tokens,
            "--micro-batch", micro, "--lengths", args.lengths, "--data", args.data,
            "--dtype", args.dtype, "--rounds", args.rounds, *same, "--json", file, "--peers",
        ]  # fmt: skip
        done = subprocess.run(
            [str(word) for word in command], env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2])
        return json.loads(file.read_text())["contenders"]["ours"]


def _scaling_line(point: dict) -> str:
    if "unavailable" in point:
        return f"{point['by']} {point['value']:,}: not measured: {point['unavailable']}"
    rate = point["tokens_per_s"]["median"]
    return f"{point['by']} {point['value']:,}: {rate:,.0f} tokens/s, {point['mfu_of_gemm']:.1%}"
