"""What counts as an activation: the families, and how a module, a function or a method name maps to one.

Knows names and torch's own objects only. It imports no other library: activations that timm, transformers or the user
define are recognised by the name of their class or function.
"""

from __future__ import annotations

import functools
import re
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from regimewrap import torch_private

MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu",
    nn.LeakyReLU: "relu",
    nn.RReLU: "relu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Mish: "mish",
    nn.ELU: "elu",
    nn.SELU: "elu",
    nn.CELU: "elu",
    nn.PReLU: "prelu",
    nn.Threshold: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "sigmoid",
    nn.LogSigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Hardtanh: "tanh",
    nn.Softmax: "softmax",
    nn.Softmax2d: "softmax",
    nn.LogSoftmax: "softmax",
    nn.Softmin: "softmax",
    nn.Softplus: "softplus",
    nn.GLU: "glu",
}

FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu",
    F.leaky_relu: "relu",
    F.leaky_relu_: "relu",
    F.rrelu: "relu",
    F.rrelu_: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.mish: "mish",
    F.elu: "elu",
    F.elu_: "elu",
    F.selu: "elu",
    F.selu_: "elu",
    torch.selu: "elu",
    torch.selu_: "elu",
    F.celu: "elu",
    F.celu_: "elu",
    torch.celu: "elu",
    torch.celu_: "elu",
    torch.rrelu: "relu",
    torch.rrelu_: "relu",
    F.threshold: "relu",
    torch.threshold: "relu",
    torch.threshold_: "relu",
    F.prelu: "prelu",
    torch.prelu: "prelu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    F.hardsigmoid: "sigmoid",
    F.logsigmoid: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    F.hardtanh: "tanh",
    F.softmax: "softmax",
    torch.softmax: "softmax",
    F.log_softmax: "softmax",
    torch.log_softmax: "softmax",
    F.softplus: "softplus",
    F.glu: "glu",
}

TENSOR_METHODS: dict[str, str] = {
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "tanh": "tanh",
    "tanh_": "tanh",
    "softmax": "softmax",
    "log_softmax": "softmax",
}

# Names that other libraries and users give to the same families, in lower case without underscores.
NAMES: dict[str, str] = {
    "relu": "relu",
    "relu6": "relu",
    "leakyrelu": "relu",
    "relu2": "relu",
    "squaredrelu": "relu",
    "relusquared": "relu",
    "gelu": "gelu",
    "gelunew": "gelu",
    "newgelu": "gelu",
    "fastgelu": "gelu",
    "gelufast": "gelu",
    "quickgelu": "gelu",
    "geluquick": "gelu",
    "gelutanh": "gelu",
    "gelupytorchtanh": "gelu",
    "clippedgelu": "gelu",
    "bloomgelu": "gelu",
    "accurategelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "hardswish": "hardswish",
    "hswish": "hardswish",
    "mish": "mish",
    "hardmish": "mish",
    "elu": "elu",
    "selu": "elu",
    "celu": "elu",
    "xielu": "elu",
    "prelu": "prelu",
    "sigmoid": "sigmoid",
    "hardsigmoid": "sigmoid",
    "hsigmoid": "sigmoid",
    "tanh": "tanh",
    "hardtanh": "tanh",
    "softmax": "softmax",
    "logsoftmax": "softmax",
    "logsigmoid": "sigmoid",
    "softplus": "softplus",
    "glu": "glu",
    "laplace": "laplace",
}

# Normalisation layers with the activation inside (timm's): their output is the activation's. None: see ``act_name``.
NORM_AND_ACTIVATION: dict[str, str | None] = {
    "InplaceAbn": None,
    "EvoNorm2dB0": "silu",
    "EvoNorm2dB1": "silu",
    "EvoNorm2dB2": "silu",
    "EvoNorm2dS0": "silu",
    "EvoNorm2dS0a": "silu",
    "FilterResponseNormTlu2d": "relu",
}

#: Every kind the catalog knows, for messages and suggestions.
KINDS: tuple[str, ...] = tuple(dict.fromkeys([*MODULES.values(), *FUNCTIONS.values(), *NAMES.values()]))


