"""Modules made at random out of the ways people hold and call activations equal a reference that gates by hand."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regimewrap import gate_of, plan, unwrap, wrap
from regimewrap.errors import NoSitesError
from regimewrap.topk.op import topk_gate

RATIO = 0.3
WIDTH = 8


def by_hand(value: torch.Tensor) -> torch.Tensor:
    return topk_gate(value, torch.tensor(RATIO, dtype=torch.float64))


class Reference(nn.Module):
    """The same layers; an activation, with the gate written behind it, between them."""

    gates = False

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        for layer in self.body.layers:
            y = layer.act_of_reference(layer.linear(x))
            x = x + layer.out(by_hand(y) if self.gates else y)
        return x


class Layer(nn.Module):
    """What all have in common: a linear layer in front of the activation, and one behind it."""

    act_of_reference = staticmethod(F.gelu)

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def _behind(self, y):
        return self.out(y)


class Direct(Layer):
    def forward(self, x):
        return x + self.out(F.gelu(self.linear(x)))


class Relu(Layer):
    act_of_reference = staticmethod(F.relu)

    def forward(self, x):
        return x + self.out(torch.relu(self.linear(x)))


class Method(Layer):
    act_of_reference = staticmethod(F.relu)

    def forward(self, x):
        return x + self.out(self.linear(x).relu())


class InPlace(Layer):
    act_of_reference = staticmethod(F.relu)

    def forward(self, x):
        y = self.linear(x)
        F.relu(y, inplace=True)
        return x + self.out(y)


class AsModule(Layer):
    act_of_reference = staticmethod(F.silu)

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()

    def forward(self, x):
        return x + self._behind(self.act(self.linear(x)))


class AsRelu(AsModule):
    act_of_reference = staticmethod(F.relu)

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()


class Own(nn.Module):
    def forward(self, x):
        return F.relu(x)


class AsOwn(AsModule):
    act_of_reference = staticmethod(F.relu)

    def __init__(self) -> None:
        super().__init__()
        self.act = Own()


class Attribute(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.act = F.gelu

    def forward(self, x):
        return x + self.out(self.act(self.linear(x)))


class Listed(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.acts = [F.gelu]

    def forward(self, x):
        return x + self.out(self.acts[0](self.linear(x)))


class Steps(Layer):
    """Methods bound early, in a list and a partial."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [self._act, functools.partial(self._behind)]

    def _act(self, x):
        return F.gelu(self.linear(x))

    def forward(self, x):
        y = x
        for step in self.steps:
            y = step(y)
        return x + y


