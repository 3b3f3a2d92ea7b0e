"""Numbers in compiled loops: as exact as they say."""

import numpy as np
import pytest
import torch
from fastelectra.kernels import cpu, cpu_gelu, cpu_numbers

if cpu.numba is None:
    pytest.skip("the loops need numba", allow_module_level=True)


def test_exponential_and_normal_distribution():
    x = np.linspace(-126, 0, 2001).astype(np.float32)
    power = np.array([cpu_numbers.exp2(value) for value in x])
    assert np.abs(power / np.exp2(x.astype(np.float64)) - 1).max() < 4e-7
    assert cpu_numbers.exp2(np.float32(-127)) == cpu_numbers.exp2(np.float32(-np.inf)) == 0
    z = np.linspace(-6, 6, 1201).astype(np.float32)
    below = np.array([cpu_gelu.normal(value)[0] for value in z])
    exact = torch.special.ndtr(torch.from_numpy(z).double()).numpy()
    assert np.abs(below - exact).max() < 3e-7


def test_rounding_to_bf16_is_that_of_pytorch():
    x = torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,))
    x[:4] = torch.tensor([torch.inf, -torch.inf, 0.0, 1 + 2.0**-8])
    ours = np.array([cpu_numbers.to_bf16(value) for value in x.numpy()])
    assert (ours == cpu.array(x.bfloat16())).all()
    assert cpu_numbers.to_bf16(np.float32(np.nan)) & 0x7FFF > 0x7F80
