"""The GPU's kernels against the reference: on a GPU where there is one, else through Triton's interpreter on the CPU.

The interpreter has to be chosen before Triton is imported, so without a GPU these tests run in a process of their own.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regimewrap import topk
from regimewrap.topk import plain
from regimewrap.topk.gpu import dispatch as gpu
from regimewrap.topk.op import topk_gate
from regimewrap.topk.reference import kept
from regimewrap.topk.selection import INTEGERS, Selection, full_rows

relu_gate = functools.partial(topk_gate, after_relu=True)

pytest.importorskip("triton", reason="the kernels are compiled by Triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs_here = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in a process of its own")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CONTENTS = {
    "normal": lambda x: x,
    "relu": torch.relu,
    "one value": lambda x: x * 0 + 0.3,
    "two values": lambda x: (x > 0).float() - 0.5,
    "few values": lambda x: (2 * x).round(),
    "mostly zero": lambda x: torch.where(x > 2.5, x, 0),
    "signed zeros": lambda x: torch.where(x.abs() > 1, x, x * 0),
    "tiny": lambda x: x * 1e-42,
    "with infinities": lambda x: torch.where(x.abs() > 2, x / 0.0, x),
    "with NaN": lambda x: torch.where(x > 2, x * torch.nan, torch.where(x < -2, -x * torch.nan, x)),
    "all NaN": lambda x: x * torch.nan,
    "sorted": lambda x: x.flatten().sort().values.view(x.shape),
    "striped": lambda x: x * (torch.arange(x.numel()).view(x.shape) % 32 == 7),
}


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="they run here")
def test_all_agree_through_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.count(".") > 50  # passed, not skipped


@pytest.fixture(autouse=True)
def no_kernel_gives_up():
    gpu._launch.cache_clear()  # made with other limits
    yield
    gpu._launch.cache_clear()
    assert gpu.KERNELS.usable, "a kernel failed and the plain path answered in its place"


def gated(x: torch.Tensor, keep_ratio: float, selection: Selection) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the kernel made of ``x``, and the mask that it packed."""
    y = torch.full_like(x, 7)
    bits = torch.full(((x.numel() + 7) // 8,), 0xAA, dtype=torch.uint8, device=x.device)
    assert gpu.gate(x, y, bits, keep_ratio, selection)
    mask = torch.empty_like(y, dtype=torch.bool)
    mask.as_strided((x.numel(),), (1,)).copy_(plain.unpack_bits(bits, x.numel()))
    return y, mask


def agrees(x: torch.Tensor, keep_ratio: float, **rule: object) -> bool:
    selection = Selection(**rule)
    positive = rule.get("score") == "positive"
    ranked = torch.relu(x) if positive else x
    expected = kept(ranked, keep_ratio, **{**rule, "score": "value" if positive else selection.score})
    y, mask = gated(x.to(DEVICE), keep_ratio, selection)
    nothing = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    again = torch.full_like(y, 7)
    if DEVICE == "cpu":
        again.copy_(y)
    else:
        assert gpu.gate(x.to(DEVICE), again, nothing, keep_ratio, selection)
    right = torch.where(expected, ranked, 0)
    integer = INTEGERS[x.dtype][0]
    same = torch.equal(again.cpu().contiguous().view(integer), y.cpu().contiguous().view(integer))
    y = y.cpu()
    if positive:
        values = torch.equal(y.nan_to_num(), right.nan_to_num()) and torch.equal(y.isnan(), right.isnan())
    else:
        values = torch.equal(y.contiguous().view(integer), right.contiguous().view(integer))
    # A zero that a ReLU made may be kept or cut: nothing shows it.
    bits = (
        torch.equal(mask.cpu() | (right == 0), expected | (right == 0))
        if positive
        else torch.equal(mask.cpu(), expected)
    )
    return same and values and bits and y.stride() == x.stride()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# The interpreter takes a third of a second a call, so there a rule is tried with some contents only.
RULES = [
    *[(ratio, {"score": score}) for ratio in (1e-9, 0.2, 0.5, 0.9999) for score in ("magnitude", "value", "positive")],
    (0.3, {"relative_to": "active", "score": "value"}),
    (0.3, {"relative_to": "active", "score": "positive"}),
]
CASES = [(dtype, content) for content in CONTENTS for dtype in DTYPES]


def rules(case: int) -> list[tuple[float, dict[str, object]]]:
    return RULES if DEVICE == "cuda" else [RULES[case % len(RULES)]]


@runs_here
@pytest.mark.parametrize("case", range(len(CASES)) if DEVICE == "cuda" else range(0, len(CASES), 2))
def test_rows_that_fit_on_chip_agree(case):
    dtype, content = CASES[case]
    x = CONTENTS[content](draw(3, 1500)).to(dtype)
    for keep_ratio, rule in rules(case):
        assert agrees(x, keep_ratio, **rule)
    if DEVICE == "cuda" or case % 8 == 0:
        assert agrees(x, 0.3, ties="exact")


@runs_here
@pytest.mark.parametrize("case", range(len(CASES)) if DEVICE == "cuda" else range(1, len(CASES), 3))
def test_longer_rows_agree(case, monkeypatch):
    monkeypatch.setattr(gpu, "_ON_CHIP", 1)
    monkeypatch.setattr(gpu, "_SAMPLES", ((1, 256),))
    monkeypatch.setattr(gpu, "_BLOCK", 1024)
    dtype, content = CASES[case]
    x = CONTENTS[content](draw(2, 4500 if case % 2 else 4507)).to(dtype)
    for keep_ratio, rule in rules(case):
        assert agrees(x, keep_ratio, **rule)
    if DEVICE == "cuda" or case % 8 == 1:
        assert agrees(x, 0.3, ties="exact")


@runs_here
def test_a_sample_that_misleads_does_not_change_the_result(monkeypatch):
    monkeypatch.setattr(gpu, "_ON_CHIP", 1)
    monkeypatch.setattr(gpu, "_SAMPLES", ((1, 128),))
    monkeypatch.setattr(gpu, "_BLOCK", 1024)
    x = draw(2, 8192).abs()
    drawn = torch.arange(128)
    shift = ((drawn * 2654435769) % 2**32 >> 8) % 64
    x[0, drawn * 64 + shift] += 100  # the sample sees only large units
    x[1, drawn * 64 + shift] = 0  # or only zeros
    for keep_ratio in (0.001, 0.01, 0.1, 0.5) if DEVICE == "cuda" else (0.01,):
        assert agrees(x, keep_ratio)
        assert agrees(x, keep_ratio, relative_to="active")


@runs_here
@pytest.mark.parametrize("shape", [(2, 24, 5, 8), (2, 24, 5, 7), (3, 70, 9), (1, 1, 3, 3), (5, 9), (4, 8, 1, 1)])
def test_positions_agree_in_both_memory_formats(shape):
    x = (4 * draw(*shape)).round()
    for ties in ("keep", "exact") if DEVICE == "cuda" else (["keep", "exact"][len(shape) % 2],):
        assert agrees(x, 0.3, scope="position", channel_dim=1, ties=ties)
        assert agrees(x, 0.3, scope="position", channel_dim=-1, ties=ties)
        if x.dim() == 4:
            last = x.to(memory_format=torch.channels_last)
            assert agrees(last, 0.3, scope="position", channel_dim=1, ties=ties)
            assert agrees(last, 0.3, scope="position", channel_dim=-1, ties=ties)


@runs_here
@settings(max_examples=100 if DEVICE == "cuda" else 10, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(CONTENTS)),
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.floats(0.001, 0.999),
    st.sampled_from(["sample", "batch", "position"]),
    st.sampled_from(["magnitude", "value", "positive"]),
    st.sampled_from(["all", "active"]),
    st.sampled_from(["keep", "exact"]),
)
def test_any_small_tensor_agrees(dtype, content, shape, keep_ratio, scope, score, relative_to, ties):
    x = CONTENTS[content](draw(*shape)).to(dtype)
    assert agrees(x, keep_ratio, scope=scope, score=score, relative_to=relative_to, ties=ties)


@runs_here
@pytest.mark.parametrize("update", [0, 1])
@pytest.mark.parametrize("scope", ["sample", "position", "batch"])
@pytest.mark.parametrize("score", ["magnitude", "positive"])
def test_dense_rows_are_copied_and_the_others_agree(scope, score, update):
    for x in (draw(5, 8, 3, 4), draw(5, 16, 2, 3).to(memory_format=torch.channels_last).half()):
        x = x.to(DEVICE)
        selection, full = Selection(scope=scope, score=score), full_rows(x.shape, Selection(), 0.5, update)
        y, bits = torch.full_like(x, 7), torch.full((x.numel() // 8,), 0xAA, dtype=torch.uint8, device=x.device)
        assert gpu.gate(x, y, bits, 0.3, selection, full)
        ranked = (torch.relu(x) if score == "positive" else x).cpu()
        expected = kept(ranked, 0.3, scope=scope, full_share=0.5, update=update)
        right = torch.where(expected, ranked, 0)
        mask = torch.empty_like(y, dtype=torch.bool)
        mask.as_strided((x.numel(),), (1,)).copy_(plain.unpack_bits(bits, x.numel()))
        assert torch.equal(y.cpu(), right)
        assert torch.equal(mask.cpu() | (right == 0), expected | (right == 0))


@runs_here
def test_dense_rows_whose_bits_share_a_byte_with_others_or_lie_scattered_are_left_to_plain_torch():
    x = draw(4, 3).to(DEVICE)
    y, bits = torch.full_like(x, 7), torch.zeros(2, dtype=torch.uint8, device=x.device)
    assert not gpu.gate(x, y, bits, 0.3, Selection(), (0, 2))
    assert gpu.gate(x, y, bits[:0], 0.3, Selection(), (0, 2))
    scattered = draw(8, 4).to(DEVICE).t()
    assert not gpu.gate(scattered, torch.empty_like(scattered), bits[:0], 0.3, Selection(scope="batch"), (0, 2))


@runs_here
def test_channels_last_rows_need_no_copy():
    x = draw(3, 16, 6, 6).to(memory_format=torch.channels_last)
    assert agrees(x, 0.2)
    assert agrees(x.half(), 0.2, score="positive")


@runs_here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 8, 1023, 5000])
def test_the_gradient_is_masked_with_the_bits(dtype, n):
    grad = draw(n).to(dtype).to(DEVICE)
    mask = draw(n).to(DEVICE) > 0
    out = torch.full_like(grad, 7)
    assert gpu.mask_gradient(grad, plain.pack_bits(mask), out)
    assert torch.equal(out, torch.where(mask, grad, 0))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("shape", [(4, 64, 32, 32), (2, 64, 112, 112), (8, 197, 192), (3, 100_003)])
def test_the_operator_on_a_gpu_equals_itself_on_the_cpu(shape):
    for dtype in DTYPES:
        x, upstream = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        for keep_ratio in (0.5, 0.2, 0.01):
            for gate in (topk_gate, relu_gate):
                results = []
                for device in ("cpu", "cuda"):
                    leaf = x.to(device).requires_grad_()
                    y = gate(leaf, torch.tensor(keep_ratio, dtype=torch.float64))
                    results.append((y.cpu(), torch.autograd.grad(y, leaf, upstream.to(device))[0].cpu()))
                assert torch.equal(results[0][0], results[1][0])
                assert torch.equal(results[0][1], results[1][1])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_nothing_waits_for_the_device():
    x = torch.randn(4, 64, 32, 32, device="cuda", requires_grad=True)
    r = torch.tensor(0.2, dtype=torch.float64)
    (topk_gate(x, r).sum() + relu_gate(x, r).sum()).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for scope in ("sample", "batch", "position"):
            for relative_to in ("all", "active"):
                (topk_gate(x, r, scope=scope, relative_to=relative_to).sum() + relu_gate(x, r).sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_kernel_that_does_not_build_gives_one_warning_and_the_plain_result(monkeypatch):
    monkeypatch.setattr(gpu.KERNELS, "usable", True)
    monkeypatch.setattr(gpu.KERNELS, "module", SimpleNamespace(NOTHING=0, BYTES=3))
    x = draw(2, 64)
    y, nothing = torch.empty_like(x), torch.empty(0, dtype=torch.uint8)
    with pytest.warns(RuntimeWarning, match="plain torch"):
        assert not gpu.gate(x, y, nothing, 0.5, Selection())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gpu.gate(x, y, nothing, 0.5, Selection())


def test_a_missing_triton_is_told_of_once(monkeypatch):
    kernels = gpu.KERNELS
    monkeypatch.setattr(kernels, "module", None)
    monkeypatch.setattr(kernels, "usable", True)
    monkeypatch.delitem(sys.modules, "regimewrap.topk.gpu.kernels", raising=False)
    monkeypatch.delattr(topk.gpu, "kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(RuntimeWarning, match="triton is not installed; run `pip install triton`"):
        assert kernels.get() is None
    assert kernels.get() is None  # a second warning would be an error


def test_rows_that_no_kernel_counts_are_told_of(monkeypatch):
    monkeypatch.setattr(gpu, "_TOO_LONG", 100)
    gpu._tell_of_long_rows.cache_clear()
    with pytest.warns(RuntimeWarning, match="among 100 units or more"):
        assert gpu._launch((2, 100), (100, 1), torch.float32, False, Selection()) is None
    assert (
        gpu._launch((3, 100), (100, 1), torch.float32, False, Selection()) is None
    )  # a second warning would be an error
    gpu._tell_of_long_rows.cache_clear()
