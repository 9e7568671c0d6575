"""What a budget saves on this machine: the user's own model dense, by its rivals, and served; whole forward passes."""

from __future__ import annotations

import copy
import importlib
import io
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from regimewrap.errors import RegimewrapError, ServeError
from regimewrap.files import Table, Tabled
from regimewrap.policy.policy import PolicyLike
from regimewrap.serve.serving import serve
from regimewrap.sites.probe import as_call, untouched
from regimewrap.torch_private import tree_leaves
from regimewrap.wrap import wrap

#: Names of the rivals whose outputs are those of the dense model; int8's are near them.
EXACT = ("dense eager", "dense compiled", "onnxruntime")
_WARM, _LEAST = 2, 3


@final
@dataclass(frozen=True)
class Rival:
    """One way to run a model.

    Attributes:
        name: what it is.
        ms: median milliseconds of a forward pass; NaN if it did not run.
        spread_ms: from the first quartile to the third.
        note: why it did not run, or what to know about it.
    """

    name: str
    ms: float = float("nan")
    spread_ms: float = float("nan")
    note: str = ""


@final
@dataclass(frozen=True)
class Bench(Tabled):
    """Rivals at one batch size, timed in turn, round by round. Prints as a table, with a verdict."""

    batch: int
    keep_ratio: float
    rivals: tuple[Rival, ...]

    @property
    def best_dense(self) -> Rival:
        """The fastest whose output is the dense model's."""
        return min(
            (each for each in self.rivals if each.name in EXACT and each.ms == each.ms), key=lambda each: each.ms
        )

    @property
    def sparse(self) -> Rival:
        """The served model."""
        return self.rivals[-1]

    @property
    def verdict(self) -> str:
        """Whether it is worth it here, in a sentence."""
        best, sparse = self.best_dense, self.sparse
        if sparse.ms != sparse.ms:
            return f"batch {self.batch}: nothing to serve. {sparse.note}"
        ratio = best.ms / sparse.ms
        if ratio <= 1.0:
            return (
                f"batch {self.batch}: not worth it on this machine: {best.name} takes {best.ms:.2f} ms, served at keep "
                f"ratio {self.keep_ratio:g} takes {sparse.ms:.2f} ms."
            )
        return (
            f"batch {self.batch}: served at keep ratio {self.keep_ratio:g} is {ratio:.2f} times as fast as {best.name}."
        )

    def _table(self) -> Table:
        best = self.best_dense.ms
        rows: list[tuple[str, ...]] = [(f"batch {self.batch}", "median ms", "spread ms", "to best dense")]
        for each in self.rivals:
            ran = each.ms == each.ms
            figures = (f"{each.ms:.2f}", f"{each.spread_ms:.2f}", f"{best / each.ms:.2f}") if ran else ("-", "-", "-")
            rows.append((each.name, *figures, each.note))
        return Table(rows, self.verdict, left=(0, 4))


def bench(
    model: nn.Module,
    example_inputs: Any,
    keep_ratio: float = 0.1,
    *,
    rounds: int = 15,
    policy: PolicyLike | None = None,
) -> Bench:
    """Time a model dense, by its rivals, and served at a budget.

    Args:
        model: not wrapped; copies of it are timed, in eval mode and on the CPU, and it stays as it is.
        example_inputs: what it is called with: a tensor, a tuple of arguments or a dict of keywords.
        keep_ratio: the budget, a fraction in (0, 1].
        rounds: forward passes of each rival, in turn.
        policy: as for ``wrap``.

    Returns:
        Milliseconds of each. A rival that cannot run says why.

    Raises:
        ServeError: fewer than 3 rounds.
    """
    if rounds < _LEAST:
        raise ServeError(f"rounds must be at least {_LEAST}, for a median; got {rounds}.")
    bare = copy.deepcopy(model).eval().requires_grad_(False)
    wrapped = wrap(copy.deepcopy(bare), policy)
    args, kwargs = as_call(example_inputs)
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    batch = len(tensors[0]) if tensors and tensors[0].ndim else 1
    runs: dict[str, Callable[[], object]] = {"dense eager": lambda: bare(*args, **kwargs)}
    notes: dict[str, str] = {}

    def offer(name: str, make: Callable[[], Callable[[], object]]) -> None:
        try:
            runs[name] = make()
            runs[name]()
        except ModuleNotFoundError as error:
            notes[name] = f"{error.name} is not installed"
        except Exception as error:  # noqa: BLE001  whatever a rival throws, the others go on
            runs.pop(name, None)
            lines = str(error).strip().splitlines()
            notes[name] = f"{type(error).__name__}: {lines[0][:90] if lines else 'no message'}"

    with untouched(bare), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        offer("dense compiled", lambda: _compiled(bare, args, kwargs))
        offer("onnxruntime", lambda: _onnxruntime(bare, args, kwargs))
        offer("int8 dynamic", lambda: _int8(bare, args, kwargs))
        notes.setdefault("int8 dynamic", "its outputs differ; linear layers only")
        served = None
        try:
            served = serve(wrapped, keep_ratio, example_inputs=example_inputs)
            runs[name := f"served at {keep_ratio:g}"] = lambda: wrapped(*args, **kwargs)
            skipping = [layer for layer in served.layers if layer.sparse]
            notes[name] = f"{len(skipping)} of {len(served.layers)} layers skip zeros"
        except RegimewrapError as error:
            notes[f"served at {keep_ratio:g}"] = str(error)
        times = _in_turn(runs, rounds)
        if served is not None:
            served.close()
    names = ("dense eager", "dense compiled", "onnxruntime", "int8 dynamic", f"served at {keep_ratio:g}")
    return Bench(batch, keep_ratio, tuple(_rival(name, times.get(name), notes.get(name, "")) for name in names))


def with_memory(model: nn.Module) -> nn.Module:
    """Give a model that was built without memory random weights, which take as long as trained ones."""
    if not any(each.is_meta for each in model.parameters()):
        return model
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                # Scales and variances are vectors; matrices must not let sums grow from layer to layer.
                fan = tensor[0].numel() if tensor.ndim > 1 else 0
                tensor.normal_(0.0, (2.0 / fan) ** 0.5) if fan else tensor.fill_(1.0)
            else:
                tensor.zero_()
    return model


def _in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(_WARM + rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if i >= _WARM:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def _rival(name: str, times: list[float] | None, note: str) -> Rival:
    if times is None:
        return Rival(name, note=note)
    low, middle, high = statistics.quantiles(times, n=4)
    return Rival(name, middle, high - low, note)


def _compiled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    compiled = torch.compile(model)
    return lambda: compiled(*args, **kwargs)


def _int8(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    quantise: Any = torch.ao.quantization.quantize_dynamic
    quantised = quantise(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return lambda: quantised(*args, **kwargs)


def _onnxruntime(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    onnxruntime: Any = importlib.import_module("onnxruntime")  # no extra of ours: it is timed where it is installed
    export: Any = torch.onnx.export
    file = io.BytesIO()
    export(model, args, file, kwargs=kwargs, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    values = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    feed = {node.name: value.numpy() for node, value in zip(session.get_inputs(), values, strict=True)}
    return lambda: session.run(None, feed)
