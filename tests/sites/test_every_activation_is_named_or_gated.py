"""A plan tells the truth: ordinary ways to hold an activation are gated, and what cannot be reached is named."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regimewrap
from regimewrap import GatePolicy, RegimePolicy, SitePolicy, at_keep_ratio, gate_of, plan, verify, wrap
from regimewrap.errors import NoSitesError, PolicyError, UnreachableSiteError


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)


class Private(Base):
    def __init__(self) -> None:
        super().__init__()
        self._act = F.relu

    def forward(self, x):
        return self.b(self._act(self.a(x)))


class OfTheClass(Base):
    act = staticmethod(F.relu)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class ModuleOfTheClass(Base):
    act = nn.ReLU()

    def forward(self, x):
        return self.b(self.act(self.a(x)))


def closed_over(act=F.relu):
    class Closure(Base):
        def forward(self, x):
            return self.b(act(self.a(x)))

    return Closure()


class ByName(Base):
    def __init__(self) -> None:
        super().__init__()
        self.name = "relu"

    def forward(self, x):
        return self.b(getattr(F, self.name)(self.a(x)))


class Zipped(Base):
    def __init__(self) -> None:
        super().__init__()
        self.acts = [F.relu, F.gelu]

    def forward(self, x):
        for layer, act in zip((self.a, self.b), self.acts, strict=True):
            x = act(layer(x))
        return x


class Alias(Base):
    def forward(self, x):
        act = F.relu
        return self.b(act(self.a(x)))


class Default(Base):
    def forward(self, x, act=F.relu):
        return self.b(act(self.a(x)))


class OfClassMethod(Base):
    @classmethod
    def act(cls, x):
        return F.relu(x)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class Helper:
    def __call__(self, x):
        return F.relu(x)


class Helped(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = Helper()

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class Lambdas(Base):
    def __init__(self) -> None:
        super().__init__()
        self.acts, self.name = {"relu": lambda t: F.relu(t), "leaky": lambda t: F.leaky_relu(t, 0.2)}, "leaky"

    def forward(self, x):
        return self.b(self.acts[self.name](self.a(x)))


class OneLambda(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = lambda t: F.gelu(t, approximate="tanh")

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class MethodOfTheTensorClass(Base):
    def forward(self, x):
        return self.b(torch.Tensor.relu(self.a(x)))


class Operator(Base):
    def forward(self, x):
        return self.b(torch.ops.aten.relu(self.a(x)))


class Conditional(Base):
    def forward(self, x):
        return self.b((F.gelu if self.training else F.relu)(self.a(x)))


class Threshold(Base):
    def forward(self, x):
        return self.b(F.threshold(self.a(x), 0.0, 0.0))


def signature(itself, x):
    return F.gelu(itself.a(x))


class Signed(Base):
    @functools.wraps(signature)  # which it never calls
    def forward(self, x):
        return self.b(F.relu(self.a(x)))


WAYS = [
    Signed,
    OneLambda,
    MethodOfTheTensorClass,
    Operator,
    Conditional,
    Threshold,
    Private,
    OfTheClass,
    ModuleOfTheClass,
    closed_over,
    ByName,
    Zipped,
    Alias,
    Default,
    OfClassMethod,
    Helped,
    Lambdas,
]


@pytest.mark.parametrize("make", WAYS, ids=lambda each: each.__name__)
def test_an_activation_is_gated_however_it_is_held(make):
    model, x = make(), torch.randn(6, 8)
    dense = model(x)
    assert plan(model).gated
    wrap(model, example_inputs=x)
    assert torch.equal(model(x), dense)
    with at_keep_ratio(model, 0.1):
        assert not torch.equal(model(x), dense)
    coverage = verify(model, x)
    assert coverage.gated
    assert not coverage.escaped, coverage
    regimewrap.unwrap(model)
    assert torch.equal(model(x), dense)


def plain(x):
    return torch.relu(x) * 1.1


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # noqa: ARG004  torch's signature
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):  # noqa: ARG004
        return gradient


class SwishImplementation(Doubled):
    pass


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.torch.jit.script:FutureWarning")
def test_a_scripted_function_is_named_and_refused():
    scripted = torch.jit.script(plain)

    class Scripts(Base):
        def forward(self, x):
            return self.b(scripted(self.a(x)))

    model = nn.Sequential(Scripts(), nn.ReLU())
    assert [row.name for row in plan(model).unreachable] == ["0.forward.plain"]
    with pytest.raises(UnreachableSiteError, match="it is scripted"):
        wrap(model)
    policy = RegimePolicy(sites=SitePolicy(exclude=("0.forward.plain",)))
    assert wrap(model, policy) is model


def test_a_custom_gradient_with_the_name_of_an_activation_is_gated():
    class Applies(Base):
        def forward(self, x):
            return self.b(SwishImplementation.apply(self.a(x)))

    (row,) = plan(Applies())
    assert (row.activation.kind, row.gated) == ("silu", True)


def test_a_recurrent_cell_with_a_relu_inside_is_named_and_refused():
    with pytest.raises(UnreachableSiteError, match="RNNCell computes it inside torch"):
        wrap(nn.Sequential(nn.RNNCell(8, 16, nonlinearity="relu"), nn.ReLU()))


def test_what_is_called_while_a_model_is_built_is_no_site():
    class Positive(Base):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.a.weight.copy_(F.relu(self.a.weight))

        def forward(self, x):
            return self.b(self.a(x))

    assert not plan(Positive()).rows
    with pytest.raises(NoSitesError):
        wrap(Positive())


def test_a_class_without_a_source_is_wrapped_where_hooks_are_enough():
    names = {"nn": nn}
    exec(  # noqa: S102  so that nothing can be read
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.a, self.act = nn.Linear(4, 8), nn.ReLU()\n"
        "    def forward(self, x):\n"
        "        return self.act(self.a(x))\n",
        names,
    )
    model = wrap(names["Net"]())
    assert [site.name for site in gate_of(model).sites] == ["act"]


SOURCE = """import torch.nn as nn, torch.nn.functional as F
class Net(nn.Module):
    def __init__(self):
        super().__init__(); self.a = nn.Linear(4, 16); self.act = nn.LeakyReLU()
    def forward(self, x):
        h = F.gelu(self.a(x))
        return self.act(h)
