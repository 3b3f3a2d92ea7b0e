"""Compile what an op launches for GPUs that are not here, and read what the compiler made of it.

    launches = record(lambda: bias_gelu(x, bias).sum().backward())     # tensors on the CPU
    compiled(launches[0], 90).registers

Nothing runs on a GPU and no result is computed: the ops allocate and launch as on CUDA, and each
launch is noted with the types, alignments and constants that Triton would specialise it for.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import dispatch

SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes a program may use
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
         torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Launch:
    """A kernel with what it is specialised for; equal launches compile to the same code."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]  # parameter → type
    constants: tuple[tuple[str, object], ...]  # parameter → value
    divisible: tuple[int, ...]  # places of the parameters that are multiples of 16
    options: tuple[tuple[str, object], ...]  # num_warps, num_stages

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={v}" for k, v in (*self.constants, *self.options))
        types = "/".join(sorted({t[1:] for _, t in self.signature if t[:3] in ("*bf", "*fp")}))
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__} {types} {sizes}"


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a launch."""

    registers: int  # per thread
    local: int  # bytes per thread: spilled registers
    shared: int  # bytes per program
    cubin: bytes
    ptx: str

    def instructions(self) -> Counter:
        """Opcodes of the machine code, counted."""
        text = _inspect(self.cubin, "nvdisasm")
        pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)"
        return Counter(re.findall(pattern, text, re.M))

    def serialized(self) -> bool:
        """Whether ptxas, for Hopper, lets each product on the tensor cores wait for the last."""
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(self.ptx)
            file.flush()
            command = [TOOLS / "ptxas", "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
        return "wgmma.mma_async instructions are serialized" in run.stderr


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches of `call`, in order; its CPU tensors take the Triton path."""
    launches = []

    def note(kernel, *arguments, grid, warmup, **options):
        launches.append(_launch(kernel, arguments, options))

    backend, cpu, run = dispatch._backend, dispatch.CPU_TRITON, JITFunction.run
    dispatch._backend, dispatch.CPU_TRITON, JITFunction.run = "triton", True, note
    try:
        call()
    finally:
        dispatch._backend, dispatch.CPU_TRITON, JITFunction.run = backend, cpu, run
    return launches


def _launch(kernel, arguments, options) -> Launch:
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature, constants, divisible = {}, {}, []
    for place, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            value = value.data_ptr()
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, int) and value % 16 == 0
        if aligned and not parameter.do_not_specialize_on_alignment:
            divisible.append(place)
    tables = signature, constants, values
    return Launch(kernel, *(tuple(t.items()) for t in tables[:2]), tuple(divisible),
                  tuple(values.items()))  # fmt: skip


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile for an NVIDIA part, 80 … 100; Triton's cache makes the second time quick."""
    attributes = {(place,): [["tt.divisibility", 16]] for place in launch.divisible}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    target = GPUTarget("cuda", capability, 32)
    code = triton.compile(source, target=target, options=dict(launch.options))
    usage = _inspect(code.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(found["REG"], found["STACK"] + found["LOCAL"], code.metadata.shared,
                    code.asm["cubin"], code.asm["ptx"])  # fmt: skip


def _inspect(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
