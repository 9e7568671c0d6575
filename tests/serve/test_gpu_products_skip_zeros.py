"""The GPU's products against the reference: on a GPU where there is one, else through Triton's interpreter on the CPU.

The interpreter has to be chosen before Triton is imported, so without a GPU these tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from regimewrap.serve import reference
from regimewrap.serve.gpu import dispatch as gpu

pytest.importorskip("triton", reason="the kernels are compiled by Triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs_here = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in a process of its own")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="they run here")
def test_all_agree_through_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.count(".") > 10  # passed, not skipped


def drawn(rows: int, inputs: int, outputs: int, dtype: torch.dtype, density: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * inputs + outputs)
    x = torch.randn(rows, inputs, generator=generator)
    x[torch.rand(x.shape, generator=generator) >= density] = 0
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(outputs, generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def close(ours: torch.Tensor | None, right: torch.Tensor) -> bool:
    assert ours is not None
    ours, scale = ours.cpu(), right.double().abs().max().clamp(min=1e-6)
    return bool(((ours.double() - right.double()).abs().max() / scale) <= TOLERANCE[right.dtype])


@runs_here
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 7, 5), (1, 96, 300), (4, 200, 130)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_rows_are_added_up_as_the_reference_does(dtype, rows, inputs, outputs, density):
    x, weight, bias = drawn(rows, inputs, outputs, dtype, density)
    weight_t = weight.t().contiguous()
    for each in (bias, None):
        ours, found = gpu.linear(x.to(DEVICE), weight_t.to(DEVICE), None if each is None else each.to(DEVICE))
        assert close(ours, reference.rows(x, weight_t, each))
        assert found.tolist() == x.count_nonzero(1).tolist()


@runs_here
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_only_outputs_that_something_else_keeps_are_computed(dtype):
    x, weight, bias = drawn(3, 1100, 50, dtype, 1.0)
    active = drawn(3, 50, 1, dtype, 0.2)[0]
    active[1] = 0
    dense = x.double() @ weight.double().t() + bias.double()
    ours, _ = gpu.some_outputs(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), active.to(DEVICE))
    assert close(ours, dense.masked_fill(active == 0, 0).to(dtype))
    assert ours is not None
    assert bool((ours.cpu() == 0)[active == 0].all())


@runs_here
def test_what_is_not_a_number_is_no_zero():
    x, weight, bias = drawn(2, 40, 30, torch.float32, 0.3)
    x[0, 3] = torch.nan
    y, _ = gpu.linear(x.to(DEVICE), weight.t().contiguous().to(DEVICE), bias.to(DEVICE))
    assert y is not None
    assert bool(y[0].isnan().all())
    assert not bool(y[1].isnan().any())


def test_more_rows_or_longer_ones_than_pay_are_left_to_the_dense_layer():
    assert not gpu.serves(5, 64, torch.float16)
    assert not gpu.serves(1, 1 << 16, torch.float16)
    assert not gpu.serves(1, 64, torch.float64)
    assert not gpu.serves(0, 64, torch.float16)
