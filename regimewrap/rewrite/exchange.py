"""New code in the place of a function's own, for as long as a wrapped module needs it.

Python lets a function have other code, so every holder of the function sees it: bound methods, partials, decorators,
lists, ``super()``. Classes stay the user's. The code is shared by all modules of the class and asks each for its
``Sites``; one without does what it always did, for the price of one attribute. The objects of ``Sites`` that live
decide when the old code comes back, so copies of a module, and what is read from a file, count like the module itself.
"""

from __future__ import annotations

import sys
import threading
import types
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from regimewrap.gate.compiled import forget_compiled
from regimewrap.gate.gate import SITES_ATTRIBUTE
from regimewrap.rewrite.source import Edits, copied, digest_of, key_of, rewritten
from regimewrap.sites.read.code import EXCHANGED, Span, body_of

#: By the key of a call: the plain function that is called, and its copy with gates.
Copies = dict[str, tuple[types.FunctionType, types.FunctionType]]


@dataclass(frozen=True)
class Copied:
    """A plain function of which a method calls a copy with gates in it; the function itself stays as it is.

    Attributes:
        function: the function, at the top level of a module, so that a file can name it.
        spans: where it is called.
        edits: what changes in the copy.
        inside: the functions that the copy in turn calls in a copy.
        digest: of its source.
    """

    function: types.FunctionType
    spans: tuple[Span, ...]
    edits: Edits
    inside: tuple[Copied, ...]
    digest: str

    @property
    def unchanged(self) -> bool:
        """Whether its source, and that of those inside, is what it was when this was made."""
        return digest_of(body_of(self.function)) == self.digest and all(each.unchanged for each in self.inside)

    def home(self, above: str) -> str:
        """Return what the keys of its sites begin with."""
        return f"{above}>{self.function.__module__}.{self.function.__qualname__}"


@dataclass(frozen=True)
class Part:
    """One method whose code asks for sites: the class whose dictionary holds it, its name, and what changes."""

    owner: type
    name: str
    edits: Edits
    copies: tuple[Copied, ...]
    digest: str

    def find(self) -> types.FunctionType:
        """Return the function, below its decorators."""
        return body_of(vars(self.owner)[self.name])

    @property
    def home(self) -> str:
        """What the keys of its sites begin with: the function's own name, for classes may share one."""
        function = self.find()
        return f"{function.__module__}.{function.__qualname__}"

    @property
    def unchanged(self) -> bool:
        """Whether the source, and that of the copied functions, is what it was when this was made."""
        return digest_of(self.find()) == self.digest and all(each.unchanged for each in self.copies)

    def build(self, edits: Edits) -> types.CodeType:
        """Return new code for the function, with these edits."""
        return rewritten(self.find(), self.owner.__name__, self.home, edits)


def copies_of(home: str, redirected: Sequence[Copied]) -> Copies:
    """Return, by the key of each call, a plain function and its copy; for the functions inside these too.

    Raises:
        NotRewritableError: a function cannot be copied with gates in it.
    """
    result: Copies = {}
    for each in redirected:
        inside = each.home(home)
        twin = copied(each.function, inside, each.edits)
        result |= {key_of(home, span): (each.function, twin) for span in each.spans}
        result |= copies_of(inside, each.inside)
    return result


_LOCK = threading.RLock()  # one thread, or the collector, may free a module while another one is wrapped


class _Exchange:
    """A function whose code is exchanged: its own code, what changes in it, and which sites need that."""

    def __init__(self, function: types.FunctionType) -> None:
        self.original = function.__code__
        self._edits = Edits()
        self._copies: dict[Copied, Copies] = {}
        self._users: set[weakref.ref[object]] = set()
        self._function = weakref.ref(function)

    def admit(self, user: object, part: Part) -> Copies:
        """Add the edits of ``part`` while ``user`` lives; return the copies of plain functions that they call."""
        # Before all else: other users may be collected at any moment, and the last one puts the old code back.
        reference = weakref.ref(user, self._let_go)
        self._users.add(reference)
        function = part.find()
        try:
            for each in part.copies:
                if each not in self._copies:
                    self._copies[each] = copies_of(part.home, (each,))
            edits = self._edits | part.edits
            code = part.build(edits) if edits != self._edits else None
        except BaseException:
            self._let_go(reference)
            raise
        EXCHANGED[function] = self
        # A module without sites finds this on the class; without it, the miss would take microseconds.
        setattr(nn.Module, SITES_ATTRIBUTE, None)
        if code is not None:
            self._edits, function.__code__ = edits, code
            # Compiled code may contain this function, without a guard for sites that come later.
            forget_compiled()
        return {key: both for each in part.copies for key, both in self._copies[each].items()}

    def _let_go(self, reference: weakref.ref[object]) -> None:
        if sys.is_finalizing():  # modules are being emptied; there is nothing to put back
            return
        with _LOCK:
            self._users.discard(reference)
            function = self._function()
            if not self._users and function is not None and EXCHANGED.get(function) is self:
                self._edits, function.__code__ = Edits(), self.original
                del EXCHANGED[function]
            if not EXCHANGED and SITES_ATTRIBUTE in vars(nn.Module):
                delattr(nn.Module, SITES_ATTRIBUTE)


def put_in_place(user: object, part: Part) -> Copies:
    """Exchange a method's code as long as ``user`` lives.

    Returns:
        The plain functions that the code calls in a copy.

    Raises:
        NotRewritableError: the source is not what runs; nothing has changed then.
    """
    function = part.find()
    with _LOCK:
        exchange = EXCHANGED.get(function) or _Exchange(function)
        return exchange.admit(user, part)
