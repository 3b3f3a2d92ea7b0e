"""Running the trainer in processes of its own."""

import json
import os
import signal
import subprocess

import pytest
from launching import environment


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