"""


@pytest.mark.parametrize(
    "edit",
    [
        ("F.gelu", "F.relu"),
        pytest.param(("class Net", "# a note\nclass Net"), marks=pytest.mark.slow),
        pytest.param(("h = F.gelu(self.a(x))", "h = self.a(x)"), marks=pytest.mark.slow),
    ],
    ids=["renamed", "shifted", "gone"],
)
def test_a_file_that_was_edited_after_the_import_is_noticed(tmp_path, edit):
    (tmp_path / "edited.py").write_text(SOURCE)
    code = f"""
import pathlib, edited, regimewrap
file = pathlib.Path("edited.py")
file.write_text(file.read_text().replace(*{edit!r}))
try:
    regimewrap.wrap(edited.Net())
except regimewrap.errors.UnreachableSiteError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "forward.gelu" in done.stdout
    assert "edited" in done.stdout


def test_code_that_was_compiled_without_places_is_read_too(tmp_path):
    (tmp_path / "plain.py").write_text(SOURCE)
    code = "import plain, regimewrap; print(regimewrap.plan(plain.Net()))"
    command = [sys.executable, "-B", "-X", "no_debug_ranges", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "2 of 2 activations gated" in done.stdout


def test_one_object_in_several_places_is_judged_by_all_of_them():
    class Block(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), act, nn.Conv2d(2, 4, 1), nn.Sigmoid())
            self.conv, self.act = nn.Conv2d(4, 4, 1), act

        def forward(self, x):
            return self.act(self.conv(x * self.se(x)))

    act = nn.SiLU()
    rows = {row.name: row for row in plan(nn.Sequential(Block(act), Block(act), nn.Conv2d(4, 2, 1)))}
    assert rows["0.se.2"].gated


def test_planning_runs_no_function_and_no_property_of_the_users():
    ran = []

    def helper(x):
        ran.append("function")
        return F.relu(x)

    class Asks(Base):
        @property
        def width(self):
            ran.append("property")
            return 3

        def forward(self, x):
            return self.b(helper(self.a(x)) * self.width)

    plan(Asks())
    assert not ran


class Lazy:
    def __getattr__(self, name):
        raise ImportError("an optional package is missing")

    def __call__(self, *args):  # noqa: ARG002
        raise ImportError("an optional package is missing")


