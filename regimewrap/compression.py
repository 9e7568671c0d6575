"""``compressed_activations``: what backward needs of gated activations, kept small between the two passes.

A gated activation is mostly zeros, and autograd keeps it whole until backward. Inside the context torch's hooks for
saved tensors replace what can be rebuilt bit for bit: a gated activation by a bitmask and its values, the output of a
ReLU that only its own backward needs by its signs, and the product of two tensors that are kept anyway by a note to
multiply them again. It never decides what is gated, and never changes a value.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from regimewrap.gate import gate_of
from regimewrap.topk.packed import Packed, Signs, require_unchanged
from regimewrap.topk.selection import DTYPES

#: Gated tensors that may wait for their count on a device, so that the host queues work meanwhile.
_UNSETTLED = 2
#: In the metadata of an autograd node: its output is a gated activation.
_MARK = "regimewrap.gated"
#: Operators that make zero of zero: what they made of a gated activation is worth packing too. That it was packed
#: never changes what is unpacked, so a name too many costs time only.
_KEEP_ZEROS = frozenset(
    f"{name}Backward{version}"
    for name in ("Clone", "Div", "Mul", "NativeDropout", "Permute", "T", "ToCopy", "Transpose", "UnsafeView", "View")
    for version in (0, 1)
) | {"ReshapeAliasBackward0", "_UnsafeViewBackward0", "_ReshapeAliasBackward0"}


@contextmanager
def compressed_activations(model: nn.Module) -> Iterator[None]:
    """Keep the gated activations of the forward passes inside the block compressed until backward.

    Args:
        model: a wrapped model, or a module around one. Put its forward pass into the block; backward may be inside or
            outside.

    Gradients are the same bit for bit. A gated activation takes one bit a unit and its non-zero values, shared by all
    layers that save it or a view of it; its zeros are found by looking, so it is stored as it is where that is smaller,
    and nothing is done at full budget. Saved products of two saved tensors, as in a norm written in Python, are
    multiplied again. Everything else is kept as it is.

    On the CPU packing is compiled if the extra ``fast`` is installed. On a GPU the host waits for the number of values
    of each activation, two activations behind the device, so the device does not run dry. Compiled code and the inside
    of a checkpoint keep what they keep. The block counts for the thread that entered it; blocks nest, also for several
    models. ``torch.func.grad`` and its kin do not work with such hooks, and torch says so.

    Raises:
        NotWrappedError: the model is not wrapped.
        WrapError: several wrapped models are inside ``model``.
    """
    if torch.compiler.is_compiling():
        yield
        return
    gate = gate_of(model)
    outermost = getattr(_ACTIVE, "keeper", None) is None
    keeper: _Keeper = _Keeper() if outermost else _ACTIVE.keeper
    _ACTIVE.keeper = keeper
    gate.listeners.append(keeper.saw_gate)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keeper.pack, _unpack):
            yield
    finally:
        gate.listeners.remove(keeper.saw_gate)
        if outermost:
            _ACTIVE.keeper = None
            keeper.settle(0)


_ACTIVE = threading.local()


class _Kept(Protocol):
    """One way of keeping a tensor."""

    def tensor(self) -> Tensor:
        """Return it, without autograd history."""
        ...


@final
class _Dense(NamedTuple):
    """The tensor itself, and its version when it was saved."""

    saved: Tensor
    version: int

    def tensor(self) -> Tensor:
        require_unchanged(self.saved, self.version)
        return self.saved


@final
class _View(NamedTuple):
    """A view of memory that is packed."""

    memory: Packed | Signs
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, memory: Packed | Signs, tensor: Tensor) -> _View:
        return cls(memory, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def tensor(self) -> Tensor:
        return self.memory.unpack().as_strided(self.size, self.stride, self.offset)


@final
class _Product(NamedTuple):
    """Two kept tensors, to be multiplied again."""

    left: Saved
    right: Saved

    def tensor(self) -> Tensor:
        return torch.mul(self.left.kept.tensor(), self.right.kept.tensor())


@final
class Saved:
    """What autograd holds in place of a tensor; how that is kept may become cheaper while it holds it."""

    __slots__ = ("__weakref__", "kept")

    def __init__(self, kept: _Kept) -> None:
        self.kept = kept


def _unpack(saved: Saved) -> Tensor:
    with torch.no_grad():
        return saved.kept.tensor()


class _Gated:
    """Memory that holds a gated activation, as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # While this exists no other storage gets the same identity.
        self.storage = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.version, self.dtype = tensor._version, tensor.dtype
        self.packed: weakref.ref[Packed] | None = None

    def is_alive(self) -> bool:
        return not self.storage.expired()  # type: ignore[no-untyped-call]

    def holds(self, tensor: Tensor) -> bool:
        return tensor._version == self.version and tensor.dtype == self.dtype


