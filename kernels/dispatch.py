"""Which path the ops take, decided here and nowhere else: Triton kernels or plain PyTorch."""

import functools
import os

import torch

try:
    import triton
except ImportError:
    triton = None

BACKENDS = ("auto", "triton", "torch")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton when a kernel is defined

CPU_TRITON = INTERPRETED  # whether CPU tensors may take Triton: also while aot.py records

_backend = "auto"


def set_backend(name: str) -> None:
    """Choose the path of every op from now on.

    auto: Triton for CUDA tensors where triton is installed, else PyTorch. triton: the same, but
    triton must be installed; in a process with TRITON_INTERPRET=1 it takes CPU tensors too, through
    Triton's interpreter. torch: PyTorch on every device. Raises ValueError.
    """
    global _backend  # noqa: PLW0603
    if name not in BACKENDS:
        raise ValueError(f"kernels must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton" and triton is None:
        raise ValueError("kernels = triton, but triton is not installed: pip install triton")
    _backend = name


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` runs its Triton kernels."""
    if _backend == "torch" or triton is None:
        return False
    return tensor.is_cuda or (CPU_TRITON and _backend == "triton")


def describe() -> str:
    """One line for start-up: which path the ops take, and why."""
    if _backend == "torch":
        return "kernels: PyTorch (as asked)"
    if triton is None:
        return "kernels: PyTorch (triton is not installed)"
    if torch.cuda.is_available():
        return f"kernels: Triton {triton.__version__} on {torch.cuda.get_device_name()}"
    if INTERPRETED and _backend == "triton":
        return f"kernels: Triton {triton.__version__}, interpreted on the CPU"
    return "kernels: PyTorch (no CUDA device; the Triton kernels need one)"


def operation(name: str):
    """Register a function of tensors as the custom op fastelectra::name, for torch.compile.

    Its tensors reach it contiguous, with their device the current one.
    """

    def register(function):
        @functools.wraps(function)
        def prepared(*arguments):
            tensors = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments]
            with torch.cuda.device_of(arguments[0]):
                return function(*tensors)

        return torch.library.custom_op(f"fastelectra::{name}", prepared, mutates_args=())

    return register
