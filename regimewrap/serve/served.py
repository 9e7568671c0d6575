"""A model while it is served: what its layers call, and the handle that prints, moves and ends it.

The only file of this room that changes a model: served layers get a ``forward`` of their own, and lose it again.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import Any, NoReturn, Self, final

import torch
from torch import Tensor, nn

from regimewrap import torch_private
from regimewrap.errors import ServeError
from regimewrap.files import Table, Tabled
from regimewrap.gate.gate import TopKGate, at_keep_ratio
from regimewrap.policy.policy import require_ratio
from regimewrap.serve.calibration import Calibration
from regimewrap.serve.candidates import Candidate
from regimewrap.serve.choice import Choice
from regimewrap.serve.layers import Product
from regimewrap.serve.lean import LeanSelection
from regimewrap.serve.partners import Links
from regimewrap.serve.table import ServedLayer, served_table

#: The attribute of a gate that says who serves its model.
SERVED_ATTRIBUTE = "served"


class SparseForward:
    """What a served layer calls in place of its class's ``forward``."""

    def __init__(self, name: str, product: Product, served: Served) -> None:
        self.name, self.product, self.served = name, product, served
        self.choices: dict[tuple[float, float, int], Choice] = {}

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002  the name that torch gave it
        """Return what the layer returns."""
        module, served = self.product.module, self.served
        if torch.is_grad_enabled() or module.training:
            served._refuse_training(self.name, module.training)
        if _cannot_run_kernels(input):
            return self._dense(input)
        positions = self.product.positions(input)
        if positions == 0 or input.numel() == 0:
            return self._dense(input)
        choice = self.choice(served.gate, positions, self.product.units(input))
        clock = device_clock if input.is_cuda else time.perf_counter
        return choice.call(lambda: self._dense(input), lambda most: self.product(input, most), served._kind, clock)

    def choice(self, gate: TopKGate, positions: int, units: int) -> Choice:
        """Return what is known at the keep ratio in force, for about this many positions."""
        key = (
            self.served.keep_ratio,
            float(gate.keep_ratio),
            positions if positions <= 8 else 1 << (positions - 1).bit_length(),
        )
        return self.choices.get(key) or self.choices.setdefault(key, Choice(units))

    def _dense(self, x: Tensor) -> Tensor:
        module = self.product.module
        result: Tensor = type(module).forward(module, x)
        return result

    def difference(self, x: Tensor) -> float:
        """Return how far the sparse result is from the dense one, relative to the largest output."""
        dense = self.product.needed(self._dense(x))
        sparse, _ = self.product(x, math.inf)
        if sparse is None:
            return math.inf
        if sparse.shape != dense.shape or sparse.dtype != dense.dtype:
            return math.inf
        same = (dense == sparse) | (dense.isnan() & sparse.isnan())
        apart = torch.where(same, 0.0, (dense.double() - sparse.double()).abs()).max()
        finite = dense[dense.isfinite()]
        return float(apart / finite.abs().max().clamp(min=1e-30)) if finite.numel() else float(apart)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise ServeError(_NOT_NOW.format("copied"))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ServeError(_NOT_NOW.format("pickled"))


_NOT_NOW = (
    "a model cannot be {} while it is served; close what regimewrap.serve returned first, or take its state_dict."
)


