"""A tiny configuration, the commands that train with it as a user would, and two runs compared."""

import json
import os
import random
import socket
import sys
from contextlib import suppress
from pathlib import Path

import torch

import fastelectra
from fastelectra.config import config_from_dict
from fastelectra.data.batch import BatchShape
from fastelectra.data.shards import open_corpus
from fastelectra.data.stream import BatchStream, Position
from fastelectra.model.electra import Electra
from fastelectra.training import checkpoint

TRAIN = Path(fastelectra.__file__).parent / "train.py"
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def tiny_config(corpus: Path, run: Path, **training) -> dict:
    """Two layers of 32 and two ragged micro-batches a step: seconds on one core.

    In fp32 whatever this CPU is fast at: in bf16 ranks and ZeRO stages agree to 3 digits only.
    """
    return {
        "model": {"layers": 2, "hidden_size": 32, "intermediate_size": 64, "heads": 2,
                  "embedding_size": 16, "generator_fraction": 0.5, "max_positions": 64},
        "data": {"path": str(corpus), "max_length": 64},
        "optimizer": {"peak_lr": 2e-3, "warmup_steps": 4},
        "training": {"output_dir": str(run), "steps": 20, "batch_tokens": 800,
                     "micro_batch_tokens": 400, "log_every": 5, "eval_every": 10,
                     "eval_tokens": 2000, "checkpoint_every": 5, "keep_last": 4,
                     "tensorboard": False, **training},
        "deepspeed": {"bf16": {"enabled": False}},
    }  # fmt: skip


def environment() -> dict[str, str]:
    """One thread a process, and nothing of a process group that this one belongs to."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return {**kept, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


def deepspeed(processes: int) -> list[str]:
    """The launcher of the README."""
    program = str(Path(sys.executable).with_name("deepspeed"))
    return [program, "--num_gpus", str(processes), "--master_port", free_port(), str(TRAIN)]


def torchrun(processes: int) -> list[str]:
    """PyTorch's launcher."""
    program = str(Path(sys.executable).with_name("torchrun"))
    return [program, "--nproc_per_node", str(processes), "--master_port", free_port(), str(TRAIN)]


PLAIN = [sys.executable, str(TRAIN)]
COMMAND = [sys.executable, "-m", "fastelectra.cli", "train"]


def free_port() -> str:
    """Of those below what Linux gives whoever asks for any, which another might take meanwhile."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)
    raise OSError("no port is free")


def records(run: Path) -> list[dict]:
    """What the run logged, without what depends on the clock."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    timed = ("tokens_per_second", "seconds_left")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def assert_same_checkpoint(run: Path, expected: Path, tolerance: float) -> None:
    """Newest checkpoints of one step and position; weights and moments within the tolerance."""
    ours, theirs = checkpoint.resolve(run), checkpoint.resolve(expected)
    assert ours.name == theirs.name
    assert checkpoint.read_state(ours)["position"] == checkpoint.read_state(theirs)["position"]
    for read in (checkpoint.read_weights, checkpoint.read_moments):
        a, b = read(ours), read(theirs)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)


def model_and_batches(corpus, count, objective="electra", sharing="all"):
    """A configuration, its model, and the micro-batches of a step."""
    config = tiny_config(corpus, "unused", batch_tokens=400 * count, micro_batch_tokens=400)
    config["objective"] = {"name": objective}
    config["model"]["embedding_sharing"] = sharing
    config, opened = config_from_dict(config), open_corpus(corpus)
    shape = BatchShape.of(400, 64, 0.15)
    stream = BatchStream(opened.split("train"), opened.special, config.data, shape, count, seed=0)
    torch.manual_seed(0)
    model = Electra(config.model, opened.vocab_size, config.objective)
    return config, model, next(stream.steps(Position(), 0, 0, 1))[0]
