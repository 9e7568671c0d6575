"""``serve``: find the layers that take gated activations, compare and time both ways, hand back what ends it."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regimewrap import torch_private
from regimewrap.errors import ServeError
from regimewrap.gate.gate import TopKGate, at_keep_ratio, gate_of
from regimewrap.measure.batchnorm import of_another_budget
from regimewrap.policy.policy import require_ratio
from regimewrap.serve.calibration import Calibration
from regimewrap.serve.candidates import Candidate, candidates
from regimewrap.serve.choice import ROUNDS
from regimewrap.serve.served import SERVED_ATTRIBUTE, Served, SparseForward, device_clock
from regimewrap.sites.probe import as_call, untouched
from regimewrap.topk.cpu import dispatch as selecting

#: Seconds after which no further round is begun, once there are enough to choose.
_LONG = 10.0
#: Times of the whole model, served over dense, above which a warning says so.
_SLOWER = 1.1
#: How far a sparse result may be from the dense one, relative to the largest output.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


def serve(
    model: nn.Module, keep_ratio: float, *, example_inputs: Any, calibration: Calibration | None = None
) -> Served:
    """Run a wrapped model at a budget, and skip the zeros where that is faster on this machine.

    Each layer that is given a gated activation is timed dense and sparse while the model runs on the example inputs,
    and keeps what is faster; inputs of another size are timed in the first calls that bring them. Outputs are those of
    the gated model within the rounding of its sums. Parameters, keys, hooks and modules stay as they are.

    Args:
        model: a wrapped model on a CPU or a CUDA GPU, in eval mode. It is served in place, under ``torch.no_grad`` or
            ``torch.inference_mode``.
        keep_ratio: the budget, a fraction in (0, 1]; ``served.keep_ratio`` moves it later.
        example_inputs: what the model will be called with: a tensor, a tuple of arguments or a dict of keywords.
        calibration: thresholds that stand in for the selection, from ``calibrate``.

    Returns:
        A handle: print it, move its ``keep_ratio``, ``close()`` it or leave its ``with`` block.

    Raises:
        NotWrappedError: the model is not wrapped.
        PolicyError: the ratio is outside (0, 1], or outside what was calibrated.
        StateError: the calibration is of another model.
        ServeError: nothing can be served, the model is in training mode, compiled, or served already.

    >>> import torch, regimewrap
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 256), torch.nn.ReLU(), torch.nn.Linear(256, 4))
    >>> x = torch.randn(1, 8)
    >>> with torch.no_grad(), regimewrap.serve(regimewrap.wrap(net).eval(), 0.1, example_inputs=x) as served:
    ...     y = net(x)
    """
    gate = gate_of(model)
    ratio = require_ratio("keep_ratio", keep_ratio)
    _check(model, gate, example_inputs)
    if calibration is not None:
        calibration.apply(model, ratio).remove()  # refuses another model or ratio
    selecting.KERNELS.get()  # small activations alone would not load them
    found = candidates(model, example_inputs)
    if not any(each.product is not None for each in found):
        raise ServeError(_nothing(model, found))
    served = Served(model, gate, found, calibration)
    served._open(ratio)
    try:
        _measure(served, example_inputs)
    except BaseException:
        served.close()
        raise
    return served


def _check(model: nn.Module, gate: TopKGate, example_inputs: Any) -> None:
    name = type(model).__name__
    if getattr(gate, SERVED_ATTRIBUTE, None) is not None:
        raise ServeError(f"{name} is served already; set the keep_ratio of that, or close it first.")
    if torch_private.is_compiled_module(model) or any(map(torch_private.compiles_itself, model.modules())):
        raise ServeError(f"{name} is compiled, and compiled code has its own layers; serve the model without compile.")
    training = [path or name for path, module in model.named_modules() if module.training]
    if training:
        raise ServeError(f"{training[0]} is in training mode; call model.eval() first.")
    if example_inputs is None:
        raise ServeError(f"example_inputs must be what {name} is called with, to find and time its layers; got None.")


def _nothing(model: nn.Module, found: list[Candidate]) -> str:
    seen = "; ".join(f"{each.name or type(model).__name__}: {each.why_not}" for each in found[:8])
    more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
    return (
        f"{type(model).__name__} has no layer that can skip zeros. Looked at: {seen or 'no layer with a weight'}{more}."
    )


def _measure(served: Served, example_inputs: Any) -> None:
    """Compare both ways, time the layers in whole forward passes, then the whole model."""
    model = served._model
    on_gpu = any(each.is_cuda for each in model.parameters())
    clock = device_clock if on_gpu else time.perf_counter

    def timed() -> float:
        args, kwargs = _fresh(example_inputs)
        began = clock()
        model(*args, **kwargs)
        return clock() - began

    with untouched(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        with _compared(served):
            timed()
        began = time.perf_counter()
        with _selection_timed(served):
            for _ in range(ROUNDS):
                for served._kind in ("dense", "sparse"):
                    timed()
                if time.perf_counter() - began > _LONG:
                    break
        dense, gated, sparse = [], [], []
        for _ in range(ROUNDS):
            served._kind = "dense"
            with at_keep_ratio(model, 1.0):
                dense.append(timed())
            gated.append(timed())
            served._kind = None
            sparse.append(timed())
            if time.perf_counter() - began > 2 * _LONG:
                break
        served._kind = None
    skip_where_it_pays(served, min(gated), min(sparse))
    notice = of_another_budget(model, [served.keep_ratio])
    if notice is not None:
        warnings.warn(notice, RuntimeWarning, stacklevel=3)
    served.measured_ratio = served.keep_ratio
    served.dense_ms, served.served_ms = 1e3 * min(dense), 1e3 * min(*gated, *sparse)
    told = slower(served)
    if told:
        warnings.warn(told, stacklevel=3)


def skip_where_it_pays(served: Served, dense: float, sparse: float) -> None:
    """Let no layer skip zeros at the keep ratio in force where the whole model is not faster with those that do.

    A layer is timed by itself, and what it leaves to the next ones counts too: caches, and threads that wait.

    Args:
        served: what was measured.
        dense: seconds of the whole model at this keep ratio, all layers dense.
        sparse: seconds with the layers that are faster sparse.
    """
    if sparse >= dense:
        for choice in served._choices():
            choice.most = 0.0


def slower(served: Served) -> str:
    """Return a warning where serving does not pay, else nothing; times below a millisecond are told in the table."""
    name = type(served._model).__name__
    if all(row.most_density == 0.0 for row in served.layers if not row.why):
        return (
            f"no layer of {name} is faster sparse at keep ratio {served.keep_ratio:g} on this machine, so all run "
            "dense. print() what serve returned for the times; try a smaller ratio or a smaller batch."
        )
    if served.dense_ms > 1.0 and served.served_ms > _SLOWER * served.dense_ms:
        return (
            f"{name} takes {served.served_ms / served.dense_ms:.2f} times as long served at keep ratio "
            f"{served.keep_ratio:g} as dense at the full budget, on this machine: selecting costs more than skipping "
            "saves. print() what serve returned for the times; try one thread, a calibration or a smaller ratio."
        )
    return ""


def _fresh(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of one call; a cache among them grows with each call, so each gets a copy."""

    def own(value: Any) -> Any:
        return value if isinstance(value, Tensor) else copy.deepcopy(value)

    args, kwargs = as_call(example_inputs)
    return tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}


