"""Layers that can skip the zeros of their input: which, why not the others, and their weights laid out for it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from regimewrap import torch_private
from regimewrap.errors import to_install
from regimewrap.serve import stock
from regimewrap.serve.choice import Found
from regimewrap.serve.cpu import dispatch as cpu
from regimewrap.serve.gpu import dispatch as gpu
from regimewrap.serve.partners import Link
from regimewrap.topk.selection import INTEGERS


class CannotSkip(Exception):  # noqa: N818  it says why a layer stays dense; no user sees it
    """A layer cannot skip zeros; the message says why."""


@final
class Laid:
    """A layer's weight laid out so that each input has a row of its own; never staler than the layer.

    Writes to a weight raise its version, and new weights have other memory. On a CPU, writes around both (through
    ``weight.data`` or numpy) are found by comparing the bits of 16 elements, spread evenly, in each call: a new
    ``weight.data`` is found, one element of it that is none of these is not. On a GPU that would wait for the device.
    """

    def __init__(self, module: nn.Module, lay: Callable[[Tensor], Tensor]) -> None:
        self._module, self._lay = module, lay
        self._lock = threading.Lock()
        self._state: tuple[Any, Any, Any, bytes, Tensor | None] | None = None

    def get(self) -> Tensor | None:
        """Return the weight as it is now, laid out; ``None`` if it is not finite: zero times infinity is not zero."""
        weight = self._module._parameters["weight"]
        if weight is None or weight.is_inference():
            return None
        stamp = weight.data_ptr(), torch_private.version_of(weight), weight.dtype, weight.shape
        state = self._state
        if state is None or state[0] != stamp or state[1][state[2]].tobytes() != state[3]:
            with self._lock:
                looked_at = weight.detach() if weight.device.type == "cpu" else torch.zeros(1, dtype=weight.dtype)
                bits = looked_at.view(INTEGERS[weight.dtype][0]).numpy()
                spread = torch.linspace(0, max(looked_at.numel() - 1, 0), 16, dtype=torch.float64).long()
                places = tuple(each.numpy() for each in torch.unravel_index(spread, looked_at.shape))
                seen = bits[places].tobytes()
                laid = self._lay(weight.detach()) if bool(torch.isfinite(weight).all()) else None
                state = self._state = stamp, bits, places, seen, laid
        return state[4]

    @property
    def bytes(self) -> int:
        """Memory of the copy; 0 where the layer's own weight serves."""
        laid = self._state[4] if self._state is not None else None
        weight: Any = self._module._parameters["weight"]
        return 0 if laid is None or laid.data_ptr() == weight.data_ptr() else laid.numel() * laid.element_size()


class Product:
    """A layer as a product with its laid out weight."""

    def __init__(self, module: nn.Module, lay: Callable[[Tensor], Tensor]) -> None:
        self.module = module
        self.laid = Laid(module, lay)

    def __call__(self, x: Tensor, most: float) -> tuple[Tensor | None, Found]:
        """Return what the layer makes of ``x``, and how many inputs are not zero.

        On a CPU the result is ``None`` if these are more than ``most``. On a GPU their number stays on the device.
        """
        raise NotImplementedError

    def positions(self, x: Tensor) -> int:
        """Return how many rows, pixels or steps ``x`` has; 0 where sparse is not even to be tried."""
        raise NotImplementedError

    def units(self, x: Tensor) -> int:
        """Return how many zeros could be skipped at most."""
        return x.numel()

    def needed(self, y: Tensor) -> Tensor:
        """Return what matters of the dense layer's output."""
        return y


@final
class LinearProduct(Product):
    """``nn.Linear``, and the transposed one that some transformers are made of.

    On a CPU float32 goes to the compiled kernels where these can be used, everything else to stock torch.
    """

    def __init__(self, module: nn.Module, transposed: bool) -> None:
        super().__init__(module, self._lay)
        self._transposed = transposed

    def _compiled(self, x: Tensor) -> bool:
        return x.dtype == torch.float32 and x.device.type == "cpu" and cpu.KERNELS.get() is not None

    def _lay(self, weight: Tensor) -> Tensor:
        weight_t = weight if self._transposed else weight.t()
        return cpu.laid_linear(weight_t) if self._compiled(weight) else weight_t.contiguous()

    def __call__(self, x: Tensor, most: float) -> tuple[Tensor | None, Found]:
        """See ``Product``."""
        laid = self.laid.get()
        weight: Any = self.module._parameters["weight"]
        outputs, inputs = weight.shape[::-1] if self._transposed else weight.shape
        if laid is None or x.dtype != weight.dtype or x.shape[-1] != inputs or x.device != weight.device:
            return None, x.numel()
        rows, bias = x.reshape(-1, inputs), self.module._parameters["bias"]
        if x.is_cuda:
            y, found = gpu.linear(rows.contiguous(), laid, bias)
        elif self._compiled(x):
            y, found = cpu.linear(rows, laid, bias, outputs, most)
        else:
            y, found = stock.rows(rows, laid, bias, most)
        return (None if y is None else y.reshape(*x.shape[:-1], outputs)), found

    def positions(self, x: Tensor) -> int:
        """See ``Product``; in stock torch many rows are hopeless."""
        rows = math.prod(x.shape[:-1])
        return rows if rows <= (gpu.MOST_ROWS if x.is_cuda else 32) or self._compiled(x) else 0


