"""What must hold of any model: the checks that every model of the zoo goes through, on real tensors.

Nothing here knows a model library. ``verify`` is not trusted alone: ``Census`` counts the activation kernels that
really run, below autograd, without regimewrap's catalog.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import regimewrap
from regimewrap import RegimePolicy
from regimewrap.sites.plan import Plan

#: Marks for a file of the zoo: the libraries' own warnings are not ours to mend, those that ``wrap`` gives us are.
QUIET = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::zoo_checks"),
    pytest.mark.filterwarnings("ignore:.*is time, not samples"),  # true of Mask2Former's decoder
]

#: Positional and keyword arguments of a forward pass, for train mode (``True``) or eval mode.
Inputs = Callable[[bool], tuple[tuple[Any, ...], dict[str, Any]]]

#: Kernels that are an activation, whatever Python code led to them, with regimewrap's name of the family.
KERNELS = {
    "relu": "relu",
    "leaky_relu": "relu",
    "rrelu_with_noise": "relu",
    "hardtanh": "relu",  # ReLU6, when its bounds say so
    "relu6": "relu",
    "gelu": "gelu",
    "silu": "silu",
    "hardswish": "hardswish",
    "mish": "mish",
    "elu": "elu",
    "celu": "elu",
    "selu": "elu",
    "_prelu_kernel": "prelu",
    "_transformer_encoder_layer_fwd": "gelu",  # the fast path, with an activation inside
}


class NondeterministicModelError(AssertionError):
    """The bare model itself gives two results for one seed, so that nothing can be said about the wrapped one."""


@dataclasses.dataclass
class Bare:
    """The model before it is wrapped."""

    buffers: dict[str, Tensor]
    anatomy: Anatomy
    plan: Plan
    output: list[Tensor] = dataclasses.field(default_factory=list)
    step: Step | None = None


def examine(model: nn.Module, inputs: Inputs, policy: RegimePolicy | None = None) -> dict[str, Any]:
    """Take a bare model through all checks; it is bare again afterwards.

    Args:
        model: on the CPU; its parameters may be changed (``wake``).
        inputs: makes the arguments; the same ones at every call.
        policy: the default policy if ``None``.

    Returns:
        Figures for the report: parameters, gated sites by mechanism, sites that never ran, milliseconds of ``wrap``.

    Raises:
        AssertionError: a check failed; the message says which.
    """
    wake(model)
    step(model, inputs)  # takes lazily made attributes and normalisation statistics out of the comparison
    bare = Bare(
        {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        anatomy(model),
        regimewrap.plan(model, policy),
    )
    bare.output = evaluate(model, inputs)
    bare.step = step(model, inputs, bare.buffers)
    assert bare.output, "the model returns no tensors in eval mode: nothing to compare"
    assert any(gradient is not None and gradient.any() for gradient in bare.step.gradients.values()), "no gradients"

    rng = torch.get_rng_state()
    start = time.perf_counter()
    wrapped = regimewrap.wrap(model, policy)
    seconds = time.perf_counter() - start
    try:
        assert wrapped is model
        assert torch.equal(torch.get_rng_state(), rng), "wrap draws random numbers"
        assert [name for name, _ in model.named_modules()] == bare.anatomy.names
        assert list(model.state_dict()) == bare.anatomy.keys, "wrap changes the keys of state_dict"
        idle = _examine_wrapped(model, inputs, bare)
    except AssertionError as error:
        regimewrap.unwrap(model)
        again = (
            same(evaluate(model, inputs, bare.buffers), bare.output) and step(model, inputs, bare.buffers) == bare.step
        )
        regimewrap.wrap(model, policy)
        if not again:
            raise NondeterministicModelError(f"the bare model gives two results for one seed; so {error}") from error
        raise
    finally:
        regimewrap.unwrap(model)
    difference = bare.anatomy.difference(anatomy(model))
    assert not difference, f"unwrap leaves something behind: {difference}"
    assert same(evaluate(model, inputs, bare.buffers), bare.output), "after unwrap, eval output differs"
    mechanisms = Counter(str(row.mechanism) for row in bare.plan.gated)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, **mechanisms, "idle": idle, "wrap_ms": round(seconds * 1000, 1)}


def _examine_wrapped(model: nn.Module, inputs: Inputs, bare: Bare) -> int:
    assert same(evaluate(model, inputs, bare.buffers), bare.output), "eval output at full budget is not bit-equal"
    wrapped = step(model, inputs, bare.buffers)
    assert same(wrapped.outputs, bare.step.outputs), "train output at keep ratio 1 is not bit-equal"
    assert same(wrapped.gradients, bare.step.gradients), "gradients at keep ratio 1 are not bit-equal"
    assert same(wrapped.buffers, bare.step.buffers), "buffers after a step at keep ratio 1 are not bit-equal"

    with regimewrap.at_keep_ratio(model, 0.1):
        sparse = step(model, inputs, bare.buffers)
        output = evaluate(model, inputs, bare.buffers)
    assert not same(sparse.outputs, bare.step.outputs), "train output at keep ratio 0.1 is unchanged"
    assert not same(sparse.gradients, bare.step.gradients), "gradients at keep ratio 0.1 are unchanged"
    assert not same(output, bare.output), "eval output at keep ratio 0.1 is unchanged"

    idle = {row.name for row in bare.plan.gated}
    for training in (True, False):
        mode = "train" if training else "eval"
        restore(model, bare.buffers)
        model.train(training)
        args, kwargs = inputs(training)
        seed()
        with torch.set_grad_enabled(training):
            coverage = regimewrap.verify(model, *args, **kwargs)
        assert not coverage.escaped, f"verify, in {mode} mode: {coverage.escaped[:5]} escaped"
        assert same(dict(model.named_buffers()), bare.buffers), "verify changes buffers"
        args, kwargs = inputs(training)
        seed()
        with Census(model) as census, torch.set_grad_enabled(training):
            model(*args, **kwargs)
        restore(model, bare.buffers)
        escaped = census.escaped(bare.plan)
        assert not escaped, f"ran ungated in {mode} mode: {escaped[:5]} and {len(escaped[5:])} more"
        idle &= set(coverage.idle)
    return len(idle)


def wake(model: nn.Module) -> None:
    """Disturb parameters that start as a constant: a branch scaled by zero would hide what happens in it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.is_floating_point()
                and parameter.numel()
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)


