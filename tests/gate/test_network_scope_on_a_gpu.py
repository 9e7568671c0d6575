"""On a GPU the same units are counted and cut, and once there is a threshold no device is waited for."""

from __future__ import annotations

import pytest
import torch

from regimewrap import CyclePolicy, GatePolicy, RegimeCycler, RegimePolicy, watch, wrap
from regimewrap.policy.strategies import Constant
from regimewrap.recipes.wide_resnet import WideResNet
from regimewrap.topk.reference import reaches
from regimewrap.topk.threshold import BINS, count_scores, threshold_at, threshold_gate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("after_relu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_counts_threshold_and_mask_are_those_of_the_cpu(dtype, after_relu):
    x = torch.randn(64, 999).to(dtype)
    x[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    counts = torch.zeros(BINS, dtype=torch.int64)
    there = counts.cuda()
    count_scores(x, counts, after_relu=after_relu)
    count_scores(x.cuda(), there, after_relu=after_relu)
    assert torch.equal(there.cpu(), counts)
    threshold = threshold_at(there, 0.2)
    assert threshold.cpu() == threshold_at(counts, 0.2)
    ratio, known = torch.tensor(0.2, dtype=torch.float64), torch.tensor(data=True)
    y = threshold_gate(x.cuda(), ratio, threshold, known).cpu()
    assert torch.equal(y != 0, reaches(x, float(threshold)) & (x != 0))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_training_step_waits_for_no_device_and_keeps_the_budget():
    model = wrap(WideResNet(10, 2), RegimePolicy(gate=GatePolicy(scope="network"))).cuda()
    cycler = RegimeCycler(model, CyclePolicy(full_share=0, strategy=Constant(keep_ratio=0.1)))
    x = torch.randn(32, 3, 32, 32, device="cuda")

    def step() -> None:
        model(x).square().mean().backward()
        cycler.step(torch.zeros((), device="cuda"))

    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with watch(model) as seen:
        step()
    assert seen.density == pytest.approx(0.1, rel=0.02)
