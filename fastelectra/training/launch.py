"""Being launched: by `deepspeed`, by torchrun, or as a plain process. Imports nothing heavy."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastelectra.config import Config
from fastelectra.errors import FastElectraError

if TYPE_CHECKING:
    import torch

PATIENCE = 10  # seconds that other ranks leave rank 0 to report an error and end the run
FORWARDED = 2  # seconds within which launchers pass on a signal that a rank has had already
LEAVE = 600  # seconds to finish a step and save when the launcher has gone

stopping = threading.Event()  # set when a signal has been noted
_started = time.monotonic()


@dataclass(frozen=True)
class Process:
    """This process's place among all processes of the run."""

    rank: int
    world: int

    @property
    def leads(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.leads:
            print(text, flush=True)


def prepare() -> Process:
    """Complete the environment; call before torch is imported. Returns this process's place."""
    if "RANK" not in os.environ:  # no launcher: a group of one
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # any that is free
    deepspeed = b"deepspeed.launcher.launch" in _command_of(os.getppid())
    if deepspeed or "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_with_launcher, args=(deepspeed,), daemon=True).start()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    threads = max(1, len(os.sched_getaffinity(0)) // local_world)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # On a busy machine threads that spin while they wait take the cores from those that work; to be
    # woken takes as long as a small operation. So they spin, but for some 30 µs only.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    _keep_memory()
    return Process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def device() -> "torch.device":
    """The GPU of this process, from now on the current one; the CPU where there is none.

    DS_ACCELERATOR=cpu, which DeepSpeed reads too, hides all GPUs. Raises FastElectraError if those
    that this process sees are too few.
    """
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= gpus:
        raise FastElectraError(
            f"process {rank + 1} of this machine sees {gpus} GPU{'s' * (gpus > 1)}: start one for"
            " each GPU, or all of them on the CPU with DS_ACCELERATOR=cpu"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def fast_at_bf16(device: "torch.device") -> bool:
    """Whether its products of matrices in bf16 are faster than those in fp32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16"))


def seconds_since_start() -> float:
    """Of this process, its imports included."""
    return time.monotonic() - _started


def _keep_memory() -> None:
    """Let glibc keep what a step frees: the next step needs it again, page by page if returned."""
    trim_threshold, mmap_threshold = -1, -3  # of mallopt
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 32 << 20)  # the most that it takes
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):  # another libc
        return


def _end_with_launcher(deepspeed: bool) -> None:
    """Leave no orphans: save and end, as on SIGTERM, when what launched this process has gone.

    The `deepspeed` command starts deepspeed.launcher.launch, which starts the ranks; a signal to
    the first alone would leave the others running.
    """
    launcher = os.getppid()
    front = _parent_of(launcher)
    while os.getppid() == launcher and not (deepspeed and _parent_of(launcher) != front):
        time.sleep(1)
    if not stopping.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVE)
    os.kill(os.getpid(), signal.SIGKILL)


def _command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def accumulation(config: Config, process: Process) -> int:
    """Forward passes of one step on one rank. Raises FastElectraError if ranks cannot share."""
    total, world = config.training.micro_batches, process.world
    if total % world:
        raise FastElectraError(
            f"{world} processes cannot share {total} micro-batches a step evenly: begin with"
            " a training.micro_batch_tokens so small that training.batch_tokens is a multiple of"
            f" {world} times that, or start another number of processes"
        )
    return total // world


@contextmanager
def one_voice(process: Process) -> Iterator[None]:
    """Let one rank report an error that all ranks meet.

    Rank 0 reports at once and its exit makes the launcher end the others; another rank reports
    only what rank 0 has not, after a while.
    """
    try:
        yield
    except (FastElectraError, OSError):
        if not process.leads:
            time.sleep(PATIENCE)
        raise
    except RuntimeError as error:
        from torch import OutOfMemoryError
        from torch.distributed import DistError

        if isinstance(error, OutOfMemoryError) or isinstance(error.__context__, OutOfMemoryError):
            if not process.leads:
                time.sleep(PATIENCE)
            raise FastElectraError(
                "the GPU has too little memory for this: pre-training takes less with a smaller"
                " training.micro_batch_tokens, fine-tuning with a smaller --max-length"
            ) from error
        lost = isinstance(error, DistError) or "gloo" in str(error) or "NCCL" in str(error)
        if not lost:
            raise
        if "EADDRINUSE" in str(error):
            raise FastElectraError(
                f"port {os.environ['MASTER_PORT']} is in use, perhaps by another run on this"
                " machine: give the launcher another --master_port"
            ) from error
        raise FastElectraError(
            "lost the connection to another process of this run: it has ended, and what it or the"
            " launcher printed says why"
        ) from error
    except KeyboardInterrupt:
        if not process.leads:
            sys.exit(130)
        raise
