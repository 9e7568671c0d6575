"""Every way to a compiled CPU kernel against the reference, and what happens when there is none."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regimewrap import topk
from regimewrap.topk import cpu
from regimewrap.topk.op import topk_gate
from regimewrap.topk.reference import kept

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
    assert cpu._state["usable"], "a kernel failed and the plain path answered in its place"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = cpu._INTEGERS[a.dtype][0]
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
@settings(max_examples=300, deadline=None)
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


def _gate_in_child(queue: multiprocessing.Queue) -> None:
    x = torch.randn(4, 5000)
    cpu._GRAIN = 1000
    queue.put(agrees(x, 0.2))


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
    child = context.Process(target=_gate_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr(cpu, "_state", {"kernels": None, "usable": True})
    monkeypatch.delitem(sys.modules, "regimewrap.topk.numba_kernels", raising=False)
    monkeypatch.delattr(topk, "numba_kernels", raising=False)


@pytest.mark.usefixtures("unloaded")
def test_without_numba_plain_torch_answers_after_one_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    x = torch.randn(2, 50)

    with pytest.warns(RuntimeWarning, match=r"numba is not installed; run: pip install 'regimewrap\[fast\]'") as seen:
        assert agrees(x, 0.2)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agrees(x, 0.2)


@pytest.mark.usefixtures("unloaded")
def test_a_kernel_that_does_not_build_is_replaced_after_one_warning(monkeypatch):
    def broken(*_: object) -> None:
        raise OSError("no space left on device\nand more")

    kernels = SimpleNamespace(gate_rows=broken, gate_positions=broken, mask_gradient=broken)
    monkeypatch.setitem(cpu._state, "kernels", kernels)
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
    assert cpu._state["kernels"] is None