missing = Lazy()


def test_a_global_that_imports_what_is_missing_is_never_touched():
    class Fast(Base):
        def forward(self, x, fast=False):
            return missing(x) if fast else self.b(F.relu(missing.ops(self.a(x)) if fast else self.a(x)))

    assert [row.gated for row in plan(Fast())] == [True]


def test_what_was_planned_is_freed():
    class Data:
        pass

    def trial():
        data = Data()

        class Net(Base):
            def forward(self, x):
                assert data is not None
                return self.b(F.gelu(self.a(x)))

        return Net(), weakref.ref(data), weakref.ref(Net)

    model, data, cls = trial()
    regimewrap.sites.survey.survey(model, RegimePolicy())
    del model
    gc.collect()
    assert (data(), cls()) == (None, None)


def test_a_plan_does_not_depend_on_what_was_planned_before():
    class Config:
        def __init__(self, act):
            self.act = act

    class Net(Base):
        def __init__(self, act):
            super().__init__()
            self.config, self.acts = Config(act), [act]

        def forward(self, x):
            return self.b(self.config.act(self.acts[0](self.a(x))))

    first = [row.activation.kind for row in plan(nn.Sequential(Net(F.relu), Net(F.gelu)))]
    assert first == ["relu", "relu", "gelu", "gelu"]
    assert [row.activation.kind for row in plan(Net(F.gelu))] == ["gelu", "gelu"]


def test_modules_with_and_without_an_optional_child_are_read_apart():
    class Optional(Base):
        def __init__(self, gate):
            super().__init__()
            self.act, self.gate = nn.ReLU(), gate

        def forward(self, x):
            x = self.act(self.a(x))
            return x if self.gate is None else torch.sigmoid(self.b(x)).mean() * x

    class Weighs(Base):
        def __init__(self, down):
            super().__init__()
            self.down, self.act = down, nn.ReLU()

        def forward(self, x):
            inner = self.act(self.a(x if self.down is None else self.down(x)))
            return x * torch.sigmoid(self.b(inner))

    rows = {row.name: row.selected for row in plan(nn.Sequential(Weighs(nn.Linear(8, 8)), Weighs(None)))}
    assert rows["0.act"] == rows["1.act"]
    assert all(row.selected for row in plan(nn.Sequential(Optional(None))) if row.activation.kind == "relu")


def test_modules_that_hold_an_activation_of_their_own_or_of_another_module_are_read_apart():
    class Weighs(Base):
        def __init__(self, act=None):
            super().__init__()
            self.own = nn.ReLU()
            self.held = [self.own if act is None else act]

        def forward(self, x):
            return x * torch.sigmoid(self.b(self.held[0](self.a(x))))

    act = nn.ReLU()
    rows = {row.name: row.selected for row in plan(nn.Sequential(Weighs(), Weighs(act), act))}
    assert not rows["0.own"]
    assert rows["1.own"], "it is never called, so nothing says that it is a gate's"


def test_planning_makes_no_lazy_layer():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    plan(model, example_inputs=torch.randn(2, 3, 6, 6))
    assert type(model[0]) is nn.LazyConv2d
    wrap(model, example_inputs=torch.randn(2, 3, 6, 6))
    assert type(model[0]) is nn.LazyConv2d


def test_a_lazy_module_that_would_lose_its_gate_is_refused():
    class Block(nn.Module):
        def forward(self, x):
            return F.gelu(x * self.w)

    class LazyBlock(nn.modules.lazy.LazyModuleMixin, Block):
        cls_to_become = Block

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.UninitializedParameter()

        def initialize_parameters(self, x):
            self.w.materialize((x.shape[-1],))
            nn.init.ones_(self.w)

    model = LazyBlock()
    with pytest.raises(UnreachableSiteError, match="call the model once, then wrap it"):
        wrap(model)
    x = torch.randn(2, 6)
    model(x)
    assert verify(wrap(model), x).gated


class Hidden(Base):
    def forward(self, x):
        return self.b(vars(F)["re" + "lu"](self.a(x)))


