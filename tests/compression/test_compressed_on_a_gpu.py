"""On a GPU the same holds, the allocator sees it, and only the count of what is to be stored is waited for."""

from __future__ import annotations

import pytest
import torch

import regimewrap
from regimewrap import compressed_activations, gate_of
from regimewrap.recipes.wide_resnet import WideResNet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    model = regimewrap.wrap(WideResNet(16, 2).cuda())
    gate_of(model).set_keep_ratio(0.1)
    return model


def forward(model, x, compressed):
    if not compressed:
        return model(x)
    with compressed_activations(model):
        return model(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_the_same_bit_for_bit_on_a_gpu(model, dtype):
    found = []
    x = torch.randn(8, 3, 32, 32, device="cuda")
    for compressed in (False, True):
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            forward(model, x, compressed).float().square().mean().backward()
        found.append([p.grad.view(torch.int32) for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_allocator_holds_less_between_forward_and_backward(model):
    x, held = torch.randn(32, 3, 32, 32, device="cuda"), []
    for compressed in (False, False, True):
        before = torch.cuda.memory_allocated()
        output = forward(model, x, compressed)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        del output
    assert held[2] < 0.55 * held[1]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_the_host_waits_for_counts_only(model):
    x = torch.randn(8, 3, 32, 32, device="cuda")
    for mode in ("default", "error"):  # the first pass loads kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            forward(model, x, compressed=True).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
