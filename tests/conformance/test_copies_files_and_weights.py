"""Copies, files, state dicts, dtypes, memory formats and devices, in any order with wrap and unwrap."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from specimens import POLICY, WRITINGS, Hooked, bare, by_hand, gradients, wrapped
from torch import nn
from torch.optim.swa_utils import AveragedModel

from regimewrap import RegimeCycler, RegimePolicy, gate_of, unwrap, verify, wrap

every_writing = pytest.mark.parametrize("make", WRITINGS)

READ = """
import json, pickle, sys, torch
from regimewrap import gate_of, unwrap, verify
import specimens
found = {}
for name in ("Hooked", "Traced", "Rewritten"):
    model = pickle.load(open(f"{name}.pickle", "rb"))
    saved = torch.load(f"{name}.pt", weights_only=False)
    x, expected, dense = torch.load(f"{name}.expected.pt")
    copied = gate_of(saved)
    copied.set_keep_ratio(0.5)
    facts = {
        "ratio": float(gate_of(model).keep_ratio),
        "pickle": torch.equal(model(x), expected),
        "escaped": verify(model, x).escaped,
        "independent": float(copied.keep_ratio) == 0.5 and float(gate_of(model).keep_ratio) != 0.5,
        "policy": gate_of(model).policy == specimens.POLICY,
        "class": type(model).__name__,
    }
    copied.set_keep_ratio(0.3)
    facts["save"] = torch.equal(saved(x), expected)
    unwrap(saved)
    facts["unwrapped"] = type(saved) is getattr(specimens, name) and torch.equal(saved(x), dense)
    weights = specimens.wrapped(getattr(specimens, name))
    weights.load_state_dict(torch.load(f"{name}.weights.pt"), strict=True)
    facts["weights"] = torch.equal(weights(x), expected)
    found[name] = facts
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def read_elsewhere(tmp_path_factory):
    """What a process of its own found in files written here."""
    folder = tmp_path_factory.mktemp("files")
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for make in WRITINGS:
        model = wrapped(make)
        with torch.no_grad():
            model.hidden.bias.add_(0.1)
            dense = copy.deepcopy(model)
            torch.save((x, model(x), unwrap(dense)(x)), folder / f"{make.__name__}.expected.pt")
        (folder / f"{make.__name__}.pickle").write_bytes(pickle.dumps(model))
        torch.save(model, folder / f"{make.__name__}.pt")
        torch.save(model.state_dict(), folder / f"{make.__name__}.weights.pt")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", READ], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@every_writing
@pytest.mark.parametrize("way", ["pickle", "save", "weights"])
def test_a_fresh_process_computes_the_same_from_a_file(make, way, read_elsewhere):
    assert read_elsewhere[make.__name__][way]


@every_writing
def test_a_fresh_process_finds_the_gate_with_its_ratio_and_policy(make, read_elsewhere):
    facts = read_elsewhere[make.__name__]
    assert facts["ratio"] == 0.3
    assert facts["policy"]
    assert facts["independent"]
    assert facts["escaped"] == []
    assert facts["class"] == make.__name__


@every_writing
def test_a_fresh_process_can_unwrap_what_it_read(make, read_elsewhere):
    assert read_elsewhere[make.__name__]["unwrapped"]


@every_writing
def test_a_copy_stays_gated_when_the_original_is_unwrapped_and_the_other_way_round(make, x):
    expected, dense = by_hand(bare(make), x), bare(make)(x)
    model = wrapped(make)
    twin = copy.deepcopy(model)
    unwrap(model)
    assert torch.equal(model(x), dense)
    torch.testing.assert_close(twin(x), expected)
    wrap(model, POLICY)
    gate_of(model).set_keep_ratio(0.3)
    unwrap(twin)
    assert torch.equal(twin(x), dense)
    torch.testing.assert_close(model(x), expected)


@every_writing
def test_a_copy_of_a_copy_and_of_an_unwrapped_model_are_what_they_look_like(make, x):
    model = wrapped(make)
    again = copy.deepcopy(copy.deepcopy(model))
    gate_of(again).set_keep_ratio(0.1)
    assert gate_of(model).keep_ratio == 0.3
    torch.testing.assert_close(again(x), by_hand(bare(make), x, 0.1))
    plain = copy.deepcopy(unwrap(model))
    assert type(plain) is make
    assert torch.equal(plain(x), bare(make)(x))


