"""What is packed comes back bit for bit, by the compiled way and by the plain one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regimewrap.topk import cpu, gpu_packing
from regimewrap.topk.packed import Packed, Signs

INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
both_ways = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])


@pytest.fixture
def way(compiled, monkeypatch):
    monkeypatch.setattr(cpu, "_WORTH_LOADING", 0)
    monkeypatch.setattr(cpu.KERNELS, "usable", compiled)


def memory(dtype: torch.dtype, n: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(n, generator=generator).to(dtype)
    flat[torch.rand(n, generator=generator) >= density] = 0
    special = torch.tensor([-0.0, float("nan"), float("inf"), float("-inf")], dtype=dtype)
    flat[: min(n, 4)] = special[: min(n, 4)]
    return flat


def bits(flat: torch.Tensor) -> torch.Tensor:
    return flat.contiguous().view(INTEGERS[flat.dtype])


@both_ways
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_memory_comes_back_bit_for_bit(dtype):
    @settings(deadline=None)  # the first call compiles
    @given(st.integers(1, 9000), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 9))
    def holds(n, density, seed):
        flat = memory(dtype, n, density, seed)
        before = flat.clone()
        packed = Packed(flat)
        packed.settle()
        assert torch.equal(bits(packed.unpack()), bits(before))

    holds()


@both_ways
@pytest.mark.usefixtures("way")
def test_sparse_memory_takes_a_bit_an_element_and_its_values(compiled):
    del compiled
    packed = Packed(memory(torch.float32, 80_000, 0.1))
    packed.settle()
    tensors = [each for each in vars(packed).values() if isinstance(each, torch.Tensor)]
    count = int((packed.unpack().view(torch.int32) != 0).sum())
    assert sum(each.untyped_storage().nbytes() for each in tensors) <= 10_000 + 4 * count + 8 * 30


@both_ways
@pytest.mark.usefixtures("way")
def test_dense_memory_stays_where_it_is(compiled):
    del compiled
    flat = torch.ones(5000)
    packed = Packed(flat)
    packed.settle()
    assert packed.unpack() is flat


@both_ways
@pytest.mark.usefixtures("way")
def test_zeros_take_no_values(compiled):
    del compiled
    packed = Packed(torch.zeros(5000, dtype=torch.float64))
    packed.settle()
    assert torch.equal(packed.unpack(), torch.zeros(5000, dtype=torch.float64))


@both_ways
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_signs_are_where_a_relu_passes_its_gradient(dtype):
    flat = memory(dtype, 4099, 0.5)
    passed = torch.ops.aten.threshold_backward(torch.ones_like(flat), flat, 0)
    assert torch.equal(Signs(flat).unpack(), passed)


def test_several_threads_pack_the_same(monkeypatch):
    flat = memory(torch.float32, 300_000, 0.1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    packed = Packed(flat)
    packed.settle()
    cpu._pool.cache_clear()
    assert torch.equal(bits(packed.unpack()), bits(flat))


def test_memory_that_was_unpacked_is_let_go_when_other_memory_is():
    first, second = (Packed(memory(torch.float32, 5000, 0.1, seed)) for seed in (1, 2))
    first.settle()
    second.settle()
    assert first.unpack() is first.unpack()
    second.unpack()
    assert first._unpacked is None


KERNELS_IN_THE_INTERPRETER = """
import torch
from regimewrap.topk import gpu_packing, plain

for dtype, integer in ((torch.float16, torch.int16), (torch.float32, torch.int32), (torch.float64, torch.int64)):
    for n in (1, 8, 4095, 4096, 9001):
        flat = torch.randn(n).to(dtype)
        flat[torch.rand(n) > 0.2] = 0
        flat[0] = -0.0
        bits = torch.full(((n + 7) // 8,), 255, dtype=torch.uint8)
        counts = gpu_packing.note_nonzero(flat, bits)
        assert torch.equal(bits, plain.pack_bits(flat.view(integer) != 0))
        starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        values, out = flat.new_empty(int(starts[-1])), torch.empty_like(flat)
        assert gpu_packing.gather_nonzero(flat, values, starts)
        assert gpu_packing.scatter_nonzero(bits, values, starts, out)
        assert torch.equal(out.view(integer), flat.view(integer))
print("same")
"""


def test_the_kernels_for_gpus_do_the_same_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "error::RuntimeWarning:regimewrap", "-c", KERNELS_IN_THE_INTERPRETER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr


def test_gpu_kernels_that_do_not_build_are_given_up_with_one_warning(monkeypatch):
    monkeypatch.setattr(gpu_packing.KERNELS, "usable", True)
    monkeypatch.setitem(sys.modules, "regimewrap.topk.triton_packing", None)
    monkeypatch.setattr(gpu_packing.KERNELS, "module", None)
    flat = torch.zeros(8)
    with pytest.warns(RuntimeWarning, match="in plain torch: same results"):
        assert gpu_packing.note_nonzero(flat, torch.empty(1, dtype=torch.uint8)) is None
    assert not gpu_packing.gather_nonzero(flat, flat, flat)
