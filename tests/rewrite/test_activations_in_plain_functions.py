"""Activations in plain functions that methods call: gated in a copy, while the function itself stays as it is."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import helper_functions as helpers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from regimewrap import GatePolicy, RegimePolicy, SitePolicy, at_keep_ratio, gate_of, plan, unwrap, verify, wrap
from regimewrap.errors import UnreachableSiteError
from regimewrap.topk.op import topk_gate

POSITION = RegimePolicy(gate=GatePolicy(scope="position"))


@pytest.fixture
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def bare(make):
    torch.manual_seed(0)
    return make()


def wrapped(make, ratio=0.3, policy=None):
    model = wrap(bare(make), policy)
    gate_of(model).set_keep_ratio(ratio)
    return model


def kept(value, **rule):
    return topk_gate(value, torch.tensor(0.3, dtype=torch.float64), **{"scope": "sample"} | rule)


def gradients(model, output):
    return torch.autograd.grad((output * output.detach().cos()).sum(), list(model.parameters()))


def assert_same(one, other):
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("make", helpers.CALLERS)
def test_at_full_budget_every_bit_is_the_bare_models(make, x):
    model, dense = wrapped(make, 1.0), bare(make)
    assert torch.equal(model(x), dense(x))
    assert_same(gradients(model, model(x)), gradients(dense, dense(x)))


@pytest.mark.parametrize("make", helpers.CALLERS)
def test_nothing_escapes_and_unwrap_leaves_nothing(make, x):
    model = wrapped(make)
    coverage = verify(model, x)
    assert coverage.gated
    assert not coverage.escaped, coverage
    assert not coverage.idle, coverage
    assert not torch.equal(model(x), bare(make)(x))
    unwrap(model)
    assert type(model) is make
    assert model.__dict__.keys() == bare(make).__dict__.keys()
    assert torch.equal(model(x), bare(make)(x))


def test_the_gate_is_right_behind_the_activation(x):
    nested = wrapped(helpers.CallsNested)
    hidden = kept(F.gelu(nested.linear(x)))
    expected = kept(F.silu(2.0 * kept(F.relu(hidden)) + 1))
    assert torch.equal(nested(x), expected)
    relu = wrapped(helpers.CallsRelu)
    assert torch.equal(relu(x), 3.0 * kept(F.relu(relu.linear(x))))


@pytest.mark.parametrize("make", helpers.CALLERS)
def test_the_function_itself_and_other_models_stay_as_they_are(make, x):
    before = {name: (value, value.__code__) for name, value in vars(helpers).items() if hasattr(value, "__code__")}
    other = bare(make)
    expected = other(x)
    wrapped(make, 0.1)(x)
    assert {
        name: (value, value.__code__) for name, value in vars(helpers).items() if hasattr(value, "__code__")
    } == before
    assert torch.equal(other(x), expected)


def test_the_plan_names_method_function_and_activation():
    rows = {row.name: row for row in plan(bare(helpers.CallsNested))}
    assert set(rows) == {"forward.gelu", "forward.nested.of_relu.relu", "forward.nested.plain.silu"}
    assert {row.mechanism for row in rows.values()} == {"source"}


def test_the_name_of_an_activation_is_followed_from_the_caller():
    model = bare(helpers.CallsDecorated)
    [row] = plan(model)
    assert row.activation.kind == "silu"
    model.activation = "tanh"
    [row] = plan(model)
    assert row.activation.kind == "tanh"
    assert not row.gated


def test_a_site_can_be_excluded_or_scaled_by_its_name(x):
    policy = RegimePolicy(sites=SitePolicy(exclude=["*.plain.*", "forward.gelu"], multipliers={"*.of_relu.relu": 2.0}))
    model = wrapped(helpers.CallsNested, policy=policy)
    hidden = kept(F.relu(F.gelu(model.linear(x))), multiplier=2.0)
    assert torch.equal(model(x), F.silu(2.0 * hidden + 1))


@pytest.mark.parametrize("make", helpers.CALLERS)
def test_copies_and_files_stay_gated(make, x):
    model = wrapped(make)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for other in (copy.deepcopy(model), loaded, pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(other(x), expected)
        assert gate_of(other) is not gate_of(model)
        assert type(unwrap(other)) is make


def test_a_fresh_process_computes_the_same_from_a_file(x, tmp_path):
    model = wrapped(helpers.CallsNested)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[1:]\n"
        "model, x, expected = torch.load('model.pt', weights_only=False)\n"
        "assert torch.equal(model(x), expected)"
    )
    roots = [str(Path(__file__).parent), *sys.path]
    run = subprocess.run(
        [sys.executable, "-c", code, *roots], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_tracebacks_show_the_lines_of_the_functions():
    model = wrapped(helpers.CallsDecorated)
    model.activation = "unheard of"
    with pytest.raises(KeyError) as caught:
        model(torch.randn(2, 8))
    [frame] = [each for each in traceback.extract_tb(caught.value.__traceback__) if each.name == "decorated"]
    assert frame.filename == helpers.__file__
    assert frame.line == "x = ACTIVATIONS[activation](x)"


@pytest.mark.parametrize("make", helpers.CALLERS)
def test_one_compiled_graph_serves_every_ratio(make, x):
    torch.compiler.reset()
    model = wrapped(make)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ratio in (1.0, 0.5, 0.2):
        gate_of(model).set_keep_ratio(ratio)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same(reentrant, x):
    model = wrapped(helpers.CallsNested)
    expected = gradients(model, model(x))
    x.requires_grad_()
    output = checkpoint(model, x, use_reentrant=reentrant)
    (output * output.detach().cos()).sum().backward()
    assert_same([each.grad for each in model.parameters()], expected)


@pytest.mark.parametrize(("make", "why"), [(helpers.CallsFused, "fused kernel"), (helpers.CallsInspected, "decorator")])
def test_a_decorator_that_may_do_something_else_is_reported(make, why, x):
    model = bare(make)
    expected = model(x)
    with pytest.raises(UnreachableSiteError, match=why):
        wrap(model)
    assert torch.equal(model(x), expected)
    assert type(model) is make


def test_another_function_in_the_place_of_the_planned_one_is_called(x, monkeypatch):
    held, named = wrapped(helpers.HoldsFunction), wrapped(helpers.CallsPlain)
    held.act = lambda value, extra: value + extra
    monkeypatch.setattr(helpers, "plain", torch.neg)
    assert torch.equal(held(x), held.linear(x) + 2)
    assert torch.equal(named(x), -named.linear(x))


def test_a_function_that_calls_itself_is_reported():
    with pytest.raises(UnreachableSiteError, match="counting_down calls itself"):
        wrap(bare(helpers.CallsItself))


def test_a_function_that_no_file_could_name_is_reported():
    def local(x):
        return F.gelu(x)

    class Local(helpers.Base):
        def forward(self, x):
            return local(self.linear(x))

    with pytest.raises(UnreachableSiteError, match="top level of a module"):
        wrap(Local())


def test_what_else_a_method_does_is_gated_without_an_unreachable_function(x):
    class Both(helpers.Base):
        def forward(self, x):
            return helpers.fused(F.gelu(self.linear(x)))

    with pytest.warns(UserWarning, match="fused"):
        model = wrap(Both(), strict=False)
    with at_keep_ratio(model, 0.3):
        assert torch.equal(model(x), F.silu(kept(F.gelu(model.linear(x)))))


class TestMixer:
    @pytest.fixture
    def tokens(self):
        return torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1))

    def test_channels_are_found_in_the_function(self, tokens):
        model = wrapped(helpers.Mixer, policy=POSITION)
        [site] = gate_of(model).sites
        assert (site.name, site.channel_dim) == ("forward.convolved.ACTIVATIONS", 1)
        assert not verify(model, tokens).escaped

    def test_a_prefix_does_not_see_later_tokens(self, tokens):
        model = wrapped(helpers.Mixer, policy=POSITION)
        later = torch.cat([tokens[:, :6], tokens[:, 6:].flip(0)], 1)
        assert torch.equal(model(tokens)[:, :6], model(later)[:, :6])
        assert not torch.equal(model(tokens)[:, 6:], model(later)[:, 6:])

    def test_an_optional_factor_is_left_alone_and_can_be_included(self, tokens):
        rows = {row.name: row for row in plan(bare(helpers.Mixer), POSITION)}
        assert "may be left out" in rows["forward.scan.silu"].why
        policy = POSITION.replace(sites=SitePolicy(include=["forward.scan.silu"]))
        model = wrapped(helpers.Mixer, policy=policy)
        assert gate_of(model).sites[0].channel_dim == 1
        later = torch.cat([tokens[:, :6], tokens[:, 6:].flip(0)], 1)
        assert torch.equal(model(tokens)[:, :6], model(later)[:, :6])

    def test_without_a_hint_about_the_channels_it_is_not_guessed(self):
        class Hidden(helpers.Mixer):
            def forward(self, x):
                mixed = self.in_proj(x).movedim(1, 2)
                return helpers.plain(mixed)

        with pytest.raises(UnreachableSiteError, match=r"gate\.channel_dim"):
            wrap(bare(Hidden), POSITION)
        with pytest.warns(UserWarning, match="channel_dim"), pytest.raises(Exception, match="no activation"):
            wrap(bare(Hidden), POSITION, strict=False)


class MadeInForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.name = nn.Linear(8, 8), "silu"

    def forward(self, x):
        x = nn.ReLU()(self.linear(x))
        return helpers.ACTIVATIONS[self.name](x - 0.1)


def test_activations_made_in_the_method_are_gated(x):
    model = wrapped(MadeInForward)
    assert [site.name for site in gate_of(model).sites] == ["forward.ReLU", "forward.ACTIVATIONS"]
    assert torch.equal(model(x), kept(F.silu(kept(F.relu(model.linear(x))) - 0.1)))
    assert not verify(model, x).escaped
