"""numba for the op files, importable where numba is absent, and what their CPU loops share.

A loop gets the rows [start, stop) that are its part of the work, and computes in fp32. Bits of
bf16 come in and go out as uint16, which numba has; LLVM turns the inner loops into vector code.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from types import FunctionType

import numpy as np
import torch

OPTIONS = {
    # sums may be reordered and fused; NaN and infinity mean what they mean
    "fastmath": {"reassoc", "nsz", "contract", "arcp", "afn"},
    # no ZeroDivisionError: loops that may raise are not turned into vector code
    "error_model": "numpy",
    # Else a call reaches a function's own code if newly compiled, and the caller's copy of it if
    # loaded from the cache, which LLVM may have treated otherwise: sums in another order.
    "forceinline": True,
    "no_cfunc_wrapper": True,  # one copy less of each to compile
}

try:
    from llvmlite import binding, ir
    from numba.extending import intrinsic, overload

    from fastelectra.processor import FEATURES, cache_folder, compiled, numba

    if numba.config.DISABLE_JIT:
        raise ImportError

    def _may_use_amx() -> bool:
        """Ask Linux for this process' AMX registers, which it gives to those that ask."""
        arch_prctl, request, tile_data = 158, 0x1023, 18
        return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0

    HAS_BF16 = "+avx512bf16" in FEATURES
    HAS_AMX = HAS_BF16 and "+amx-bf16" in FEATURES and _may_use_amx()

    OPENMP = "GOMP_parallel"  # runs a function on each thread of a team; GNU's, Intel's and LLVM's
    HAS_OPENMP = hasattr(ctypes.CDLL(None), OPENMP)
    if HAS_OPENMP:
        binding.add_symbol(OPENMP, ctypes.cast(ctypes.CDLL(None)[OPENMP], ctypes.c_void_p).value)

    # nor does numba know whether AMX may be used, or OpenMP
    CACHE = cache_folder(Path(__file__).parent, bytes([HAS_AMX, HAS_OPENMP]))

    def loop(function):
        """Compile a loop, or a function of loops."""
        return compiled(function, CACHE, **OPTIONS)

    class _BFloat(ir.Type):
        """LLVM's bf16, which llvmlite has no name for."""

        def _to_string(self):
            return "bfloat"

        def __eq__(self, other):
            return isinstance(other, _BFloat)

        def __hash__(self):
            return hash(_BFloat)

    BFLOAT = _BFloat()

except ImportError:  # or numba compiles nothing: the loops are then never called
    numba = ir = BFLOAT = HAS_BF16 = HAS_AMX = HAS_OPENMP = None

    def loop(function):
        """Leave the function as it is."""
        return function

    def overload(_, **options):
        """Leave the function as it is."""
        return loop

    intrinsic = loop


PARTS = 4  # of the rows for each thread
PROCESS = os.getpid()
DTYPES = (torch.float32, torch.bfloat16)
LINE = 64  # bytes of a cache's line
FETCH = "llvm.prefetch.p0i8"