@final
class _Keeper:
    """The hooks of one thread, for as many models and nested blocks as there are."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._gated: dict[int, _Gated] = {}
        self._many = 64
        # The last saved tensor on each storage that is kept dense; that keeps the storage and so its identity.
        self._dense: weakref.WeakValueDictionary[int, Saved] = weakref.WeakValueDictionary()
        self._unsettled: deque[Packed] = deque()

    def saw_gate(self, before: Tensor, after: Tensor) -> None:
        """Take notice of an activation's output and of what the gate made of it."""
        if threading.get_ident() != self._thread or not torch.is_grad_enabled() or not _fills_its_memory(after):
            return
        if after.grad_fn is not None:
            _metadata(after.grad_fn)[_MARK] = True
        storage = after.untyped_storage()._cdata
        gated = self._note(after)
        with torch.no_grad():
            saved = self._dense.get(storage)  # by the gate
            if saved is not None and isinstance(saved.kept, _Dense) and gated.version == saved.kept.version:
                saved.kept = self._view(saved.kept.saved, gated)
                del self._dense[storage]
            if before is not after and _fills_its_memory(before):
                _keep_signs_for_relu(before)

    def pack(self, tensor: Tensor) -> Saved:
        """Say how to keep a tensor that autograd saves."""
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
            return Saved(_Dense(tensor.detach(), tensor._version))
        storage = tensor.untyped_storage()._cdata
        gated = self._gated.get(storage)
        if gated is None or not gated.holds(tensor):
            gated = self._note(tensor) if _keeps_zeros_of_a_gate(tensor) else None
        product = _product(tensor)
        if product is not None:
            return Saved(product)
        if gated is not None:
            return Saved(self._view(tensor, gated))
        saved = Saved(_Dense(tensor.detach(), tensor._version))
        self._dense[storage] = saved
        return saved

    def settle(self, remaining: int) -> None:
        """Pack all but the newest tensors that wait for their count."""
        while len(self._unsettled) > remaining:
            with torch.no_grad():
                self._unsettled.popleft().settle()

    def _note(self, tensor: Tensor) -> _Gated:
        if len(self._gated) >= self._many:
            self._gated = {key: gated for key, gated in self._gated.items() if gated.is_alive()}
            self._many = 64 + 2 * len(self._gated)
        gated = self._gated[tensor.untyped_storage()._cdata] = _Gated(tensor)
        return gated

    def _view(self, tensor: Tensor, gated: _Gated) -> _View:
        memory = gated.packed() if gated.packed is not None else None
        if memory is None:
            memory = Packed(_memory(tensor))
            gated.packed = weakref.ref(memory)
            self._unsettled.append(memory)
            self.settle(0 if tensor.is_cpu else _UNSETTLED)
        return _View.of(memory, tensor)


def _metadata(node: Any) -> dict[str, Any]:
    """Return what users may attach to an autograd node; torch declares a method and means an attribute."""
    metadata: dict[str, Any] = node.metadata
    return metadata


def _fills_its_memory(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return False
    plain = tensor.dtype in DTYPES and not tensor.is_neg()
    return plain and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _memory(tensor: Tensor) -> Tensor:
    n = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((n,), (1,), 0)


def _keeps_zeros_of_a_gate(tensor: Tensor) -> bool:
    """Whether ``tensor`` was made of a gated activation by what leaves zeros alone: a cast, dropout, a view."""
    node = tensor.grad_fn
    for _ in range(4):
        if node is None or node.name() not in _KEEP_ZEROS or not node.next_functions:
            return False
        node = node.next_functions[0][0]
        if node is not None and _MARK in _metadata(node):
            return _fills_its_memory(tensor)
    return False


def _product(tensor: Tensor) -> _Product | None:
    """Return the factors of a product if they are kept anyway, for the product's own backward."""
    node = tensor.grad_fn
    if node is None or node.name() != "MulBackward0" or tensor._version:
        return None
    left, right = _saved_by(node, "self"), _saved_by(node, "other")
    if left is None or right is None or isinstance(left.kept, _Product) or isinstance(right.kept, _Product):
        return None  # a long chain of products would be multiplied again from its start at each link
    return _Product(left, right)


def _keep_signs_for_relu(activation: Tensor) -> None:
    """Keep of a ReLU's output only what its own backward needs, once something else takes its place downstream."""
    node = activation.grad_fn
    if node is None or node.name() != "ReluBackward0":
        return
    saved = _saved_by(node, "result")
    if saved is not None and isinstance(saved.kept, _Dense) and saved.kept.version == activation._version:
        saved.kept = _View.of(Signs(_memory(activation)), activation)


def _saved_by(node: Any, name: str) -> Saved | None:
    """Return what an operator's node saved under a name, if a keeper packed it."""
    try:
        held = getattr(node, f"_raw_saved_{name}").data  # torch before 2.8 does not tell
    except (AttributeError, RuntimeError):
        return None
    return held if isinstance(held, Saved) else None
