"""Which path the ops take, decided here and nowhere else: Triton, CPU loops or plain PyTorch."""

import functools
import os

import torch

from . import cpu

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

    auto: Triton for CUDA tensors where triton is installed, compiled loops for fp32 and bf16 on the
    CPU, else PyTorch. triton: the same, but triton must be installed, and does attention on all
    GPUs that can; in a process with TRITON_INTERPRET=1 it takes CPU tensors too, through Triton's
    interpreter. torch: PyTorch on every device. Raises ValueError.
    """
    global _backend  # noqa: PLW0603
    if name not in BACKENDS:
        raise ValueError(f"kernels must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton" and triton is None:
        raise ValueError("kernels = triton, but triton is not installed: pip install triton")
    _backend = name


def for_gpus() -> str:
    """What CUDA tensors take: torch, triton where it was asked for, else auto."""
    return "torch" if triton is None else _backend


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` runs its Triton kernels."""
    if _backend == "torch" or triton is None:
        return False
    return tensor.is_cuda or (CPU_TRITON and _backend == "triton")


def use_loops(tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` may run as compiled loops on the CPU."""
    asked = _backend != "torch" and cpu.numba is not None
    return asked and tensor.device.type == "cpu" and tensor.dtype in cpu.DTYPES


def fused(tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` runs fused, as Triton kernels or compiled loops, or in PyTorch."""
    return use_triton(tensor) or use_loops(tensor)


def describe(device: torch.device) -> str:
    """One line for start-up: which path the ops take on a device, and why."""
    if _backend == "torch":
        return "kernels: PyTorch (as asked)"
    if device.type == "cuda":
        if triton is None:
            return "kernels: PyTorch (triton is not installed)"
        return f"kernels: Triton {triton.__version__}"
    if INTERPRETED and _backend == "triton":
        return f"kernels: Triton {triton.__version__}, interpreted on the CPU"
    if cpu.numba is None:
        return "kernels: PyTorch (numba is not installed, or compiles nothing)"
    how = "" if cpu.HAS_OPENMP else ", in one thread, as torch brings no OpenMP"
    return f"kernels: compiled loops for the CPU{how} (the Triton kernels need a CUDA device)"


class Operation:
    """A function of tensors, of whose outputs the first alone may have a gradient.

    With uses=2 a call returns that output twice, for two uses whose gradients then come one by one:
    in the same memory, so that neither may be changed in place.

    torch.compile sees the custom op fastelectra::name. Eager code takes a shorter way to the same
    function, since a custom op's bookkeeping costs as much time as ten launches. The function
    gets its tensors contiguous, with the first one's device the current device.
    """

    def __init__(self, name: str, function, uses: int = 1):
        @functools.wraps(function)
        def run(*arguments):
            ready = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments]
            with torch.cuda.device_of(arguments[0]):
                return function(*ready)

        self.name, self.run, self.uses, self.node = name, run, uses, None
        self.custom_op = torch.library.custom_op(f"fastelectra::{name}", run, mutates_args=())
        self.register_fake = self.custom_op.register_fake

    def register_autograd(self, differentiate, save) -> None:
        """save(ctx, inputs, output) keeps what differentiate(ctx, gradient of output) needs.

        differentiate returns the gradients of the inputs, None for those that have none. With
        uses=2 it gets two gradients, of which one may be None.
        """

        def setup_context(ctx, inputs, output):
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient
            ctx.inputs = len(inputs)
            save(ctx, inputs, output)

        def backward(ctx, *gradients):  # those of other outputs are None
            asked = gradients[: self.uses]
            if all(gradient is None for gradient in asked):
                return (None,) * ctx.inputs
            return differentiate(ctx, *asked)

        def forward(ctx, *arguments):
            output = self.run(*arguments)
            setup_context(ctx, arguments, output)
            return self._for_uses(output)

        once = torch.autograd.function.once_differentiable(backward)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(once)}
        self.node = type(self.name, (torch.autograd.Function,), methods)  # as profiles show it
        self.custom_op.register_autograd(backward, setup_context=setup_context)

    def _for_uses(self, output):
        return output if self.uses == 1 else (output[0], output[0].detach(), *output[1:])

    def __call__(self, *arguments):
        plain = type(arguments[0]) in (torch.Tensor, torch.nn.Parameter)
        if torch.compiler.is_compiling() or not plain:
            output = self.custom_op(*arguments)  # whose outputs may not share memory
            return output if self.uses == 1 else (output[0], *output)
        if self.node is None or not torch.is_grad_enabled():
            return self._for_uses(self.run(*arguments))
        return self.node.apply(*arguments)


def operation(name: str, uses: int = 1):
    """Decorator that makes a function an Operation of this name."""
    return functools.partial(Operation, name, uses=uses)
