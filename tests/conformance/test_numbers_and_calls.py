"""Awkward numbers, in-place code, and every way in which a forward method is called."""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from specimens import POLICY, WRITINGS, Layers, Rewritten, assert_same, bare, by_hand, gradients, wrapped
from torch import Tensor, nn

from regimewrap import at_keep_ratio, gate_of, unwrap, verify, wrap
from regimewrap.topk import reference

every_writing = pytest.mark.parametrize("make", WRITINGS)


@every_writing
def test_an_empty_batch_passes(make):
    model = wrapped(make)
    y = model(torch.randn(0, 3, 8, 8))
    assert y.shape == (0, 5)
    assert all(each is None or not each.any() for each in gradients(model, y).values())


@every_writing
def test_nan_passes_through_and_is_not_hidden(make, x):
    x[1, 0, 2, 2] = float("nan")
    y = wrapped(make, 0.05)(x)
    assert y[1].isnan().all()
    assert not y[[0, 2, 3]].isnan().any()


@every_writing
def test_infinity_is_kept(make, x):
    model, seen = wrapped(make, 0.05), []
    gate_of(model).observers.append(lambda site, before, after: seen.append((before, after)))  # noqa: ARG005
    x[0, 0, 0, 0] = float("inf")
    model(x)
    before, after = seen[0]
    assert torch.equal(before.isinf(), after.isinf())


@every_writing
def test_outputs_and_gradients_are_those_gated_by_hand(make, x):
    model, plain = wrapped(make), bare(make)
    mine, theirs = model(x), by_hand(plain, x)
    torch.testing.assert_close(mine, theirs)
    assert_same(gradients(model, mine), gradients(plain, theirs))