def array(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a CPU tensor; bf16 as uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def run(work, rows: int, *arguments) -> None:
    """work(part, start, stop, *arguments), a loop, for each part of the rows, on all threads.

    Tensors are passed as arrays. A thread that is free takes the next part, as some wake up late.
    RuntimeError where a part failed, once all have ended.
    """
    arguments = [array(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    share = max(1, -(-rows // parts()))
    failed = _shared(work)(threads(), rows, share, *arguments)
    if failed:
        raise RuntimeError(
            f"{work.py_func.__name__}: {failed} of {parts()} parts failed: no memory was left,"
            " or an array has another shape than the loop takes"
        )


def threads() -> int:
    """How many threads share a loop: torch's, but one in a fork of the process that imported this.

    Threads do not come along there, and OpenMP would wait for them, in torch's operations too.
    """
    return torch.get_num_threads() if HAS_OPENMP and os.getpid() == PROCESS else 1


def parts() -> int:
    """How many parts `run` makes of the rows: several a thread."""
    count = threads()
    return PARTS * count if count > 1 else 1


def seed(tensor: torch.Tensor) -> np.uint64:
    """A dropout's seed [1] int64 as the loops take it."""
    return np.uint64(tensor.item() & 0xFFFFFFFFFFFFFFFF)


@intrinsic
def _in_threads(typing, work, threads, rows, share, arguments):
    """Have threads take parts of the rows, a share each, until none is left; how many failed.

    They are OpenMP's, the same that torch's operations use: those of a pool of our own would sleep
    when torch's work, and torch's when ours do, and to be woken takes longer than most loops. Nor
    do they ever hold Python's lock, for which they would have to wait.
    """
    counts = [numba.int64] * 3  # part, start, stop
    called = work.get_call_type(typing, (*counts, *arguments.types), {})

    def generate(context, builder, signature, values):
        _, team, *inputs = values
        integer, void = team.type, ir.VoidType()
        address = ir.IntType(8).as_pointer()
        compiled = work.dispatcher.get_compile_result(called)
        context.active_code_library.add_linking_library(compiled.library)

        fields = ir.LiteralStructType([integer] * 2 + [value.type for value in inputs])
        # parts taken, parts failed, and the inputs: rows, share, arguments
        shared = numba.core.cgutils.alloca_once(builder, fields)

        def field(builder, shared, number):
            return builder.gep(shared, [ir.IntType(32)(0), ir.IntType(32)(number)])

        for number, value in enumerate([integer(0), integer(0), *inputs]):
            builder.store(value, field(builder, shared, number))

        unique = builder.module.get_unique_name("in_a_thread")
        function = ir.Function(builder.module, ir.FunctionType(void, [address]), unique)
        function.linkage = "internal"
        begin, take, do, fail, end = (
            function.append_basic_block(name) for name in ("begin", "take", "do", "fail", "end")
        )
        body = ir.IRBuilder(begin)
        own = body.bitcast(function.args[0], fields.as_pointer())
        last, step, packed = (body.load(field(body, own, number)) for number in (2, 3, 4))
        body.branch(take)
        body.position_at_end(take)
        part = body.atomic_rmw("add", field(body, own, 0), integer(1), "monotonic")
        start = body.mul(part, step)
        body.cbranch(body.icmp_signed("<", start, last), do, end)
        body.position_at_end(do)
        stop = body.add(start, step)
        stop = body.select(body.icmp_signed("<", stop, last), stop, last)
        unpacked = [body.extract_value(packed, i) for i in range(len(arguments.types))]
        status, _ = context.call_conv.call_function(
            body, context.declare_function(builder.module, compiled.fndesc),
            called.return_type, called.args, [part, start, stop, *unpacked],
        )  # fmt: skip
        body.cbranch(status.is_error, fail, take)
        body.position_at_end(fail)
        body.atomic_rmw("add", field(body, own, 1), integer(1), "monotonic")
        body.branch(take)
        body.position_at_end(end)
        body.ret_void()

        data = builder.bitcast(shared, address)
        if HAS_OPENMP:
            count = ir.IntType(32)
            kind = ir.FunctionType(void, [function.type, address, count, count])
            gomp = builder.module.globals.get(OPENMP) or ir.Function(builder.module, kind, OPENMP)
            builder.call(gomp, [function, data, builder.trunc(team, count), count(0)])
        else:
            builder.call(function, [data])
        return builder.load(field(builder, shared, 1))

    return numba.int64(work, *counts, arguments), generate


def _share_out(threads, rows, share, *arguments):
    return _in_threads(_work, threads, rows, share, arguments)  # noqa: F821


@cache
def _shared(work):
    """`_share_out` compiled for a loop, which it finds as its global `_work`.

    It is a function of its own, by whose name numba's cache knows it: a closure would be compiled
    in every process anew. The cache looks at the sources here: loops are functions of `kernels`.
    """
    scope = {"__name__": __name__, "_in_threads": _in_threads, "_work": work}
    function = FunctionType(_share_out.__code__, scope)
    module = work.py_func.__module__.rpartition(".")[2]
    function.__qualname__ = f"{module}.{work.py_func.__qualname__}_in_threads"
    return loop(function)


@intrinsic
def _ask(typing, address):
    """Have the memory at an address brought to the cache."""

    def generate(context, builder, signature, arguments):
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, *[ir.IntType(32)] * 3])
        function = builder.module.globals.get(FETCH) or ir.Function(builder.module, kind, FETCH)
        reading, first, data = (ir.IntType(32)(value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], byte), reading, first, data])
        return context.get_dummy_value()

    return numba.void(numba.int64), generate


@loop
def fetch(x, rows, columns, first, column):
    """Have a part of x, or what is behind it, brought to the cache while other work goes on."""
    for i in range(first, first + rows):
        start = x.ctypes.data + x.itemsize * (i * x.shape[1] + column)
        for offset in range(0, columns * x.itemsize, LINE):
            _ask(start + offset)