@every_writing
def test_state_dicts_load_strictly_in_both_directions_and_into_copies(make, x):
    other = bare(make)
    with torch.no_grad():
        other.conv.weight.mul_(2)
    model = wrapped(make)
    model.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(model(x), by_hand(other, x))
    plain = bare(make)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(x), other(x))
    twin = copy.deepcopy(wrapped(make))
    twin.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert torch.equal(twin(x), model(x))


@every_writing
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_wrapped_model_changes_its_dtype(make, dtype, x):
    model = wrapped(make).to(dtype)
    y = model(x.to(dtype))
    assert y.dtype == dtype
    assert gate_of(model).keep_ratio.dtype == torch.float64
    assert torch.equal(y, by_hand(bare(make).to(dtype), x.to(dtype)))
    assert all(each is None or each.dtype == dtype for each in gradients(model, model(x.to(dtype))).values())


@every_writing
def test_half_and_bfloat16_may_come_before_wrap(make, x):
    for convert in (nn.Module.half, nn.Module.bfloat16):
        model = wrap(convert(bare(make)), POLICY)
        gate_of(model).set_keep_ratio(0.3)
        dtype = model.conv.weight.dtype
        assert torch.equal(model(x.to(dtype)), by_hand(convert(bare(make)), x.to(dtype)))


@every_writing
def test_autocast_leaves_the_site_the_dtype_that_it_had(make, x):
    model, seen = wrapped(make), []
    gate_of(model).observers.append(lambda site, before, after: seen.append((before.dtype, after.dtype)))  # noqa: ARG005
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert len(seen) == 2
    assert all(before == after for before, after in seen)


@every_writing
def test_channels_last_goes_through_every_image_site(make, x):
    model = wrapped(make).to(memory_format=torch.channels_last)
    seen = []
    gate_of(model).observers.append(lambda site, before, after: seen.append(after))  # noqa: ARG005
    y = model(x.to(memory_format=torch.channels_last))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, by_hand(bare(make), x))


@every_writing
@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
def test_a_model_on_the_meta_device_is_wrapped_and_then_loaded(make, assign, x):
    with torch.device("meta"):
        model = make().eval()
    wrap(model, POLICY)
    assert model(x.to("meta")).is_meta
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(bare(make).state_dict(), strict=True, assign=assign)
    gate_of(model).set_keep_ratio(0.3)
    torch.testing.assert_close(model(x), by_hand(bare(make), x))


@every_writing
def test_wrapping_under_a_default_device_leaves_the_ratio_on_the_host(make):
    with torch.device("meta"):
        model = wrap(make(), POLICY)
    assert gate_of(model).keep_ratio.device.type == "cpu"
    gate_of(model).set_keep_ratio(0.3)
    assert gate_of(model).keep_ratio == 0.3


@every_writing
def test_an_averaged_copy_keeps_the_ratio_it_was_made_at_until_it_is_bound(make, x):
    model = wrapped(make)
    averaged = AveragedModel(model)
    gate_of(model).set_keep_ratio(0.6)
    assert gate_of(averaged).keep_ratio == 0.3
    assert gate_of(averaged) is not gate_of(model)
    cycler = RegimeCycler(model, RegimePolicy.preset("sawtooth", total_steps=100).replace(cycle={"every": 1}))
    cycler.bind(averaged)
    for _ in range(5):
        averaged.update_parameters(model)
        cycler.step()
    assert gate_of(averaged).keep_ratio == gate_of(model).keep_ratio == cycler.keep_ratio
    torch.testing.assert_close(averaged.eval()(x), by_hand(bare(make), x, cycler.keep_ratio))


@every_writing
def test_wrapping_in_eval_mode_and_training_afterwards_updates_batchnorm(make, x):
    model, plain = wrapped(make, 1.0), bare(make)
    for each in (model, plain):
        each.train()(x)
    assert model.training
    assert model.norm.num_batches_tracked == 1
    assert torch.equal(model.norm.running_mean, plain.norm.running_mean)


def test_a_part_of_a_model_saved_alone_stays_gated(tmp_path):
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 10), nn.ReLU())))
    gate_of(model).set_keep_ratio(0.1)
    torch.save(model[1], tmp_path / "part.pt")
    part = torch.load(tmp_path / "part.pt", weights_only=False)
    assert gate_of(part).keep_ratio == 0.1
    assert (part(torch.randn(1, 4)) != 0).sum() <= 1


def test_verify_works_on_copies(x):
    coverage = verify(copy.deepcopy(wrapped(Hooked)), x)
    assert coverage.gated == ("act", "act2")
    assert not coverage.escaped
