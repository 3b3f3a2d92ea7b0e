"""How the loops for the CPU are compiled, kept for the next process, and shared among threads."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
from fastelectra.kernels import cpu

from fastelectra import kernels, processor

if cpu.numba is None:
    pytest.skip("the loops need numba", allow_module_level=True)


def _fill(part, start, stop, failing, found):
    if part < failing:
        raise ValueError
    for row in range(start, stop):
        found[row] += part + 1


@pytest.fixture
def uncached(monkeypatch):
    """The cache looks at the kernels' sources, not at those of loops that are made here."""
    monkeypatch.setattr(cpu, "CACHE", "")


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("has_openmp", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 7, 1000, 1001])
def test_each_row_is_done_once(threads, rows, has_openmp, monkeypatch):
    monkeypatch.setattr(cpu, "HAS_OPENMP", has_openmp)
    fill, found = cpu.loop(_fill), np.zeros(rows + 2000)
    cpu.run(fill, rows, 0, found)
    parts = cpu.PARTS * threads if threads > 1 and has_openmp else 1
    share = max(1, -(-rows // parts))
    assert found[:rows].tolist() == [row // share + 1 for row in range(rows)]
    assert not found[rows:].any()
    assert (cpu.OPENMP in "".join(cpu._shared(fill).inspect_llvm().values())) == has_openmp


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("failing", [1, 4])
def test_parts_that_fail_surface_when_all_others_have_ended(threads, failing):
    found, failing = np.zeros(1000), min(failing, cpu.parts())
    with pytest.raises(RuntimeError, match=f"_fill: {failing} of {cpu.parts()} parts failed"):
        cpu.run(cpu.loop(_fill), 1000, failing, found)
    first = failing * -(-1000 // cpu.parts())
    assert np.flatnonzero(found).tolist() == list(range(first, 1000))


@pytest.mark.usefixtures("uncached")
@pytest.mark.skipif(not cpu.HAS_OPENMP, reason="torch brings no OpenMP")
def test_loops_run_on_the_threads_of_torch(threads):
    team = ctypes.CDLL(None).omp_get_num_threads
    team.argtypes = []

    def count(part, start, stop, found):
        found[start:stop] = team()

    found = np.zeros(100, np.int32)
    cpu.run(cpu.loop(count), 100, found)
    assert set(found) == {threads}


def test_every_loop_has_a_name_of_its_own_in_the_cache():
    modules = [module for name, module in sys.modules.items() if name.startswith(kernels.__name__)]
    loops = [loop for module in modules for name, loop in vars(module).items()
             if name.endswith("_loop") and loop.py_func.__module__ == module.__name__]  # fmt: skip
    assert len({cpu._shared(loop).py_func.__qualname__ for loop in loops}) == len(loops) > 6


FORK = """
import os, signal, sys
sys.path.append(sys.argv[1])
import kernel_cases, torch
torch.set_num_threads(2)
inputs = kernel_cases.make("bias_gelu", 300, 64, torch.float32)
operation = kernel_cases.operation("bias_gelu")
before = operation(*inputs)
if os.fork() == 0:
    signal.alarm(20)  # else it would wait for ever
    os._exit(not torch.equal(before, operation(*inputs)))
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_forked_process_does_not_wait_for_threads_that_it_has_not_got():
    command = [sys.executable, "-c", FORK, os.path.dirname(__file__)]
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize("first", ["fastelectra.data.examples", "fastelectra.kernels"])
def test_whole_vectors_whatever_is_imported_first(first):
    code = f"""import {first}
from fastelectra.processor import FEATURES
from numba.core.registry import cpu_target
codegen = cpu_target.target_context.codegen()
print("+avx512f" in FEATURES, "-prefer-256-bit" in str(codegen.magic_tuple()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    able, told = run.stdout.split()
    assert able == told


def test_numba_may_be_kept_from_vector_instructions():
    code = "from fastelectra.kernels.cpu_numbers import *; print(HAS_BF16, to_bf16(ONE))"
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "NUMBA_ENABLE_AVX": "0"},
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert run.stdout.split() == ["False", str(0x3F80)], run.stderr


BITS = """
import sys
sys.path.append(sys.argv[1])
import hashlib, kernel_cases
inputs = kernel_cases.make("chunked_cross_entropy", 60, 100, kernel_cases.torch.float32)
values = kernel_cases.with_gradients(kernel_cases.operation("chunked_cross_entropy"), inputs)
print(hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest())
"""


def at_home(folder):
    """The environment of a user whose home it is."""
    return {**os.environ, "HOME": str(folder), "NUMBA_CACHE_DIR": ""}


def test_loops_compiled_anew_and_from_the_cache_give_the_same_bits(tmp_path):
    command = [sys.executable, "-c", BITS, os.path.dirname(__file__)]
    runs = [
        subprocess.run(command, env=at_home(tmp_path), capture_output=True, text=True,
                       check=True).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert list(tmp_path.glob(".cache/fastelectra/loops/*"))
    assert runs[0] == runs[1]


SLOW = """
import sys, time
import numpy as np
from numba.core.caching import IndexDataCacheFile
load = IndexDataCacheFile._load_index

def load_slowly(self):
    found = load(self)
    time.sleep(1)
    return found

IndexDataCacheFile._load_index = load_slowly
from fastelectra.kernels import cpu_numbers
cpu_numbers.flush(np.ones(2, np.float32), np.ones(2, sys.argv[1]))
"""


def test_two_processes_at_once_keep_the_code_of_both(tmp_path):
    runs = [
        subprocess.Popen([sys.executable, "-c", SLOW, kind], env=at_home(tmp_path))
        for kind in ("float32", "float64")
    ]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(list(tmp_path.glob("**/*flush*.nbc"))) == 2


def test_a_cache_that_cannot_be_written_costs_its_time_only(tmp_path):
    gone = str(tmp_path / "gone")
    with pytest.warns(UserWarning, match="gone: No such file or directory: loops"):
        processor._alone(lambda *_: pytest.fail("saved without a lock"), gone)()

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="No space left on device"):
        processor._alone(full, str(tmp_path))()
