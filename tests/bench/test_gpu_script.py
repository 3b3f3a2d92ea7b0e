"""gpu.sh with a Python that only notes what it is asked for: its parts, their order and limits."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench/gpu.sh"
PYTHON = """#!/bin/sh
case "$*" in
  *"import numpy"*) exit $NUMPY ;;
  *get_device_name*) echo NVIDIA H100 80GB ;;
  *attention.py*) exit $ATTENTION ;;
esac
"""


def gpu_sh(folder, numpy=0, attention=0):
    for name, text in (("python", PYTHON), ("nvidia-smi", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"),
        "NUMPY": str(numpy), "ATTENTION": str(attention),
    }  # fmt: skip
    command = ["bash", SCRIPT, folder / "out"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_what_is_asked_for_fits_the_time(tmp_path):
    done = gpu_sh(tmp_path)
    assert done.returncode == 0, done.stderr
    parts = re.findall(r"^== (\S+), at \d+ s, for (\d+) s", done.stdout, re.MULTILINE)
    assert {name for name, _ in parts[2:6]} == {
        "tests", "compile-small", "compile-base", "compile-large",
    }  # fmt: skip
    assert [name for name, _ in parts[6:]] == [
        "throughput-base", "throughput-small", "throughput-large", "throughput-small-compiled",
        "throughput-base-compiled", "attention", "throughput-base-largest", "kernels",
    ]  # fmt: skip
    limits = [int(limit) for _, limit in parts]
    alone = [*limits[:2], max(limits[2:6]), *limits[6:-1]]  # kernels gets what is left
    assert sum(alone) <= 515


@pytest.mark.parametrize(("status", "said"), [(137, "out of time"), (3, "exit status 3")])
def test_a_part_that_fails_is_named(status, said, tmp_path):
    done = gpu_sh(tmp_path, attention=status)
    assert done.returncode == 1
    assert done.stdout.endswith(f"failed: attention: {said}\n")


def test_numpy_is_needed(tmp_path):
    done = gpu_sh(tmp_path, numpy=1)
    assert done.returncode == 2
    assert done.stderr == "numpy is not installed: nothing runs without it\n"
