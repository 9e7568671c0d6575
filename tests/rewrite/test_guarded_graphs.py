"""Methods that branch on plain attributes: one graph for each combination met, and never the wrong one."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode

import regimewrap
from regimewrap import at_keep_ratio, gate_of, plan, unwrap, verify, wrap
from regimewrap.rewrite import guarded, rebind
from regimewrap.topk.op import topk_gate


class Drops(nn.Module):
    def __init__(self, p=0.5) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.p = p

    def forward(self, x):
        return F.dropout(F.relu(self.linear(x)), self.p, self.training)


class Branches(nn.Module):
    """Everything that is accepted, in one method."""

    def __init__(self, mode="relu", scale=2.0, sizes=(2, 4), residual=None) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.ModuleList([nn.LayerNorm(8)])
        self.shift = nn.Parameter(torch.linspace(-1, 1, 8))
        self.mode, self.scale, self.sizes, self.residual = mode, scale, sizes, residual

    def forward(self, x, shift=1):
        y = self.linear(x) * self.scale + self.shift
        if self.training and not (self.mode == "plain" or self.scale > 9) and self.sizes[0] < 3:
            y = F.relu(y) + F.gelu(y) if self.residual is None else y
        elif self.mode in ("gelu", "silu"):
            y = F.gelu(y) if self.mode == "gelu" else F.silu(y)
        else:
            y = self.norm[0](torch.relu(y))
        return (F.relu(y + shift) if self.residual is None else y).reshape(-1, self.sizes[1])


class Auxiliary(nn.Module):
    """As in GoogLeNet: a second head and a second output in train mode only."""

    def __init__(self, aux_logits=True) -> None:
        super().__init__()
        self.stem, self.aux, self.head = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.aux_logits = aux_logits

    def forward(self, x):
        x = F.relu(self.stem(x))
        aux = F.silu(x)
        if self.training and self.aux_logits:
            aux = self.aux(F.gelu(aux - 0.1))
            return self.head(x), aux
        return self.head(x)


class Scales(nn.Module):
    def __init__(self, scale=1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = scale

    def forward(self, x):
        return F.relu(self.linear(x)) / self.scale


COMBINATIONS = [
    (Drops, {"p": 0.5}),
    (Drops, {"p": 0.0}),
    (Branches, {}),
    (Branches, {"sizes": (3, 8)}),
    (Branches, {"mode": "gelu", "residual": 1}),
    (Branches, {"mode": "silu", "scale": 3}),
    (Branches, {"mode": "plain", "scale": -0.0}),
    (Auxiliary, {}),
    (Auxiliary, {"aux_logits": False}),
    (Scales, {"scale": float("inf")}),
]


@pytest.fixture
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def traces(monkeypatch):
    """The combinations that are traced from now on, by the titles of their graphs."""
    titles, real = [], guarded.trace_method

    def counting(module, title, *args):
        titles.append(title)
        return real(module, title, *args)

    monkeypatch.setattr(guarded, "_GRAPHS", {})
    monkeypatch.setattr(guarded, "trace_method", counting)
    # Classes that were rewritten in another test hold the graphs of that one.
    rebind._subclass.cache_clear()
    yield titles
    rebind._subclass.cache_clear()


def make(cls, **attributes):
    torch.manual_seed(0)
    return cls(**attributes)


def run(model, x, ratio=None):
    """Outputs and gradients of one seeded pass."""
    model.zero_grad()
    torch.manual_seed(1)
    if ratio is None:
        y = model(x)
    else:
        with at_keep_ratio(model, ratio):
            y = model(x)
    ys = y if isinstance(y, tuple) else (y,)
    (sum(each.sum() for each in ys) + 0 * sum(p.sum() for p in model.parameters())).backward()
    return [*ys, *(p.grad for p in model.parameters() if p.grad is not None)]


def equal(ones, others):
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def graph_runs(model, x) -> bool:
    """Whether a pass goes through generated code rather than through the source."""
    seen = []

    class Look(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.extend(frame.filename for frame in traceback.extract_stack() if "regimewrap>" in frame.filename)
            return func(*args, **(kwargs or {}))

    with Look():
        model(x)
    return bool(seen)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("cls", "attributes"), COMBINATIONS)
def test_every_combination_is_a_graph_that_is_bit_exact_at_full_budget(cls, attributes, training, x):
    bare, model = make(cls, **attributes).train(training), make(cls, **attributes)
    assert {row.mechanism for row in plan(model)} == {"graph"}
    wrap(model).train(training)
    assert graph_runs(model, x)
    assert equal(run(model, x, 1.0), run(bare, x))


@pytest.mark.parametrize(("cls", "attributes"), COMBINATIONS[:-1])
def test_every_combination_is_gated_as_its_source_is(cls, attributes, x, monkeypatch):
    model = wrap(make(cls, **attributes))
    traced = [run(model.train(mode), x, 0.3) for mode in (True, False)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # which leaves the graphs aside
    written = [run(model.train(mode), x, 0.3) for mode in (True, False)]
    assert all(map(equal, traced, written))
    assert not all(
        equal(each, run(model.train(mode), x, 1.0)) for each, mode in zip(traced, (True, False), strict=True)
    )


def test_train_and_eval_follow_the_mode_whatever_mode_it_was_wrapped_in(x):
    for training in (True, False):
        model = wrap(make(Drops).train(training))
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


def test_toggling_back_and_forth_traces_each_combination_once(x, traces):
    model = wrap(make(Drops))
    assert traces == ["Drops.forward with p=0.5, training=True", "Drops.forward with p=0.5, training=False"]
    for _ in range(3):
        model.train()(x)
        model.eval()(x)
    assert len(traces) == 2
    for p in (0.1, 0.5, 0.1):
        model.p = p
        model(x)
    assert traces[2:] == ["Drops.forward with p=0.1, training=False"]


def test_a_class_is_traced_once_for_all_its_instances_and_copies(x, traces):
    model = wrap(nn.Sequential(*[make(Drops) for _ in range(5)]))
    unwrap(model)
    twin = copy.deepcopy(wrap(model))
    twin(x)
    assert len(traces) == 2


def test_a_changed_attribute_takes_effect(x):
    bare, model = make(Scales), wrap(make(Scales))
    for scale in (3.0, 0.5, 3.0):
        bare.scale = model.scale = scale
        assert equal(run(model, x), run(bare, x))


def test_instances_with_different_values_do_not_mix(x):
    bare = nn.Sequential(make(Scales, scale=2.0), make(Scales, scale=0.5), make(Scales, scale=4))
    model = wrap(copy.deepcopy(bare))
    assert {row.mechanism for row in plan(bare)} == {"graph"}
    assert equal(run(model, x), run(bare, x))


class Tells(nn.Module):
    """Its output tells values that are equal from each other."""

    def __init__(self, value=1) -> None:
        super().__init__()
        self.value = value

    def forward(self, x):
        y = F.relu(x)
        if self.value is True:
            return y * 2
        if self.value != self.value:
            return y * 3
        if self.value in ("1", (1,), (True,)):
            return y * 5
        return y / self.value


@pytest.mark.parametrize("first", [1, True, 1.0, 0.0])
def test_equal_values_of_different_kinds_are_told_apart(first, x):
    bare, model = Tells(first), wrap(Tells(first))
    nan = float("nan")
    for value in (True, 1, 1.0, "1", 0.0, -0.0, nan, -nan, float("-inf"), (1,), (True,)):
        bare.value = model.value = value
        assert torch.equal(model(x).nan_to_num(7), bare(x).nan_to_num(7)), value
        assert graph_runs(model, x)


class Integer(int):
    def __rtruediv__(self, other):
        return other * 100


@pytest.mark.parametrize(
    "value", [torch.tensor(2.0), Integer(2), 2j, torch.ones(8)], ids=["0-d", "subclass", "complex", "tensor"]
)
def test_a_value_of_another_kind_goes_by_the_source(value, x):
    bare, model = make(Scales), wrap(make(Scales))
    model.scale = 2
    model(x)
    bare.scale = model.scale = value
    assert torch.equal(model(x), bare(x))
    assert not graph_runs(model, x)
    with at_keep_ratio(model, 0.1), regimewrap.watch(model) as seen:
        model(x)
    assert seen.bound == 1
    model.scale = 1.0
    assert graph_runs(model, x)


def test_an_attribute_that_became_a_parameter_or_a_list_is_read_as_it_is(x):
    bare, model = make(Scales), wrap(make(Scales))
    for each in (bare, model):
        del each.scale
        each.scale = nn.Parameter(torch.full((8,), 2.0))
    assert equal(run(model, x), run(bare, x))
    model, bare = wrap(make(Branches)), make(Branches)
    model.sizes = bare.sizes = [2, 4]
    assert equal(run(model, x), run(bare, x))


def test_a_deleted_attribute_raises_what_the_model_itself_raises(x):
    model = wrap(make(Scales))
    del model.scale
    with pytest.raises(AttributeError, match="'Scales' object has no attribute 'scale'"):
        model(x)
    model.scale = 1.0
    assert torch.equal(model(x), make(Scales)(x))


def test_an_attribute_in_a_branch_that_is_not_taken_may_be_missing(x):
    model = wrap(make(Auxiliary))
    del model.aux_logits
    assert torch.equal(model.eval()(x), make(Auxiliary).eval()(x))


class Cut(nn.Module):
    def __init__(self, size=4) -> None:
        super().__init__()
        self.size = size

    def forward(self, x):
        y = F.relu(x)
        return y * (8 / self.size)


def test_a_combination_that_cannot_be_traced_raises_what_the_model_itself_raises(x):
    model = wrap(Cut())
    model.size = 0
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(x)
    model.size = 8
    assert torch.equal(model(x), F.relu(x))


def test_what_cannot_be_traced_in_one_mode_goes_by_the_source(x):
    class Half(Cut):
        def forward(self, x):
            y = F.relu(x)
            if self.training:
                y = y * (8 / self.size)
            return y

    model = Half(0)
    assert {row.mechanism for row in plan(model)} == {"source"}
    assert torch.equal(wrap(model).eval()(x), F.relu(x))


def test_an_attribute_that_changes_all_the_time_stops_being_traced(x, traces):
    bare, model = make(Scales), wrap(make(Scales))
    for step in range(100):
        bare.scale = model.scale = 1.0 + step
        assert torch.equal(model(x), bare(x))
    assert len(traces) == guarded._MOST_GRAPHS


def test_a_child_that_was_replaced_is_the_one_that_runs(x):
    bare, model = make(Branches).eval(), wrap(make(Branches)).eval()
    torch.manual_seed(5)
    bare.linear = model.linear = nn.Linear(8, 8)
    bare.norm[0] = model.norm[0] = nn.LayerNorm(8, elementwise_affine=False)
    for scale in (2.0, 5.0):  # one combination that was met before, and one that was not
        bare.scale = model.scale = scale
        assert torch.equal(model(x), bare(x))


def swapped(x, inplace=False):  # noqa: ARG001  a trace names all arguments
    return x * 2 if isinstance(x, torch.Tensor) else x  # a trace would see something else than a tensor


def test_a_function_that_was_replaced_is_not_traced_through(x, monkeypatch):
    bare, model = make(Scales), wrap(make(Scales))
    monkeypatch.setattr(F, "relu", swapped)
    for scale in (1.0, 13.0):
        bare.scale = model.scale = scale
        assert torch.equal(model(x), bare(x))


class Twice(nn.Module):
    """One child under two names."""

    def __init__(self, p=0.0) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(8, 8)
        self.p = p

    def forward(self, x):
        return F.dropout(F.relu(self.second(self.first(x))), self.p, self.training)


def test_a_child_with_two_names_is_called_by_the_name_in_the_method(x):
    model = wrap(make(Twice))
    model.second = nn.Identity()
    assert torch.equal(model(x), F.relu(model.first(x)))


def test_an_unused_activation_is_not_passed_on(x):
    """Unlike an in-place one, whose input is what code goes on with."""
    model = wrap(make(Auxiliary)).eval()
    with at_keep_ratio(model, 0.1), regimewrap.watch(model) as seen:
        y = model(x)
        expected = model.head(topk_gate(F.relu(model.stem(x)), gate_of(model).keep_ratio))
    assert set(seen.by_site) == {"forward.relu", "forward.silu"}
    assert torch.equal(y, expected)


class DropsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x = self.linear(x)
        y = F.relu(x, inplace=True)
        return y if self.training else x


def test_a_mode_that_drops_an_in_place_activation_goes_by_the_source(x):
    bare, model = make(DropsInPlace), make(DropsInPlace)
    assert {row.mechanism for row in plan(model)} == {"source"}
    wrap(model)
    for mode in (True, False):
        assert equal(run(model.train(mode), x, 1.0), run(bare.train(mode), x))


class OnInput(Scales):
    def forward(self, x, mask=None):
        y = F.relu(x)
        return y if mask is None else y * mask


class OnBoth(Scales):
    def forward(self, x):
        y = F.relu(x)
        return y if self.training and x.sum() > 0 else -y


class OnChild(Scales):
    def forward(self, x):
        y = F.relu(x)
        return y if self.linear is None else self.linear(y)


class OnChildsAttribute(Scales):
    def forward(self, x):
        return F.relu(x) * self.linear.in_features


class OnClassAttribute(Scales):
    factor = 3

    def forward(self, x):
        return F.relu(x) * self.factor


class OnProperty(Scales):
    @property
    def scale(self):
        return self.__dict__["scale"] + 1

    @scale.setter
    def scale(self, value):
        self.__dict__["scale"] = value

    def forward(self, x):
        return F.relu(x) * self.scale


class OnIdentity(Scales):
    def forward(self, x):
        y = F.relu(x)
        return y if self.scale is self.training else -y


class OnCall(Scales):
    def forward(self, x):
        y = F.relu(x)
        return y if max(self.scale, 0) else -y


class OnLocal(Scales):
    def forward(self, x):
        y = F.relu(x)
        flag = self.training
        return y if flag else -y


class OnList(Scales):
    def __init__(self) -> None:
        super().__init__([1.0])

    def forward(self, x):
        return F.relu(x) * self.scale[0]


class CallsMethodOfChild(Scales):
    """A trace would go into the other method and freeze what that one branches on."""

    class Child(nn.Module):
        def half(self, x):
            return x / 2 if self.training else x

    def __init__(self) -> None:
        super().__init__()
        self.child = self.Child()

    def forward(self, x):
        return self.child.half(F.relu(x)) * self.scale


class Random(Scales):
    def forward(self, x):
        n = self.scale
        return F.relu(x) + torch.normal(0.0, n, (8,))


@pytest.mark.parametrize(
    "cls",
    [
        OnInput,
        OnBoth,
        OnChild,
        OnChildsAttribute,
        OnClassAttribute,
        OnProperty,
        OnIdentity,
        OnCall,
        OnLocal,
        OnList,
        CallsMethodOfChild,
        Random,
    ],
)
def test_what_depends_on_anything_else_goes_by_the_source(cls, x):
    bare, model = make(cls), make(cls)
    before = torch.get_rng_state()
    assert {row.mechanism for row in plan(model)} == {"source"}
    assert torch.equal(torch.get_rng_state(), before)
    wrap(model)
    for mode in (True, False):
        assert equal(run(model.train(mode), x, 1.0), run(bare.train(mode), x))


def test_planning_and_tracing_leave_the_model_as_it_was(x):
    model = make(Branches)
    attributes = dict(model.__dict__)
    plan(model)
    assert model.__dict__ == attributes
    cls = type(model)
    wrap(model)
    model.scale = 7.0
    model(x)
    unwrap(model)
    assert type(model) is cls
    assert model.__dict__.keys() == attributes.keys()
    assert torch.equal(model(x), (bare := make(Branches, scale=7.0))(x))
    assert not hasattr(bare, "_tensor_constant0")


def test_nothing_escapes_while_a_new_combination_is_traced(x):
    model = wrap(make(Branches))
    model.scale = 7.5
    coverage = verify(model, x)
    assert not coverage.escaped, coverage
    assert len(coverage.gated) == 3


def test_tracing_does_not_disturb_models_in_other_threads(x):
    other = make(Drops).eval()
    expected, wrong, stop = other(x), [], threading.Event()

    def serve():
        while not stop.is_set():
            if not torch.equal(other(x), expected):
                wrong.append(1)

    thread = threading.Thread(target=serve)
    thread.start()
    model = wrap(make(Scales))
    for step in range(40):
        model.scale = 100.0 + step
        model(x)
    stop.set()
    thread.join()
    assert not wrong


def test_new_code_is_readable_in_tracebacks():
    model = wrap(make(Drops)).eval()
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(4, 7))
    frames = traceback.extract_tb(caught.value.__traceback__)
    (frame,) = [frame for frame in frames if "traced by regimewrap" in frame.filename]
    assert "training=False" in frame.filename
    assert "self.linear(x)" in frame.line


@pytest.mark.parametrize(("cls", "attributes"), COMBINATIONS)
def test_copies_have_a_gate_of_their_own(cls, attributes, x):
    model = wrap(make(cls, **attributes))
    gate_of(model).set_keep_ratio(0.2)
    twin = copy.deepcopy(model)
    for mode in (True, False):
        assert all(torch.allclose(a, b, equal_nan=True) for a, b in zip(run(model, x), run(twin, x), strict=True))
        model.train(mode), twin.train(mode)
    assert gate_of(twin) is not gate_of(model)
    assert type(unwrap(twin)) is cls


FRESH = """
import sys, torch
from regimewrap import at_keep_ratio, unwrap
model, x, expected = torch.load(sys.argv[1], weights_only=False)
for (training, scale), y in expected.items():
    model.train(training).scale = scale
    with at_keep_ratio(model, 0.3):
        assert torch.equal(model(x), y), (training, scale)
assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
unwrap(model)
"""


def test_a_file_is_read_by_a_fresh_process(tmp_path, x, monkeypatch):
    model, expected = wrap(make(Branches)), {}
    with at_keep_ratio(model, 0.3):
        for training in (True, False):
            for scale in (2.0, 3.0):
                model.train(training).scale = scale
                expected[training, scale] = model(x).detach()
    name = type(model).__qualname__
    monkeypatch.setitem(sys.modules, "guarded_models", sys.modules[__name__])
    monkeypatch.setattr(Branches, "__module__", "guarded_models")
    monkeypatch.setattr(type(model), "__module__", "guarded_models")
    torch.save((model, x, expected), tmp_path / "model.pt")
    (tmp_path / "guarded_models.py").write_bytes(Path(__file__).read_bytes())
    command = [sys.executable, "-W", "error", "-c", FRESH, tmp_path / "model.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}: {done.stderr}"


def test_a_file_is_read_by_this_process(x):
    model = wrap(make(Drops))
    gate_of(model).set_keep_ratio(0.2)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert type(loaded) is type(model)
    assert equal(run(loaded, x), run(model, x))


@pytest.mark.parametrize(("cls", "attributes"), [(Branches, {}), (Auxiliary, {}), (Scales, {"scale": 2.0})])
def test_compiled_whole_it_follows_modes_ratios_and_attributes(cls, attributes, x):
    model = wrap(make(cls, **attributes))
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for mode in (True, False, True, False):
        for ratio in (1.0, 0.5, 0.2):
            with at_keep_ratio(model, ratio):
                ours, theirs = compiled.train(mode)(x), model(x)
                pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
                assert all(torch.equal(a, b) for a, b in pairs)
    assert counter.frame_count <= 2
    if hasattr(model, "scale"):  # never met before, neither here nor there
        model.scale = 6.5
        assert torch.equal(compiled(x), model(x))


@torch.no_grad()
def test_a_new_combination_under_a_compiler_that_breaks_graphs_works(x):
    class Breaks(Scales):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    model, bare = wrap(nn.Sequential(make(Breaks), make(Scales))), nn.Sequential(make(Breaks), make(Scales))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for scale in (1.0, 8.0, 9.0):
        for each in (model, bare):
            each[0].scale = each[1].scale = scale
        assert torch.equal(compiled(x), bare(x))


def test_exported_programs_hold_the_gate(x):
    model = wrap(make(Branches)).eval()
    with at_keep_ratio(model, 0.3):
        exported = torch.export.export(model, (x,)).module()
        assert torch.equal(exported(x), model(x))
