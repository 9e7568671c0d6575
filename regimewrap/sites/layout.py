"""Which dimension of an activation holds the channels: 1 after a convolution, the last after a linear layer."""

from __future__ import annotations

from torch import nn

from regimewrap.sites.calls import called_with, own_methods

_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)
_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)


def channel_dim(model: nn.Module, path: str) -> int | None:
    """Return the channel dimension of what the activation at or in ``path`` returns, or ``None`` if nothing tells.

    Decided by the layer whose result it is called with, as in ``self.act(self.linear(x))``; else by the nearest layer
    with weights before it in its block, else after it, else around the block.

    Args:
        model: the model.
        path: dotted name of the activation module, or of the module whose method calls one.
    """
    own = {dim for module in model.get_submodule(path).modules() if (dim := _of(module)) is not None}
    if own:
        # A method calls it among layers; if they disagree, nothing tells.
        return own.pop() if len(own) == 1 else None
    direct = _of_argument(model, path)
    if direct is not None:
        return direct
    parts = path.split(".") if path else []
    for length in range(len(parts) - 1, -1, -1):
        children = list(model.get_submodule(".".join(parts[:length])).named_children())
        place = [name for name, _ in children].index(parts[length])
        before = [module for _, child in reversed(children[:place]) for module in reversed(list(child.modules()))]
        after = [module for _, child in children[place + 1 :] for module in child.modules()]
        found = next((dim for module in (*before, *after) if (dim := _of(module)) is not None), None)
        if found is not None:
            return found
    return None


def _of_argument(model: nn.Module, path: str) -> int | None:
    """Return what the layers say whose results an activation module is called with directly, if they agree."""
    if not path:
        return None
    parent, activation = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
    arguments = (each for _, _, function in own_methods(parent) for each in called_with(function, parent, activation))
    dims = {dim for layer in arguments if (dim := _of(layer)) is not None}
    return dims.pop() if len(dims) == 1 else None


def _of(module: nn.Module) -> int | None:
    name = type(module).__name__
    if isinstance(module, _FIRST) or name.endswith(("Norm2d", "Conv2d")) or "NormAct2d" in name:
        return 1
    # Hugging Face's Conv1D is a linear layer.
    if isinstance(module, _LAST) or name.endswith(("Linear", "LayerNorm", "RMSNorm")) or name == "Conv1D":
        return -1
    return None
