"""A failure injected at each step of wrapping leaves the model bit for bit as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from specimens import Hooked, Rewritten, Traced
from torch import fx, nn

from regimewrap import TopKGate, unwrap, wrap
from regimewrap import wrap as wrapping
from regimewrap.gate.gate import find_gate
from regimewrap.rewrite import exchange, graph, runtime, share

SHARED = nn.ReLU()


class Everything(nn.Module):
    """A site for every mechanism, and everything that wrap takes special care of."""

    def __init__(self) -> None:
        super().__init__()
        self.hooked, self.traced, self.rewritten = Hooked(), Traced(), Rewritten()
        self.graph = fx.symbolic_trace(nn.Sequential(nn.Linear(5, 5), nn.SiLU()))
        self.code = fx.symbolic_trace(Calls())
        self.shared = SHARED
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.acts = nn.ModuleList([nn.ReLU(), nn.ReLU(inplace=True)])

    def forward(self, x):
        x = self.hooked(x) + self.traced(x) + self.rewritten(x)
        x = self.code(self.shared(self.graph(x)))
        for act in self.acts:
            x = act(x - 0.1)
        return self.encoder(x[:, None, :4])


class Calls(nn.Module):
    def forward(self, x):
        return F.gelu(x + 1)


STEPS = [
    (share, "_own_copy"),
    (runtime, "attach_hook"),
    (nn.Module, "register_forward_hook"),
    (runtime, "attach_sites"),
    (runtime.Sites, "__init__"),
    (runtime, "put_in_place"),
    (exchange._Exchange, "admit"),
    (exchange, "forget_compiled"),
    (graph, "gate_graph_module"),
    (graph, "insert_gate_nodes"),
    (fx.GraphModule, "recompile"),
    (TopKGate, "anchor"),
]


def everything() -> nn.Module:
    torch.manual_seed(0)
    model = Everything().eval()
    model.hooked.act.register_forward_hook(keep)
    return model


def keep(module, args, output):
    """A user's hook."""


def picture(model: nn.Module) -> list[object]:
    """Return all that wrap might touch, in a form that can be compared."""
    seen: list[object] = [name for name, _ in model.named_modules()]
    for module in model.modules():
        hooks = [dict(module._forward_hooks), dict(module._forward_pre_hooks), dict(module._forward_hooks_with_kwargs)]
        seen += [id(module), type(module), sorted(vars(module)), module.training, hooks]
        if isinstance(module, fx.GraphModule):
            seen += [module.code, str(module.graph)]
    return seen


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """The encoder warns about nested tensors."""


def inject(monkeypatch, owner, name, place) -> list[int]:
    """Make the call at ``place`` fail, and no other; return the list that counts calls."""
    real, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == place + 1:
            raise MemoryError("injected")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return calls


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
@pytest.mark.parametrize(
    "place", [*(pytest.param(place, marks=pytest.mark.slow) for place in ("first", "middle")), "last"]
)
def test_a_failure_at_any_step_leaves_everything_as_it_was(owner, name, place, monkeypatch):
    model, x = everything(), torch.randn(2, 3, 8, 8)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    before = picture(model)
    with monkeypatch.context() as patch:
        calls = inject(patch, owner, name, -1)
        wrap(model)
        steps = len(calls)
        unwrap(model)
    assert steps, "wrap does not take this step"
    assert picture(model) == before
    with monkeypatch.context() as patch:
        inject(patch, owner, name, {"first": 0, "middle": steps // 2, "last": steps - 1}[place])
        with pytest.raises(MemoryError, match="injected"):
            wrap(model)
    assert picture(model) == before
    assert find_gate(model) is None
    assert not SHARED._forward_hooks
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    wrap(model)


@pytest.mark.parametrize("name", ["_compare", "watched"])
def test_a_failure_after_wrapping_with_example_inputs_leaves_everything_as_it_was(name, monkeypatch):
    model, x = everything(), torch.randn(2, 3, 8, 8)
    before = picture(model)
    monkeypatch.setitem(wrapping.__globals__, name, lambda *_, **__: (_ for _ in ()).throw(MemoryError("injected")))
    with pytest.raises(MemoryError, match="injected"):
        wrap(model, example_inputs=x)
    assert picture(model) == before
