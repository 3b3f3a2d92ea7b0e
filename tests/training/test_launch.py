"""What a process sets up before torch is imported."""

import os
import subprocess
import sys

import pytest

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [({}, ["PASSIVE", "1000"]), ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None"])],
)
def test_threads_spin_briefly_unless_told_how_to_wait(theirs, expected):
    code = "import os; from fastelectra.training import launch; launch.prepare();"
    code += f"print(*[os.environ.get(name) for name in {NAMES}])"
    others = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=others | theirs, capture_output=True, text=True, check=True)
    assert run.stdout.split() == expected