def test_what_only_ran_is_in_the_plan_and_may_be_excluded_by_its_name():
    model, x = nn.Sequential(Hidden(), nn.ReLU()), torch.randn(2, 8)
    (row,) = plan(model, example_inputs=x).unreachable
    assert row.name == "0.relu"
    escaped = verify(wrap(model), x).escaped
    assert escaped == ("0.relu",)
    regimewrap.unwrap(model)
    policy = RegimePolicy(sites=SitePolicy(exclude=escaped))
    plan(model, policy)
    assert not verify(wrap(model, policy, example_inputs=x), x).escaped
    regimewrap.unwrap(model)
    asked = plan(model, RegimePolicy(sites=SitePolicy(include=("0.relu",))))
    assert [each.name for each in asked.unreachable] == ["0.relu"]
    with pytest.raises(PolicyError, match="matches no activation"):
        plan(model, RegimePolicy(sites=SitePolicy(exclude=("0.nothing",))))


class Scale:
    def __init__(self) -> None:
        self.by = 2.0

    def __call__(self, x):
        return F.gelu(x) * self.by


class OutOfReach(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scale()

    def forward(self, x):
        return self.b(self.scaled(torch.relu(self.a(x))))


def test_what_the_code_shows_out_of_reach_is_one_row_when_it_ran_too():
    model, x = OutOfReach(), torch.randn(2, 8)
    (row,) = plan(model, example_inputs=x).unreachable
    assert "Scale.__call__" in row.why
    policy = RegimePolicy(sites=SitePolicy(exclude=(row.name,)))
    assert verify(wrap(model, policy, example_inputs=x), x).gated == ("forward.relu",)
    assert not verify(model, x).escaped


def test_two_calls_of_one_function_are_told_apart_when_one_is_excluded():
    class Two(Base):
        def forward(self, x):
            return F.relu(self.b(F.relu(self.a(x))))

    policy, x = RegimePolicy(sites=SitePolicy(exclude=("forward.relu_2",))), torch.randn(2, 8)
    model = wrap(Two(), policy, example_inputs=x)
    assert verify(model, x).gated == ("forward.relu",)
    assert not verify(model, x).escaped


def test_a_site_with_just_enough_units_is_gated():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    for least, kept in ((16, 1), (17, 16)):
        wrap(model, RegimePolicy(sites=SitePolicy(min_units=least), gate=GatePolicy(eval_keep_ratio="current")))
        gate_of(model).set_keep_ratio(1 / 16)
        seen = []
        handle = model[1].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))  # noqa: ARG005
        model[0].weight.data.abs_()
        model[0].bias.data.abs_().add_(0.1)
        model.eval()(torch.ones(1, 4))
        assert int((seen[0] != 0).sum()) == kept
        handle.remove()
        regimewrap.unwrap(model)


def test_a_slice_of_a_list_up_to_what_the_forward_pass_decides_is_followed():
    class UpTo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))

        def forward(self, x, depth: int):
            for layer in self.layers[:depth]:
                x = layer(x)
            return x

    assert len(plan(UpTo()).gated) == 3


class Async(Base):
    def __init__(self, activation) -> None:
        super().__init__()
        self.activation = activation

    async def named(self, x):
        return F.relu(self.a(x))

    async def held(self, x):
        return self.activation(self.a(x))

    def forward(self, x):
        try:
            (self.named if self.activation is None else self.held)(x).send(None)
        except StopIteration as done:
            return self.b(done.value)


class OneLambdaOfTwo(Base):
    def __init__(self, activation) -> None:
        super().__init__()
        self.c, self.activation = nn.Linear(16, 16), activation
        if activation is None:
            self.hidden = lambda x: F.relu(self.c(F.relu(self.a(x))))
        else:
            self.hidden = lambda x: self.activation(self.c(self.activation(self.a(x))))

    def forward(self, x):
        return self.b(self.hidden(x))


@pytest.mark.parametrize(
    ("make", "why"), [(Async, "is async; write it without, or"), (OneLambdaOfTwo, "a lambda does more there than call")]
)
def test_what_is_not_rewritten_says_why_and_its_advice_works(make, why):
    with pytest.raises(UnreachableSiteError, match=why):
        wrap(make(None))
    policy = RegimePolicy(sites=SitePolicy(exclude=("named.relu",)))
    model = wrap(make(nn.ReLU()), policy if make is Async else None, example_inputs=torch.randn(2, 8))
    with at_keep_ratio(model, 0.5):
        assert verify(model, torch.randn(2, 8)).escaped == ()