@contextmanager
def _compared(served: Served) -> Iterator[None]:
    """Run each layer both ways; one that differs stays dense. Lays out the weights, and compiles what is compiled."""
    handles = []
    for each in served._found:
        forward = served._forwards.get(each.name)
        if forward is not None:
            handles.append(each.module.register_forward_pre_hook(_comparing(served, each, forward)))
    served._kind = "dense"
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for forward in served._forwards.values():
            forward.choices.clear()
        for each in served._found:
            if each.name in served._forwards and each.why_not:
                del each.module.__dict__["forward"], served._forwards[each.name]


def _comparing(served: Served, each: Candidate, forward: SparseForward) -> Any:
    def compare(module: nn.Module, args: Any) -> None:  # noqa: ARG001  torch's signature
        x = args[0]
        served._shown[each.name] = forward.product.positions(x), forward.product.units(x)
        if served._shown[each.name][0] == 0 or x.numel() == 0:
            return
        difference = forward.difference(x)
        if not difference <= _TOLERANCE.get(x.dtype, 0.03):
            each.why_not = f"its sparse result differs from the dense one by {difference:.1e}"

    return compare


@contextmanager
def _selection_timed(served: Served) -> Iterator[None]:
    """Take down how long the gate worked for each layer: the last time before that layer was called."""
    gate, last = served.gate, [0.0]
    select = gate._select

    def timed(*args: Any, **kwargs: Any) -> Tensor:
        began = time.perf_counter()
        y = select(*args, **kwargs)
        last[0] = time.perf_counter() - began
        return y

    def note(name: str) -> Any:
        return lambda module, args: served._selection.setdefault(name, []).append(last[0])  # noqa: ARG005

    handles = [
        forward.product.module.register_forward_pre_hook(note(name)) for name, forward in served._forwards.items()
    ]
    gate.__dict__["_select"] = timed
    try:
        yield
    finally:
        gate.__dict__["_select"] = select
        for handle in handles:
            handle.remove()