def seed() -> None:
    """Start every generator that a forward pass may draw from."""
    random.seed(0)
    np.random.seed(0)  # some models draw their masks from it
    torch.manual_seed(0)


@dataclasses.dataclass(eq=False)
class Step:
    """What one training step shows."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and same(vars(self), vars(other))


def step(model: nn.Module, inputs: Inputs, state: dict[str, Tensor] | None = None) -> Step:
    """Run forward and backward in train mode, from the given buffers and a fixed seed."""
    restore(model, state)
    model.train()
    args, kwargs = inputs(True)
    seed()
    outputs = list(tensors(model(*args, **kwargs)))
    reach = [output for output in outputs if output.requires_grad]
    assert reach, "no output carries a gradient in train mode"
    torch.stack([_reading(output) for output in reach]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    return Step([output.detach() for output in outputs], gradients, buffers)


def _reading(output: Tensor) -> Tensor:
    """A scalar whose gradient differs from element to element; a plain sum vanishes behind normalised outputs."""
    flat = (torch.view_as_real(output) if output.is_complex() else output).flatten().float()
    return (flat * torch.cos(torch.arange(flat.numel()))).mean()


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Inputs, state: dict[str, Tensor] | None = None) -> list[Tensor]:
    """Run forward in eval mode, from the given buffers and a fixed seed."""
    restore(model, state)
    model.eval()
    args, kwargs = inputs(False)
    seed()
    return list(tensors(model(*args, **kwargs)))


def restore(model: nn.Module, state: dict[str, Tensor] | None) -> None:
    """Put buffers back, those that ``state_dict`` leaves out as well."""
    if state is not None:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(state[name])


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in a model's output, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def same(a: Any, b: Any) -> bool:
    """Say whether two results are equal bit for bit; NaN equals the same NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and (torch.equal(a, b) or _bits(a) == _bits(b))


