"""What a process sets up before torch is imported."""

import os
import subprocess
import sys

import pytest
import torch

from fastelectra.errors import FastElectraError
from fastelectra.training import launch

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [({}, ["PASSIVE", "3000"]), ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None"])],
)
def test_threads_spin_briefly_unless_told_how_to_wait(theirs, expected):
    code = "import os; from fastelectra.training import launch; launch.prepare();"
    code += f"print(*[os.environ.get(name) for name in {NAMES}])"
    others = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=others | theirs, capture_output=True, text=True, check=True)
    assert run.stdout.split() == expected


@pytest.fixture
def two_gpus(monkeypatch):
    """The numbers of those that were made the current one."""
    chosen = []
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_process_takes_its_gpu(two_gpus, monkeypatch):
    assert launch.device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launch.device() == torch.device("cuda", 1)
    assert two_gpus == [0, 1]


def test_gpus_can_be_left_alone(two_gpus, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert launch.device() == torch.device("cpu")
    assert two_gpus == []


def test_a_process_without_a_gpu_is_refused(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(FastElectraError, match="process 3 of this machine sees 2 GPUs: start one"):
        launch.device()
    assert two_gpus == []


def test_a_launcher_may_show_each_process_its_gpu_only(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert launch.device() == torch.device("cuda", 0)
