"""What really runs: every activation of one forward pass, with the name that the plan has for it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from regimewrap import topk
from regimewrap.sites import catalog
from regimewrap.sites.finder import Activation
from regimewrap.sites.probe import Shapes

#: A file, and in it first and last line, first and last column.
_Place = tuple[str, int | None, int | None, int | None, int | None]

#: How many callers are searched for code that the plan knows; torch's own functions are a few deep.
_UP = 16


class Ran(NamedTuple):
    """One activation that ran: its name in the plan, or the nearest name there is, and what it returned."""

    activation: Activation
    output: Any
    planned: bool


class Census(TorchFunctionMode):
    """Watches one forward pass in this thread.

    Args:
        root: the model; names are those in it.
        planned: its activations, as far as they are known.
        before_gate: returns, for a module and what it returned, what its activation gave before a gate changed that.

    Attributes:
        ran: every activation that ran and did not raise.
        called: dotted names of the modules that ran.
        shapes: what they took and returned.
    """

    def __init__(
        self,
        root: nn.Module,
        planned: Sequence[Activation],
        before_gate: Callable[[nn.Module, Any], Any] = lambda _, output: output,
    ) -> None:
        super().__init__()
        # Tensors are kept, so that no other one takes their identity meanwhile.
        self.ran: list[Ran] = []
        self.called: set[str] = set()
        self.shapes = Shapes()
        self.stack: list[nn.Module] = []
        self.root = root
        self._before_gate = before_gate
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._thread = threading.get_ident()
        self._by_name = {each.name: each for each in planned if each.method is None}
        self._by_place: dict[tuple[str, _Place], Activation] = {}
        for each in planned:
            if each.code is not None and each.call is not None:
                first, start, last, end = each.call.span
                line = each.code.co_firstlineno - 1
                place = each.code.co_filename, first + line, last + line, start, end
                self._by_place.setdefault((each.module, place), each)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").partition(".")[0]  # relu.default
        # Functions inside a gate's operator are no activations of the model.
        own = str(sys._getframe(2).f_globals.get("__name__")).startswith(f"{topk.__name__}.")
        kind = catalog.kind_of_function(func) if not own else None
        inside = self.stack[-1] if self.stack else self.root
        if kind is not None and catalog.kind_of_module(inside) is None:
            path = self._paths.get(id(inside), type(inside).__name__)
            found = self._planned(path)
            if found is None:
                self._saw(Activation(f"{path}.{name}" if path else name, name, kind, path), result, planned=False)
            else:
                self._saw(found, result, planned=True)
        return result

    def _planned(self, path: str) -> Activation | None:
        """Return the activation that the plan has for the code that is running, if it has one."""
        frame = sys._getframe(2)
        for _ in range(_UP):
            for position in list(frame.f_code.co_positions())[frame.f_lasti // 2 : frame.f_lasti // 2 + 1]:
                found = self._by_place.get((path, (frame.f_code.co_filename, *position)))
                if found is not None:
                    return found
            if frame.f_back is None:
                break
            frame = frame.f_back
        return None

    def _saw(self, activation: Activation, output: Any, *, planned: bool) -> None:
        self.ran.append(Ran(activation, output, planned))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs in this thread."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002  torch's signature
        if threading.get_ident() == self._thread:
            self.stack.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        if self.stack and self.stack[-1] is module:
            self.stack.pop()
        path = self._paths.get(id(module))
        if path is not None:
            self.called.add(path)
            self.shapes.record(path, args, output)
        output = self._before_gate(module, output)
        kind = catalog.kind_of_module(module)
        if kind is None or output is None:  # it raised
            return
        label = type(module).__name__
        if path is None and self.stack:  # made during the pass, by the code of the module around it
            around = self._paths.get(id(self.stack[-1]), "")
            found = self._planned(around)
            made = found or Activation(f"{around}.{label}" if around else label, label, kind, around)
            self._saw(made, output, planned=found is not None)
        else:
            name = (path if path is not None else label) or label
            found = self._by_name.get(name)
            self._saw(found or Activation(name, label, kind, path or ""), output, planned=found is not None)