class Bound(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self._fast

    def _fast(self, x):
        return x + self.out(F.gelu(self.linear(x)))


def noted(method):
    @functools.wraps(method)
    def noting(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    return noting


class Decorated(Layer):
    @noted
    def forward(self, x):
        return x + self.out(F.gelu(self.linear(x)))


class Inherits(Direct):
    def forward(self, x):
        return super().forward(x)


class Lambda(Layer):
    def forward(self, x):
        act = lambda y: F.gelu(y)  # noqa: E731
        return x + self.out(act(self.linear(x)))


class Looped(Layer):
    def forward(self, x):
        for each in (self.linear,):
            y = F.gelu(each(x)) if x.shape[0] else x
        return x + self.out(y)


class Helped(Layer):
    def forward(self, x):
        return x + self.out(helper(self.linear(x)))


def helper(x):
    return F.gelu(x)


def made_in_a_function() -> nn.Module:
    scale = 1.0

    class Local(Layer):
        def forward(self, x):
            return x + self.out(F.gelu(self.linear(x) * scale))

    return Local()


def closed_over() -> nn.Module:
    act = F.silu

    class Closing(Layer):
        act_of_reference = staticmethod(F.silu)

        def forward(self, x):
            return x + self.out(act(self.linear(x)))

    return Closing()


class Held(Layer):
    """Calls ``self.act``, which is one of several things."""

    def forward(self, x):
        return x + self.out(self.act(self.linear(x)))


class OfTheClass(Held):
    act = staticmethod(F.gelu)


class OfClassMethod(Held):
    @classmethod
    def act(cls, x):
        return F.gelu(x)


class Partial(Held):
    act_of_reference = staticmethod(functools.partial(F.leaky_relu, negative_slope=0.2))

    def __init__(self) -> None:
        super().__init__()
        self.act = self.act_of_reference


class OneLambda(Held):
    def __init__(self) -> None:
        super().__init__()
        self.act = lambda y: F.gelu(y)


class OneObject(Held):
    """One callable object for all layers."""

    class Act:
        def __call__(self, x):
            return F.gelu(x)

    act = Act()


class ByName(Layer):
    acts, name = {"gelu": F.gelu, "relu": F.relu}, "relu"
    act_of_reference = staticmethod(F.relu)

    def forward(self, x):
        return x + self.out(self.acts[self.name](self.linear(x)))


class Alias(Layer):
    def forward(self, x, other=F.gelu):
        act = other if x.ndim else F.gelu
        return x + self.out(act(self.linear(x)))


class HandedOn(Layer):
    def _with(self, act, x):
        return act(self.linear(x))

    def forward(self, x):
        return x + self.out(self._with(F.gelu, x))


KINDS = [
    *(closed_over, OfTheClass, OfClassMethod, Partial, OneLambda, OneObject, ByName, Alias, HandedOn),
    *(Direct, Relu, Method, InPlace, AsModule, AsRelu, AsOwn, Attribute, Listed, Steps, Bound, Decorated, Inherits),
    *(Lambda, Looped, Helped, made_in_a_function),
]


class Body(nn.Module):
    def __init__(self, layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@st.composite
def bodies(draw) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 1000)))
    layers = [draw(st.sampled_from(KINDS))() for _ in range(draw(st.integers(1, 5)))]
    for _ in range(draw(st.integers(0, 2))):
        layers.append(draw(st.sampled_from(layers)))  # the same object twice
    for layer in layers:
        if draw(st.booleans()) and type(getattr(layer, "act", None)) is nn.SiLU:
            layer.act = layers[0].act if type(getattr(layers[0], "act", None)) is nn.SiLU else layer.act
        if draw(st.integers(0, 5)) == 0 and "forward" not in vars(layer):
            layer.forward = layer.forward  # bound early
    return Body(layers)


@pytest.mark.parametrize("make", KINDS)
def test_each_way_equals_the_reference(make):
    torch.manual_seed(0)
    model, x = Body([make()]), torch.randn(3, WIDTH)
    reference = Reference(model)
    reference.gates = True
    gate_of(wrap(model)).set_keep_ratio(RATIO)
    assert torch.equal(model(x), reference(x))
    unwrap(model)


@given(bodies(), st.sampled_from(["as it is", "copied after", "copied before", "wrapped again"]))
def test_a_random_module_equals_the_reference_at_every_budget(model, history):
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    reference = Reference(model)
    dense = reference(x)
    torch.testing.assert_close(model(x), dense, rtol=0, atol=0)
    if history == "copied before":
        model = copy.deepcopy(model)
    wrap(model, example_inputs=x)
    if history == "wrapped again":
        wrap(unwrap(model))
    original = model
    if history == "copied after":
        model = copy.deepcopy(model)
        unwrap(original)
    assert torch.equal(model(x), dense)
    gate_of(model).set_keep_ratio(RATIO)
    gated = model(x)
    unwrap(model)
    assert torch.equal(model(x), dense)
    reference = Reference(model)
    reference.gates = True
    assert torch.equal(gated, reference(x))
    names = {type(layer).__name__ for layer in model.layers}
    assert names == {type(layer).__name__ for layer in original.layers}


def test_the_reference_is_another_net_where_no_gate_is_written():
    torch.manual_seed(0)
    model, x = Body([Direct()]), torch.randn(3, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(plan(model).gated) == 1
    reference = Reference(model)
    reference.gates = True
    assert not torch.equal(reference(x), model(x))
    with pytest.raises(NoSitesError):
        wrap(Body([nn.Linear(WIDTH, WIDTH)]))
