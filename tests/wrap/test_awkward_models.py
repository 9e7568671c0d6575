"""Models that share, fuse, generate, or hide their activations."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regimewrap import GatePolicy, RegimePolicy, at_keep_ratio, gate_of, plan, unwrap, verify, wrap
from regimewrap.errors import UnreachableSiteError, WrapError

SHARED = nn.ReLU()


class UsesShared(nn.Module):
    def __init__(self, act: nn.Module = SHARED) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)
        self.act = act

    def forward(self, x):
        return self.act(self.linear(x))


class Settings:
    def __init__(self):
        self.act = nn.ReLU()


class HoldsAMethodOfItself(nn.GELU):
    """As GELUActivation in transformers."""

    def __init__(self):
        super().__init__()
        self.act = self._compute
        self.register_forward_pre_hook(self._before)

    def _compute(self, x):
        return super().forward(x)

    def _before(self, module, args):
        pass

    def forward(self, x):
        return self.act(x)


def test_an_activation_that_models_share_is_gated_in_one_only():
    one, other = UsesShared(), UsesShared()
    x = torch.randn(3, 4)
    expected = other(x)
    gate_of(wrap(one)).set_keep_ratio(0.1)
    assert torch.equal(other(x), expected)
    assert not SHARED._forward_hooks
    assert (one(x) != 0).sum() <= 3
    unwrap(one.eval())
    assert one.act is SHARED
    assert not SHARED.training
    SHARED.train()


def test_a_model_built_later_from_the_shared_activation_is_not_gated():
    gate_of(wrap(UsesShared())).set_keep_ratio(0.1)
    late = UsesShared()
    x = torch.randn(3, 4)
    assert torch.equal(late(x), F.relu(late.linear(x)))


def test_an_activation_that_settings_hold_is_not_touched():
    settings = Settings()
    model = UsesShared()
    model.act = settings.act
    gate_of(wrap(model)).set_keep_ratio(0.1)
    assert not settings.act._forward_hooks
    assert (model(torch.randn(3, 4)) != 0).sum() <= 3


def test_an_activation_that_is_shared_is_found_after_a_garbage_collector_was_frozen():
    gc.freeze()
    try:
        wrap(UsesShared())
    finally:
        gc.unfreeze()
    assert not SHARED._forward_hooks


def test_an_activation_that_a_variable_or_itself_refers_to_is_the_models_own(monkeypatch):
    model = UsesShared()
    model.act = mine = HoldsAMethodOfItself()
    model.acts = [mine]
    wrap(model)
    assert model.act is mine
    assert mine._forward_hooks
    unwrap(model)
    del mine
    monkeypatch.setattr(gc, "get_referrers", lambda *_: pytest.fail("walked all objects"))
    wrap(model)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("act", ["relu", "gelu", nn.ReLU(), F.silu], ids=["relu", "gelu", "module", "silu"])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_encoder_is_gated_in_eval_too_and_bit_exact_when_dense(act, masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation=act)
    model = nn.TransformerEncoder(layer, 2).eval()
    bare = copy.deepcopy(model)
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False, False, False, True, True], [False] * 5]) if masked else None
    wrap(model, RegimePolicy(gate=GatePolicy(scope="position", eval_keep_ratio="current")))
    with torch.no_grad():
        expected = bare(x, src_key_padding_mask=mask)
        assert torch.equal(model(x, src_key_padding_mask=mask), expected)
        gate_of(model).set_keep_ratio(0.2)
        fused = model(x, src_key_padding_mask=mask)
        assert not torch.equal(fused, expected)
        coverage = verify(model, x, src_key_padding_mask=mask)
        assert len(coverage.gated) == 2
        assert not coverage.escaped
    with torch.enable_grad():
        plain = model(x, src_key_padding_mask=mask)
    keep = ~mask if masked else torch.ones(2, 5, dtype=torch.bool)
    # torch's attention itself rounds differently with and without gradients
    torch.testing.assert_close(plain[keep], fused[keep])
    unwrap(model)
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=mask), expected)


def test_activations_inside_recurrent_layers_are_reported():
    assert plan(nn.Sequential(nn.LSTM(4, 4), nn.ReLU())).rows[0].why == "tanh is not among sites.kinds"
    with pytest.raises(UnreachableSiteError, match="RNN computes it inside torch"):
        wrap(nn.Sequential(nn.RNN(4, 4, nonlinearity="relu", batch_first=True), nn.ReLU()))
    with pytest.warns(UserWarning, match="RNN computes it inside torch"):
        wrap(nn.Sequential(nn.RNN(4, 4, nonlinearity="relu", batch_first=True), nn.ReLU()), strict=False)


class Causal(UsesShared):
    is_causal = True


def test_a_causal_model_with_sample_scope_is_warned_about():
    with pytest.warns(UserWarning, match=r"later tokens, frames.*position"):
        wrap(Causal())
    wrap(Causal(), RegimePolicy(gate=GatePolicy(scope="position")))
    wrap(Causal(), RegimePolicy(gate=GatePolicy(scope="network")))  # its threshold comes from an earlier step


def test_example_inputs_find_what_the_plan_cannot_see():
    class Hidden(UsesShared):
        def forward(self, x):
            function = vars(F)["re" + "lu"]
            return self.act(function(self.linear(x)))

    model = Hidden()
    with pytest.raises(UnreachableSiteError, match=r"relu \(it ran, but the code does not show"):
        wrap(model, example_inputs=torch.randn(2, 4))
    assert not any("regimewrap" in name for name in model.__dict__)
    with pytest.warns(UserWarning, match=r"relu \(it ran, but the code does not show"):
        wrap(model, example_inputs=(torch.randn(2, 4),), strict=False)


def test_example_inputs_leave_no_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout())
    state = copy.deepcopy(model.state_dict())
    before = torch.get_rng_state()
    wrap(model, example_inputs={"input": torch.randn(2, 4, generator=torch.Generator())})
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_that_is_random_on_its_own_is_refused_with_example_inputs():
    class Noise(UsesShared):
        calls = 0

        def forward(self, x):
            Noise.calls += 1
            return super().forward(x) + Noise.calls

    model = Noise()
    with pytest.raises(WrapError, match="output at full budget"):
        wrap(model, example_inputs=torch.randn(2, 4))
    unwrap(wrap(model))


def test_a_replaced_forward_is_seen_by_verify():
    model = wrap(nn.Sequential(nn.Linear(4, 4), UsesShared()))
    model[1].forward = lambda x: x
    assert verify(model, torch.randn(1, 4)).idle == ("1.act",)


def test_a_shared_part_of_two_models_is_told_apart():
    trunk = UsesShared()
    wrap(trunk)
    whole = nn.Sequential(trunk, nn.Linear(8, 2))
    assert gate_of(whole) is gate_of(trunk)
    with at_keep_ratio(whole, 0.1):
        assert (trunk(torch.randn(3, 4)) != 0).sum() <= 3