class InPlaceFunction(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return self.head(F.gelu(self.hidden(x.mean((2, 3)))))


class InPlaceMethod(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu_()
        return self.head(F.gelu(self.hidden(x.mean((2, 3)))))


class InPlaceModule(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        return self.head(F.gelu(self.hidden(x.mean((2, 3)))))


class InPlaceInABranch(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if x.shape[0] > 1:
            F.relu_(x)
        return self.head(F.gelu(self.hidden(x.mean((2, 3)))))


@pytest.mark.parametrize("make", [InPlaceFunction, InPlaceMethod, InPlaceModule, InPlaceInABranch])
def test_backward_works_behind_in_place_activations(make, x):
    model, plain = wrapped(make), bare(make)
    mine, theirs = model(x), by_hand(plain, x)
    torch.testing.assert_close(mine, theirs)
    assert_same(gradients(model, mine), gradients(plain, theirs))


class AliasedModule(nn.Module):
    """What the activation leaves in its input is read again: the residual is the activated tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.out(self.act(x)) + x


class AliasedFunction(AliasedModule):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.out(F.relu(x, inplace=True)) + x


class AliasedView(AliasedModule):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        first = F.relu_(x[:, :4])
        return self.out(x) + torch.cat([first, x[:, 4:]], 1)


@pytest.mark.parametrize("make", [AliasedModule, AliasedFunction])
@pytest.mark.parametrize("training", [True, False])
def test_a_residual_that_aliases_an_in_place_activation_is_bit_exact_at_full_budget(make, training):
    torch.manual_seed(0)
    plain = make().train(training)
    model = wrap(copy.deepcopy(plain), POLICY)
    x = torch.randn(4, 8)
    mine, theirs = model(x), plain(x)
    assert torch.equal(mine, theirs)
    assert_same(gradients(model, mine), gradients(plain, theirs))
    with at_keep_ratio(model, 0.3):
        gated = model(x)
    hidden = F.relu(plain.linear(x))
    kept = hidden * reference.kept(hidden, 0.3)
    # the branch is gated; the alias holds the activation itself, or the gated one
    assert any(torch.allclose(gated, plain.out(kept) + alias) for alias in (hidden, kept))


def test_a_view_that_is_activated_in_place_is_bit_exact_at_full_budget():
    torch.manual_seed(0)
    plain = AliasedView()
    model = wrap(copy.deepcopy(plain), POLICY)
    x = torch.randn(4, 8)
    mine, theirs = model(x), plain(x)
    assert torch.equal(mine, theirs)
    assert_same(gradients(model, mine), gradients(plain, theirs))


@pytest.mark.parametrize("given", [True, False])
def test_an_optional_argument_may_be_given_or_not(given, x):
    scale = torch.full((1, 8, 1, 1), 0.5) if given else None
    model, plain = wrapped(Rewritten), bare(Rewritten)
    unscaled = copy.deepcopy(plain)
    if given:
        with torch.no_grad():
            unscaled.norm.weight.mul_(0.5)
            unscaled.norm.bias.mul_(0.5)
    torch.testing.assert_close(model(x, scale), by_hand(unscaled, x))
    torch.testing.assert_close(model(x, scale=scale), by_hand(unscaled, x))
    gate_of(model).set_keep_ratio(1.0)
    assert torch.equal(model(x, scale), plain(x, scale))


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


class KeywordsOnly(Layers):
    def forward(self, *, image: Tensor, temperature: float = 1.0) -> Output:
        x = F.relu(self.norm(self.conv(image))).mean((2, 3))
        hidden = F.gelu(self.hidden(x))
        return Output(logits=self.head(hidden) / temperature, hidden=hidden)


class TakesDict(Layers):
    def forward(self, batch: dict) -> dict:
        x = F.relu(self.norm(self.conv(batch["image"]))).mean((2, 3))
        hidden = F.gelu(self.hidden(x))
        return {"logits": self.head(hidden), "hidden": hidden}


class AnyArguments(Layers):
    def forward(self, *args, **kwargs):
        image = kwargs["image"] if "image" in kwargs else args[0]
        x = F.relu(self.norm(self.conv(image))).mean((2, 3))
        hidden = F.gelu(self.hidden(x))
        return Pair(self.head(hidden), hidden)


CALLS = {
    "keywords": (KeywordsOnly, lambda model, x: model(image=x), lambda y: (y.logits, y.hidden)),
    "keywords_and_default": (
        KeywordsOnly,
        lambda model, x: model(image=x, temperature=1),
        lambda y: (y.logits, y.hidden),
    ),
    "dict": (TakesDict, lambda model, x: model({"image": x}), lambda y: (y["logits"], y["hidden"])),
    "positional": (AnyArguments, lambda model, x: model(x), tuple),
    "named": (AnyArguments, lambda model, x: model(image=x), tuple),
}


@pytest.mark.parametrize("call", CALLS)
def test_keywords_dicts_and_dataclasses_go_in_and_out(call, x):
    make, run, read = CALLS[call]
    model, plain = wrapped(make), bare(make)
    output = run(model, x)
    assert type(output) is type(run(plain, x))
    logits, hidden = read(output)
    torch.testing.assert_close(logits, by_hand(plain, x))
    assert (hidden != 0).sum() == 4 * 6
    gate_of(model).set_keep_ratio(1.0)
    assert torch.equal(read(run(model, x))[0], read(run(plain, x))[0])


@pytest.mark.parametrize(
    ("make", "example"),
    [(KeywordsOnly, lambda x: {"image": x}), (TakesDict, lambda x: ({"image": x},)), (AnyArguments, lambda x: x)],
)
def test_example_inputs_and_verify_follow_the_same_calls(make, example, x):
    model = wrap(bare(make), POLICY, example_inputs=example(x))
    args = example(x)
    coverage = (
        verify(model, **args) if isinstance(args, dict) else verify(model, *(args if type(args) is tuple else [x]))
    )
    assert len(coverage.gated) == 2
    assert not coverage.escaped
    unwrap(model)


def test_googlenets_heads_for_training_come_and_go_with_the_mode():
    def googlenet() -> nn.Module:
        torch.manual_seed(0)
        return torchvision.models.googlenet(num_classes=3, init_weights=False)

    x = torch.randn(2, 3, 32, 32)
    results = []
    for model in (googlenet(), wrap(googlenet(), POLICY)):
        torch.manual_seed(1)
        results.append((*model.train()(x), model.eval()(x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert type(model.train()(x)) is torchvision.models.GoogLeNetOutputs
    assert any(name.startswith("aux") for name in verify(model, x).gated)
    assert isinstance(model.eval()(x), Tensor)


def test_wrap_changes_no_requires_grad_and_adds_no_graph(x):
    model = bare(Rewritten)
    model.conv.requires_grad_(False)
    flags = [each.requires_grad for each in model.parameters()]
    wrap(model, POLICY)
    assert [each.requires_grad for each in model.parameters()] == flags
    with torch.inference_mode():
        assert model(x).is_inference()
    with torch.no_grad():
        assert not model(x).requires_grad