def kind_of_name(name: str) -> str | None:
    """Return the family that a class or function name points to, or ``None``."""
    # NewGELUActivation, SwishMe, h_swish, gelu_python, SwishImplementation, MemoryEfficientSwish
    plain = re.sub(r"(Activation|Me|Jit|_python|_module|Implementation|Function|AutoFn|Fn)$", "", name)
    plain = re.sub(r"^(MemoryEfficient|Scaled|Fused)(?=[A-Z])", "", plain)
    return NAMES.get(plain.replace("_", "").lower())


def kind_of_module(module: nn.Module) -> str | None:
    """Return the family of an activation module, or ``None`` for any other module."""
    for cls in type(module).__mro__:
        if cls in MODULES:
            return MODULES[cls]
    if type(module).__name__ in NORM_AND_ACTIVATION:
        return _kind_after_norm(module)
    if next(module.children(), None) is not None:
        return None
    kind = kind_of_name(type(module).__name__)
    # Learnt slopes are numbers, or one a channel; what has matrices does more than an activation.
    return kind if kind is None or all(_is_per_channel(each) for each in module.parameters()) else None


def _is_per_channel(parameter: nn.Parameter) -> bool:
    return sum(size > 1 for size in parameter.shape) <= 1


def kind_of_class(cls: Any) -> str | None:
    """Return the family of the activation module that calling a class gives, or ``None`` for anything else."""
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        return None
    return next((MODULES[home] for home in cls.__mro__ if home in MODULES), None) or kind_of_name(cls.__name__)


def _kind_after_norm(module: nn.Module) -> str | None:
    kind = NORM_AND_ACTIVATION[type(module).__name__]
    if kind is None:
        return kind_of_name(str(getattr(module, "act_name", "")))
    applied = all(getattr(module, name, True) is not None for name in ("v", "tau"))
    return kind if applied and getattr(module, "apply_act", True) else None


def fused_activation(module: nn.Module) -> str | None:
    """Return the family of an activation that torch computes inside a fused module, out of reach, or ``None``."""
    if isinstance(module, nn.RNN | nn.RNNCell):
        return "relu" if module.nonlinearity == "relu" else "tanh"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "tanh"
    cls = type(module)
    quantizes = cls.__module__.startswith("torch.") and re.search(r"\.quantized|\.qat", cls.__module__)
    return "relu" if quantizes and "ReLU" in cls.__name__ and not isinstance(module, nn.ReLU) else None


def kind_of_callee(value: Any) -> str | None:
    """Return the family of what calling an object gives: an activation module, a class of ones, or a function."""
    kind = type(value)
    if kind is types.BuiltinMethodType and isinstance(value.__self__, type) and value.__name__ == "apply":
        value, kind = value.__self__, type
    if issubclass(kind, nn.Module):
        return kind_of_module(value)
    if issubclass(kind, type):
        return kind_of_name(value.__name__) if issubclass(value, torch.autograd.Function) else kind_of_class(value)
    return kind_of_function(value)


#: What may be asked for its name; anything else may import, or raise, when it is.
_NAMED = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def kind_of_function(function: Any) -> str | None:
    """Return the family of an activation function (``functools.partial`` looked through), or ``None``."""
    while type(function) is functools.partial:
        function = function.func
    if isinstance(function, torch_private.OPERATORS):  # torch.ops.aten.relu; with a signature in exported graphs
        library, name, *_ = str(function).split(".")
        return kind_of_name(name) if library != "regimewrap" else None
    if type(function) is types.MethodDescriptorType:  # torch.Tensor.relu
        return TENSOR_METHODS.get(function.__name__) if issubclass(torch.Tensor, function.__objclass__) else None
    plain = isinstance(type(function), type) and issubclass(type(function), _NAMED)
    if not plain and type(function).__module__.partition(".")[0] not in ("builtins", "torch"):
        return None
    try:
        kind = FUNCTIONS.get(function)
    except TypeError:  # unhashable
        return None
    return kind_of_name(function.__name__) if kind is None and plain else kind


def kind_of_node(node: fx.Node, root: nn.Module | None = None) -> str | None:
    """Return the family of the activation that a node of a graph calls, or ``None``.

    Args:
        node: a node of a ``torch.fx.Graph``.
        root: the module in which ``call_module`` targets are looked up; without it they are passed over.
    """
    if node.op == "call_function":
        return kind_of_callee(node.target)
    if node.op == "call_method":
        return TENSOR_METHODS.get(str(node.target))
    if node.op == "call_module" and root is not None:
        return kind_of_module(root.get_submodule(str(node.target)))
    return None