@final
class Served(Tabled):
    """A model that skips zeros, until ``close`` or the end of a ``with`` block. Prints as a table, a row a layer.

    Attributes:
        gate: the gate of the model.
        layers: a row for each layer that was looked at.
        dense_ms: least milliseconds of the whole model on the example inputs, dense and at the full budget.
        served_ms: the same as it is served.
        measured_ratio: the keep ratio that these two were taken at.

    >>> model = regimewrap.wrap(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))).eval()
    >>> with torch.no_grad(), regimewrap.serve(model, 0.2, example_inputs=torch.randn(1, 4)) as served:
    ...     served.keep_ratio = 0.1
    >>> served.closed
    True
    """

    def __init__(
        self, model: nn.Module, gate: TopKGate, found: list[Candidate], calibration: Calibration | None
    ) -> None:
        self.gate = gate
        self.dense_ms = self.served_ms = self.measured_ratio = math.nan
        self._model, self._found, self._calibration = model, found, calibration
        self._ratio, self._thresholds = 1.0, gate.thresholds
        self._kind: str | None = None
        self._block, self._links = ExitStack(), Links(gate)
        self._forwards: dict[str, SparseForward] = {}
        self._shown: dict[str, tuple[int, int]] = {}
        self._selection: dict[str, list[float]] = {}

    @property
    def keep_ratio(self) -> float:
        """The budget at which the model is served; set it at any time, layers then choose anew in their next calls."""
        return self._ratio

    @keep_ratio.setter
    def keep_ratio(self, keep_ratio: float) -> None:
        if self.closed:
            raise ServeError("this was closed; call regimewrap.serve again.")
        ratio = require_ratio("keep_ratio", keep_ratio)
        if self._calibration is not None:
            self.gate.set_thresholds(self._calibration.thresholds(ratio))
        else:
            before, self._block = self._block, ExitStack()
            self._block.enter_context(at_keep_ratio(self._model, ratio))
            before.close()
        self._ratio = ratio

    @property
    def closed(self) -> bool:
        """Whether the model is as it was before."""
        return getattr(self.gate, SERVED_ATTRIBUTE, None) is not self

    @property
    def copied_bytes(self) -> int:
        """Memory that copies of weights take, one for each layer that skips zeros."""
        return sum(forward.product.laid.bytes for forward in self._forwards.values())

    @property
    def layers(self) -> list[ServedLayer]:
        """What is known of each layer at the keep ratio in force, on inputs like the examples."""
        return [self._row(each) for each in self._found]

    def close(self) -> None:
        """Let the model do what it did before; its memory is given back. A second call does nothing."""
        if self.closed:
            return
        for forward in self._forwards.values():
            if forward.product.module.__dict__.get("forward") is forward:
                del forward.product.module.__dict__["forward"]
        self._links.close()
        self._block.close()
        if self._calibration is not None:
            self.gate.thresholds = self._thresholds
        for attribute in (SERVED_ATTRIBUTE, "_select"):
            self.gate.__dict__.pop(attribute, None)
        self._forwards = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._forwards)} of {len(self._found)} layers may skip zeros"
        return f"Served({type(self._model).__name__}, keep_ratio={self.keep_ratio:g}, {state})"

    def _table(self) -> Table:
        return served_table(self, type(self._model).__name__)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise ServeError(_NOT_NOW.format("copied"))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ServeError(_NOT_NOW.format("pickled"))

    def _open(self, keep_ratio: float) -> None:
        setattr(self.gate, SERVED_ATTRIBUTE, self)
        self.gate.__dict__["_select"] = LeanSelection(self.gate)
        self.keep_ratio = keep_ratio
        for each in self._found:
            if each.product is not None:
                forward = SparseForward(each.name, each.product, self)
                each.module.__dict__["forward"] = self._forwards[each.name] = forward
            if each.link is not None:
                parent = each.name.rpartition(".")[0]
                self._links.add(each.site, each.link, self._model.get_submodule(parent))

    def _choices(self) -> list[Choice]:
        """Return what is known of the layers at the keep ratio in force, on inputs like the examples."""
        return [
            forward.choice(self.gate, *self._shown[name])
            for name, forward in self._forwards.items()
            if name in self._shown
        ]

    def _refuse_training(self, name: str, training: bool) -> NoReturn:
        if training:
            raise ServeError(f"{name} is in training mode while it is served; call model.eval(), or close to train.")
        raise ServeError(
            f"{name}: a served model computes no gradients; run it under torch.no_grad() or torch.inference_mode()."
        )

    def _row(self, each: Candidate) -> ServedLayer:
        forward = self._forwards.get(each.name)
        if forward is None:
            return ServedLayer(each.name, why=each.why_not or "closed")
        shape = self._shown.get(each.name)
        choice = forward.choice(self.gate, *shape) if shape else Choice(1)
        select = self._selection.get(each.name)
        return ServedLayer(
            each.name,
            density=choice.density,
            dense_ms=choice.dense_ms,
            sparse_ms=choice.sparse_ms,
            select_ms=1e3 * min(select) if select else math.nan,
            most_density=None if choice.most is None else min(choice.most / max(choice.units, 1), 1.0),
        )


def device_clock() -> float:
    """Return seconds on a clock, once the GPU has done what it was asked for."""
    torch.cuda.synchronize()
    return time.perf_counter()


def _cannot_run_kernels(x: Tensor) -> bool:
    """Say whether something other than plain eager torch looks at this call."""
    return (
        type(x) is not Tensor
        or torch.compiler.is_compiling()
        or torch_private.is_jit_tracing()
        or torch_private.has_dispatch_modes()
        or torch_private.has_functorch_transforms()
        or x.device.type not in ("cpu", "cuda")
    )