@final
class RowsProduct(Product):
    """``nn.Linear`` whose output is multiplied with a gated activation: it computes the rows that are not cut."""

    def __init__(self, module: nn.Module, link: Link) -> None:
        super().__init__(module, lambda w: w.contiguous())
        self._link = link

    def __call__(self, x: Tensor, most: float) -> tuple[Tensor | None, Found]:
        """See ``Product``; the rest of the output is zero."""
        weight, active = self.laid.get(), self._link.take()
        if weight is None or active is None or x.dtype != weight.dtype or x.shape[-1] != weight.shape[1]:
            return None, 0
        if active.shape != (*x.shape[:-1], len(weight)) or active.dtype != x.dtype:
            return None, 0
        bias = self.module._parameters["bias"]
        if not x.is_cuda:
            return cpu.some_rows(x, weight, bias, active, most)
        flat = (each.reshape(-1, each.shape[-1]).contiguous() for each in (x, active))
        y, found = gpu.some_outputs(next(flat), weight, bias, next(flat))
        return (None if y is None else y.view(active.shape)), found

    def positions(self, x: Tensor) -> int:
        """See ``Product``."""
        rows = math.prod(x.shape[:-1])  # each has rows of the weight of its own
        return rows if rows <= (gpu.MOST_ROWS if x.is_cuda else 32) else 0

    def units(self, x: Tensor) -> int:
        """See ``Product``."""
        weight: Any = self.module._parameters["weight"]
        return math.prod(x.shape[:-1]) * len(weight)

    def needed(self, y: Tensor) -> Tensor:
        """See ``Product``."""
        active = self._link.active
        return y if active is None or active.shape != y.shape else y.masked_fill(active == 0, 0)


@final
class ConvProduct(Product):
    """``nn.Conv2d`` and ``nn.Conv1d``: zeros around the image, one group."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d) -> None:
        self._flat = isinstance(module, nn.Conv1d)
        super().__init__(module, lambda w: cpu.laid_convolution(w.unsqueeze(2) if self._flat else w))
        settings = module.kernel_size, module.stride, module.padding, module.dilation
        self._channels, self._outputs = module.in_channels, module.out_channels
        padding: Any = module.padding
        if isinstance(padding, str):
            same = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            if padding == "same" and any(each % 2 for each in same):
                raise CannotSkip("its padding is not the same on both sides")
            padding = tuple(each // 2 if padding == "same" else 0 for each in same)
            settings = module.kernel_size, module.stride, padding, module.dilation
        neutral: Any = ((1,), (1,), (0,), (1,)) if self._flat else ((),) * 4
        self._window = tuple(int(each) for new, old in zip(neutral, settings, strict=True) for each in (*new, *old))

    def __call__(self, x: Tensor, most: float) -> tuple[Tensor | None, Found]:
        """See ``Product``."""
        laid = self.laid.get()
        images = x.unsqueeze(-2) if self._flat else x
        weight: Any = self.module._parameters["weight"]
        batched = images.ndim == 4
        if laid is None or images.ndim < 3 or x.dtype != weight.dtype or images.shape[-3] != self._channels:
            return None, x.numel()
        bias = self.module._parameters["bias"]
        y, found = cpu.convolve(images if batched else images[None], laid, bias, self._outputs, self._window, most)
        if y is None:
            return None, found
        y = y if batched else y[0]
        return (y.squeeze(-2) if self._flat else y), found

    def positions(self, x: Tensor) -> int:
        """See ``Product``."""
        return x.numel() // max(x.shape[-2 if self._flat else -3], 1) if x.ndim >= 2 else 0


def product_of(module: nn.Module) -> Product | None:
    """Return how a layer skips zeros; ``None`` if it is no layer with a weight.

    Raises:
        CannotSkip: it is one, and cannot.
    """
    forward = type(module).forward
    linear = forward is nn.Linear.forward
    conv = forward in _CONVOLUTIONS
    transposed = type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    if not (linear or conv or transposed):
        if isinstance(module, nn.Linear | torch_private.Convolution):
            raise CannotSkip(f"{type(module).__name__} computes its output in its own way")
        return None
    weight = module._parameters.get("weight")
    if weight is None:
        raise CannotSkip("its weight is computed anew in each call")
    if "forward" in module.__dict__:
        raise CannotSkip("something has put a forward of its own on it")
    on_gpu = weight.device.type == "cuda"
    if on_gpu and (conv or weight.dtype not in gpu.DTYPES or gpu.KERNELS.get() is None):
        raise CannotSkip(
            f"it is on {weight.device}; there linear layers skip zeros, by Triton, in float16, 32 or bfloat16"
        )
    if not on_gpu and weight.device.type != "cpu":
        raise CannotSkip(f"it is on {weight.device}; zeros are skipped on CPUs and CUDA GPUs")
    if weight.is_inference():
        raise CannotSkip("its weight was made in inference mode, where changes of it cannot be noticed")
    if weight.dtype not in stock.DTYPES:
        raise CannotSkip(f"its weight is {weight.dtype}")
    if type(weight) not in (nn.Parameter, Tensor):
        raise CannotSkip(f"its weight is a {type(weight).__name__}")
    if not bool(torch.isfinite(weight).all()):
        raise CannotSkip("its weight is not finite, and zero times infinity is not zero")
    if not conv:
        return LinearProduct(module, transposed)
    own: Any = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or type(module)._conv_forward is not own._conv_forward:
        raise CannotSkip(f"{type(module).__name__} is none of the convolutions that can")
    if module.groups != 1 or module.padding_mode != "zeros":
        raise CannotSkip(f"groups={module.groups}, padding_mode={module.padding_mode!r}; one group and zeros can")
    if weight.dtype == torch.float64:
        raise CannotSkip("convolutions skip zeros in float32, bfloat16 and float16")
    if cpu.KERNELS.get() is None:
        raise CannotSkip(f"numba, which convolutions need, cannot be used: {to_install('fast')}")
    return ConvProduct(module)


_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
