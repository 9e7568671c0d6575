"""Every way to a compiled CPU kernel against the reference, and what happens when there is none."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from regimewrap import topk
from regimewrap.topk import op
from regimewrap.topk.cpu import dispatch as cpu
from regimewrap.topk.op import topk_gate
from regimewrap.topk.reference import kept
from regimewrap.topk.selection import INTEGERS, Selection, memory_rows

pytest.importorskip("numba", reason="the kernels are compiled by numba")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CONTENTS = {
    "normal": lambda x: x,
    "relu": torch.relu,
    "one value": lambda x: x * 0 + 0.3,
    "two values": lambda x: (x > 0).float() - 0.5,
    "few values": lambda x: (2 * x).round(),
    "mostly zero": lambda x: torch.where(x > 2.5, x, 0),
    "wide": lambda x: x**15,
    "tiny": lambda x: x * 1e-42,
    "with infinities": lambda x: torch.where(x.abs() > 2, x / 0.0, x),
    "with NaN": lambda x: torch.where(x > 2, x * torch.nan, torch.where(x < -2, -x * torch.nan, x)),
    "sorted": lambda x: x.flatten().sort().values.view(x.shape),
}


def ratio(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.fixture(scope="module", autouse=True)
def kernels_for_all_sizes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_WORTH_LOADING", 1)
        yield
    assert cpu.KERNELS.usable, "a kernel failed and the plain path answered in its place"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = INTEGERS[a.dtype][0]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def agrees(x: torch.Tensor, keep_ratio: float, **selection: object) -> bool:
    x = x.detach().requires_grad_()
    upstream = torch.randn(x.shape).to(x.dtype)
    y = topk_gate(x, ratio(keep_ratio), **selection)
    (grad,) = torch.autograd.grad(y, x, upstream)
    mask = kept(x, keep_ratio, **selection)
    return same_bits(y, torch.where(mask, x, 0)) and same_bits(grad, torch.where(mask, upstream, 0))


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_agree(dtype, content):
    x = CONTENTS[content](torch.randn(3, 9001, generator=torch.Generator().manual_seed(0))).to(dtype)
    for keep_ratio in (1e-9, 0.01, 0.2, 0.5, 0.9, 0.9999):
        for score in ("magnitude", "value"):
            assert agrees(x, keep_ratio, score=score)
    assert agrees(x, 0.3, ties="exact")
    assert agrees(x, 0.3, relative_to="active", score="value")


@given(
    st.data(),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(CONTENTS)),
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.floats(0.001, 0.999),
    st.integers(0, 2**31),
)
def test_any_shape_and_layout_agrees(data, dtype, content, shape, keep_ratio, seed):
    x = CONTENTS[content](torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    order = data.draw(st.permutations(range(x.dim())))
    x = x.permute(order)
    if data.draw(st.booleans()):
        x = x[..., 1:]
    if x.numel() == 0:
        return
    assert agrees(
        x,
        keep_ratio,
        scope=data.draw(st.sampled_from(["sample", "position", "batch"])),
        channel_dim=data.draw(st.integers(-x.dim(), x.dim() - 1)),
        score=data.draw(st.sampled_from(["magnitude", "value"])),
        relative_to=data.draw(st.sampled_from(["all", "active"])),
        ties=data.draw(st.sampled_from(["keep", "exact"])),
    )


@pytest.mark.parametrize("shape", [(2, 5, 11, 13), (3, 64, 9, 9), (1, 700, 7, 7), (2, 3, 70, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ties", ["keep", "exact"])
def test_channels_of_an_image_compete_in_either_memory_format(shape, memory_format, ties):
    for content in ("normal", "few values"):
        x = CONTENTS[content](torch.randn(shape)).to(memory_format=memory_format)
        assert agrees(x, 0.3, scope="position", ties=ties)


@pytest.mark.parametrize("shape", [(16, 5000), (17, 4999), (3, 50000), (9, 13, 700), (1, 200000)])
def test_threads_share_rows_without_changing_a_bit(shape, monkeypatch):
    threads = torch.get_num_threads()
    x = torch.randn(shape)
    try:
        torch.set_num_threads(1)
        alone = [topk_gate(x, ratio(0.2), scope=scope) for scope in ("sample", "position", "batch")]
        monkeypatch.setattr(cpu, "_GRAIN", 1000)
        torch.set_num_threads(3)
        together = [topk_gate(x, ratio(0.2), scope=scope) for scope in ("sample", "position", "batch")]
        assert agrees(x, 0.2)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, alone, together))


def test_python_threads_that_gate_at_once_do_not_disturb_each_other(monkeypatch):
    monkeypatch.setattr(cpu, "_GRAIN", 1000)
    tensors = [torch.randn(16, 5000) for _ in range(8)]
    alone = [topk_gate(x, ratio(0.2)) for x in tensors]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                together = list(pool.map(lambda x: topk_gate(x, ratio(0.2)), tensors))
                assert all(map(torch.equal, alone, together))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scope", ["sample", "position", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_is_made_in_either_memory_format(memory_format, scope, dtype):
    x = torch.randn(4, 16, 8, 8).to(dtype).to(memory_format=memory_format)

    with Allocations(x) as forward:
        y, bits = op._gate(x, ratio(0.3), None, scope, 1, "magnitude", "all", "keep", 1.0, "mask")
    with Allocations(x, bits) as backward:
        grad = op._masked(x, bits, y.stride())

    assert y.stride() == grad.stride() == x.stride()
    assert sorted(forward.by_storage.values()) == [bits.nbytes, y.nbytes]
    assert list(backward.by_storage.values()) == [grad.nbytes]


class Allocations(TorchDispatchMode):
    """Notes the bytes of every storage that operations return, except those of the tensors given."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.by_storage: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function(*args, **(kwargs or {}))
        if isinstance(returned, torch.Tensor) and returned.nbytes > 8:
            storage = returned.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.by_storage[storage.data_ptr()] = storage.nbytes()
        return returned