def _bits(value: Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """What a model is made of, apart from numbers."""

    names: list[str]
    keys: list[str]
    types: list[type]
    attributes: list[list[str]]
    hooks: list[list[tuple[str, int, int]]]
    modes: list[bool]
    parameters: list[int]

    def difference(self, other: Anatomy) -> str:
        """Say what differs, or nothing."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                pairs = [(x, y) for x, y in zip(mine, theirs, strict=False) if x != y]
                return f"{field.name}: {pairs[:3] or (len(mine), len(theirs))}"
        return ""


def anatomy(model: nn.Module) -> Anatomy:
    """Read a model's names, classes, attributes and hooks, in eval mode."""
    model.eval()
    modules = list(model.modules())
    hooks = [
        [
            (kind, key, id(hook))
            for kind, registry in vars(module).items()
            if "_hooks" in kind and isinstance(registry, Mapping)
            for key, hook in registry.items()
        ]
        for module in modules
    ]
    return Anatomy(
        [name for name, _ in model.named_modules()],
        list(model.state_dict()),
        [type(module) for module in modules],
        [sorted(vars(module)) for module in modules],
        hooks,
        [module.training for module in modules],
        [id(parameter) for parameter in model.parameters()],
    )


class Census(TorchDispatchMode):
    """Every activation kernel that runs, and whether a gate then saw its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._gate = regimewrap.gate_of(model)
        self._paths = {id(module): (path, type(module).__name__) for path, module in model.named_modules()}
        self._stack: list[nn.Module] = []
        self._gated: Counter[tuple[int, int]] = Counter()
        self._calls: Counter[str] = Counter()  # of modules, by path, and of gates, by the site's name
        self._gates: Counter[str] = Counter()
        # Outputs are kept, so that no later one gets their memory.
        self._ran: list[tuple[str, str, str, Tensor]] = []
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> Census:
        self._gate.observers.append(self._saw)
        self._hooks.callback(self._gate.observers.remove, self._saw)
        for handle in (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ):
            self._hooks.callback(handle.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def _enter(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002  torch fixes the signature
        self._stack.append(module)
        self._calls[self._paths.get(id(module), ("", ""))[0]] += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002  torch fixes the signature
        self._stack.pop()

    def _saw(self, site: Any, before: Tensor, after: Tensor) -> None:  # noqa: ARG002  an Observer
        self._gated[_place(before)] += 1
        self._gates[site.name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2].rstrip("_")
        name = name if name in KERNELS else func._schema.name.partition("::")[2]
        if name in KERNELS and not (name == "hardtanh" and args[1:] not in ((0.0, 6.0), (0, 6))):
            path, module = self._paths.get(id(self._stack[-1]), ("?", "?")) if self._stack else ("", "?")
            output = result[0] if isinstance(result, tuple) else result
            self._ran.append((path, module, name, output))
        return result

    def escaped(self, plan: Plan) -> list[str]:
        """Name the kernels whose output no gate saw, but for those in modules where ``plan`` leaves their kind alone.

        Inside an activation module that is gated as a whole, such as a squared ReLU, kernels need no gate of their own.
        """
        gated = self._gated.copy()
        excused = {(row.activation.module, row.activation.kind) for row in plan if not row.gated}
        whole = {
            row.name for row in plan.gated if row.mechanism == "hook" and self._gates[row.name] == self._calls[row.name]
        }
        missing = []
        for path, module, name, output in self._ran:
            if gated[_place(output)]:
                gated[_place(output)] -= 1
            elif path not in whole and (path, KERNELS[name]) not in excused:
                missing.append(f"{path} ({module}): {name}")
        return missing


def _place(value: Tensor) -> tuple[int, int]:
    return value.data_ptr(), value.numel()
