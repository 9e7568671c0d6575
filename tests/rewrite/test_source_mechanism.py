"""Activations called as functions in code that a trace would freeze: found, gated, and taken off again."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regimewrap
from regimewrap import at_keep_ratio, gate_of, plan, unwrap, verify, wrap


def doubled(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        return 2 * function(self, *args, **kwargs)

    return wrapper


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, mask=None):
        x = F.relu(self.linear(x))
        return x if mask is None else x * mask


class Loops(Branches):
    def forward(self, x):
        for _ in range(3):
            x = F.gelu(self.linear(x))
        return x


class Trains(Branches):
    def forward(self, x):
        if self.training:
            x = x + 1
        return torch.relu(self.linear(x)).relu()


class Decorated(Branches):
    @doubled
    @doubled
    def forward(self, x, *, scale=0.5):
        return F.silu(self.linear(x)) * scale


class CallsSuper(Branches):
    def forward(self, x, mask=None):
        return super().forward(x, mask) + 1


class Mangled(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.__scale = 3.0

    def forward(self, x):
        return F.relu(self.linear(x)) * self.__scale


class NamesItself(Branches):
    def forward(self, x, mask=None):
        x = F.gelu(super(NamesItself, self).forward(x))  # noqa: UP008  it is there that its name is a variable
        return x if mask is None else x * mask


def closed_over(scale):
    class Closure(Branches):
        def forward(self, x):
            if scale:
                return F.relu(super().forward(x)) * scale
            return x

    return Closure


class DropsResult(Branches):
    def forward(self, x):
        x = self.linear(x)
        F.relu(x, inplace=True)
        return x


class DropsMethodResult(Branches):
    def forward(self, x):
        x = self.linear(x)
        x.relu_()
        return x


class DropsModuleResult(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.linear(x)
        self.act(x)
        return x


class HeldFunction(Branches):
    def __init__(self, act=F.relu) -> None:
        super().__init__()
        self.act = act

    def forward(self, x):
        return self.act(self.linear(x))


class HeldInList(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.acts = [F.relu, F.relu]

    def forward(self, x):
        for index in range(2):
            x = self.acts[index](self.linear(x))
        return x


class HeldInDict(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.acts = {"relu": F.relu}

    def forward(self, x):
        return self.acts["relu"](self.linear(x))


SHARED_ACTIVATION = nn.GELU()


class UnregisteredGlobal(Branches):
    def forward(self, x):
        return SHARED_ACTIVATION(self.linear(x))


class Counts(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def forward(self, x):
        self.step += 1
        return F.relu(self.linear(x))


class InnerFunction(Branches):
    def forward(self, x):
        def act(y):
            return F.relu(y)

        return act(self.linear(x))


MODELS = [
    Branches,
    Loops,
    Trains,
    Decorated,
    CallsSuper,
    Mangled,
    closed_over(2.0),
    DropsResult,
    DropsMethodResult,
    DropsModuleResult,
    HeldFunction,
    functools.partial(HeldFunction, functools.partial(F.gelu, approximate="tanh")),
    HeldInList,
    HeldInDict,
    UnregisteredGlobal,
    Counts,
    InnerFunction,
    NamesItself,
]


def name(make) -> str:
    return getattr(make, "__name__", "HeldPartial")


@pytest.fixture
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", MODELS, ids=name)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_full_budget_is_bit_exact_and_a_small_one_gates(make, training, x):
    torch.manual_seed(0)
    model = make().train(training)
    bare = copy.deepcopy(model)
    expected = bare(x.clone())
    expected.sum().backward()

    wrap(model)
    with at_keep_ratio(model, 1.0):
        found = model(x.clone())
    found.sum().backward()
    with at_keep_ratio(model, 0.1):
        gated = model(x.clone())

    assert torch.equal(found, expected)
    for mine, theirs in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    assert not torch.equal(gated, expected)


@pytest.mark.parametrize("make", MODELS, ids=name)
def test_nothing_escapes_and_unwrap_leaves_nothing(make, x):
    torch.manual_seed(0)
    model = make()
    cls, attributes = type(model), set(model.__dict__)
    expected = copy.deepcopy(model)(x.clone())

    wrap(model)
    coverage = verify(model, x.clone())
    unwrap(model)

    assert not coverage.escaped, coverage
    assert coverage.gated
    assert type(model) is cls
    assert set(model.__dict__) == attributes
    assert torch.equal(model(x.clone()), expected)


@pytest.mark.parametrize("make", MODELS, ids=name)
def test_a_gated_model_is_what_its_reference_computes(make, x):
    """The gate acts on the activation itself: for one activation at the end, the output's density is the keep ratio."""
    torch.manual_seed(0)
    model = wrap(make(), regimewrap.RegimePolicy())
    with at_keep_ratio(model, 0.25), regimewrap.watch(model) as seen:
        model(x.clone())
    assert seen.density <= 0.25


@pytest.mark.parametrize("make", [Branches, Decorated, CallsSuper, DropsResult, HeldFunction, Mangled], ids=name)
def test_copies_and_files_stay_gated(make, x):
    torch.manual_seed(0)
    model = wrap(make())
    gate_of(model).set_keep_ratio(0.2)
    expected = model(x)

    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)

    for other in (twin, loaded):
        assert torch.equal(other(x), expected)
        assert gate_of(other) is not gate_of(model)
        assert type(unwrap(other)) is make


def test_the_class_looks_the_same():
    model = wrap(Decorated())
    assert isinstance(model, Decorated)
    assert str(type(model)) == str(Decorated)
    assert type(model).__qualname__ == Decorated.__qualname__
    assert inspect.signature(model.forward) == inspect.signature(Decorated().forward)


def test_tracebacks_show_the_line_of_the_source():
    model = wrap(Branches())
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(4, 7))
    frames = [frame for frame in traceback.extract_tb(caught.value.__traceback__) if frame.name == "forward"]
    assert frames[0].filename == __file__
    assert frames[0].line == "x = F.relu(self.linear(x))"


def test_a_counter_in_forward_keeps_counting(x):
    model = wrap(Counts())
    model(x)
    model(x)
    assert model.step == 2


def test_an_unregistered_shared_activation_is_gated_in_one_model_only(x):
    one, other = UnregisteredGlobal(), UnregisteredGlobal()
    expected = other(x)
    gate_of(wrap(one)).set_keep_ratio(0.1)
    assert torch.equal(other(x), expected)
    assert not SHARED_ACTIVATION._forward_hooks


def test_the_plan_names_the_mechanism():
    assert {row.mechanism for row in plan(Branches())} == {"source"}
    assert {row.mechanism for row in plan(DropsModuleResult())} == {"hook"}


def test_methods_without_source_are_reported():
    space = {"nn": nn, "F": F, "Branches": Branches}
    exec("class NoSource(Branches):\n    def forward(self, x):\n        return F.relu(self.linear(x))\n", space)  # noqa: S102
    model = space["NoSource"]()
    with pytest.raises(regimewrap.errors.UnreachableSiteError, match=r"forward.*source"):
        wrap(model)
