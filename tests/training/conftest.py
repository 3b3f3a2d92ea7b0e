"""Running the trainer in processes of its own, and its engine in this one."""

import json
import os
import signal
import subprocess

import pytest
import torch
from launching import LAUNCHED, environment, tiny_config

from fastelectra.config import config_from_dict
from fastelectra.data.batch import BatchShape
from fastelectra.data.shards import open_corpus
from fastelectra.data.stream import BatchStream, Position
from fastelectra.training import launch


@pytest.fixture
def start(tmp_path):
    """start(launcher command, config, *arguments): a running trainer; ended after the test."""
    processes = []

    def start(launcher: list[str], config: dict, *arguments: str) -> subprocess.Popen:
        path = tmp_path / f"config-{len(processes)}.json"
        path.write_text(json.dumps(config))
        command = [*launcher, "--config", str(path), *arguments]
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.fixture
def train(start):
    """train(launcher command, config, *arguments) → (exit code, everything it printed)."""

    def train(launcher: list[str], config: dict, *arguments: str) -> tuple[int, str]:
        process = start(launcher, config, *arguments)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    return train


@pytest.fixture(scope="session")
def process():
    """A process group of one: DeepSpeed survives no second."""
    before = {name: os.environ.pop(name, None) for name in LAUNCHED}
    yield launch.prepare()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def step_batches(corpus):
    """The micro-batches of two steps."""
    config = config_from_dict(tiny_config(corpus, "unused"))
    opened = open_corpus(corpus)
    shape = BatchShape.of(400, 64, 0.15)
    stream = BatchStream(opened.split("train"), opened.special, config.data, shape, 2, seed=0)
    steps = stream.steps(Position(), 0, 0, 1)
    return [next(steps)[0] for _ in range(2)]
