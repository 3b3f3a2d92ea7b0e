"""Products inside compiled loops: exact, in each of the ways that this CPU has."""

import numpy as np
import pytest
import torch
from fastelectra.kernels import cpu, cpu_matmul
from fastelectra.kernels.cpu_operands import operand, take_along, take_down

numba = cpu.numba
if numba is None:
    pytest.skip("the loops need numba", allow_module_level=True)

WAYS = [("_add_in_vectors", torch.float32), ("_set_in_vectors", torch.float32)]
WAYS += [("_add_in_vectors", torch.bfloat16)] * bool(cpu.HAS_BF16)
WAYS += [(f"_{way}_in_tiles", torch.bfloat16) for way in ("add", "set") if cpu.HAS_AMX]


@pytest.mark.parametrize(("way", "dtype"), WAYS)
def test_products_in_loops_are_exact_and_forget_what_came_before(way, dtype):
    multiply = numba.njit(getattr(cpu_matmul, way), **cpu.OPTIONS)
    kept = 5 if way.startswith("_add") else 0

    @numba.njit(**cpu.OPTIONS)
    def product(out, c, c_turned, x, transposed, before):
        (rows, columns), depth, more = out.shape, len(x), len(before)
        total, right = operand(out, rows, columns), operand(x, more, columns)
        total[:] = np.float32(5)
        take_down(right, before, more, columns)
        take_down(right, x, depth, columns)
        if transposed:
            left = operand(c, more, rows)
            take_down(left, before, more, rows)
            take_down(left, c_turned, depth, rows)
        else:
            left = operand(c, rows, more)
            take_along(left, before, rows, more)
            take_along(left, c, rows, depth)
        multiply(total, left, 0, transposed, right, 0, rows, depth, columns)
        out[:] = total[:rows, :columns]

    random = np.random.default_rng(0)
    for rows, depth, columns in ((1, 1, 1), (33, 31, 7), (32, 64, 128), (70, 129, 65)):
        c, x = (random.integers(-9, 10, size) for size in ((rows, depth), (depth, columns)))
        out = np.empty((rows, columns), np.float32)
        numbers = [torch.from_numpy(a.copy()).to(dtype) for a in (c, c.T, x)]
        before = torch.full((200, 200), torch.nan, dtype=dtype)
        for transposed in (False, True):
            product(out, *map(cpu.array, numbers), transposed, cpu.array(before))
            assert (out == c @ x + kept).all(), (rows, depth, columns, transposed)