def test_rows_that_no_kernel_counts_are_selected_in_torch_after_one_warning(monkeypatch):
    monkeypatch.setattr(cpu, "_TOO_LONG", 100)
    cpu._tell_of_long_rows.cache_clear()
    with pytest.warns(RuntimeWarning, match="among 100 units or more"):
        assert agrees(torch.randn(2, 100), 0.2)
    assert agrees(torch.randn(2, 100), 0.2, ties="exact")  # a second warning would be an error
    assert agrees(torch.randn(2, 99), 0.2)
    cpu._tell_of_long_rows.cache_clear()


def test_more_than_two_to_the_31_elements_are_served_if_their_rows_are_shorter():
    wide, long = (torch.empty(shape, device="meta") for shape in ((2**16, 2**16), (1, 2**31)))
    assert memory_rows(wide, Selection()) == (2**16, 2**16, 1)
    assert memory_rows(wide, Selection(scope="position", channel_dim=0)) == (1, 2**16, 2**16)
    assert memory_rows(wide, Selection(scope="batch")) == (1, 2**32, 1)
    assert memory_rows(long, Selection()) == (1, 2**31, 1)
    assert cpu._TOO_LONG == 2**31  # for these two the test above holds


def _gate_in_child(queue: multiprocessing.Queue) -> None:
    # Not through autograd: torch refuses that in a fork of a process whose backward passes have had threads.
    x, upstream = torch.randn(4, 5000), torch.randn(4, 5000)
    cpu._GRAIN = 1000
    torch.get_num_threads = lambda: 2  # said, not set: OpenMP's own threads hang in a fork
    mask = kept(x, 0.2)
    y, bits = op._gate(x, ratio(0.2), None, *Selection(), 1.0, "mask")
    grad = op._masked(upstream, bits, x.stride())
    queue.put(same_bits(y, torch.where(mask, x, 0)) and same_bits(grad, torch.where(mask, upstream, 0)))


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_gates_with_threads_of_its_own(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(cpu, "_GRAIN", 1000)
    try:
        torch.set_num_threads(2)
        assert agrees(torch.randn(4, 5000), 0.2)
    finally:
        torch.set_num_threads(threads)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_gate_in_child, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr(cpu.KERNELS, "module", None)
    monkeypatch.setattr(cpu.KERNELS, "usable", True)
    monkeypatch.delitem(sys.modules, "regimewrap.topk.cpu.kernels", raising=False)
    monkeypatch.delattr(topk.cpu, "kernels", raising=False)


@pytest.mark.usefixtures("unloaded")
def test_without_numba_plain_torch_answers_after_one_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    x = torch.randn(2, 50)

    with pytest.warns(RuntimeWarning, match=r"numba is not installed; run `pip install -e '\.\[fast\]'`") as seen:
        assert agrees(x, 0.2)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agrees(x, 0.2)


@pytest.mark.usefixtures("unloaded")
def test_a_kernel_that_does_not_build_is_replaced_after_one_warning(monkeypatch):
    def broken(*_: object) -> None:
        raise OSError("no space left on device\nand more")

    kernels = SimpleNamespace(gate_blocks=broken, mask_gradient=broken)
    monkeypatch.setattr(cpu.KERNELS, "module", kernels)
    x = torch.randn(2, 50)

    with pytest.warns(RuntimeWarning, match=r"slower \(OSError: no space left on device\)") as seen:
        assert agrees(x, 0.2)
    assert len(seen) == 1


@pytest.mark.usefixtures("unloaded")
def test_a_switched_off_compiler_is_not_interpreted(monkeypatch):
    import numba

    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    with pytest.warns(RuntimeWarning, match="NUMBA_DISABLE_JIT"):
        assert agrees(torch.randn(2, 50), 0.2)


@pytest.mark.usefixtures("unloaded")
def test_a_toy_does_not_load_the_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "_WORTH_LOADING", 1000)
    assert agrees(torch.randn(2, 50), 0.2)
    assert cpu.KERNELS.module is None
