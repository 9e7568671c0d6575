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
from regimewrap.sites.read.memory import remembered

_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "relu": (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.Threshold),
    "gelu": (nn.GELU,),
    "silu": (nn.SiLU,),
    "hardswish": (nn.Hardswish,),
    "mish": (nn.Mish,),
    "elu": (nn.ELU, nn.SELU, nn.CELU),
    "prelu": (nn.PReLU,),
    "sigmoid": (nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid),
    "tanh": (nn.Tanh, nn.Hardtanh),
    "softmax": (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin),
    "softplus": (nn.Softplus,),
    "glu": (nn.GLU,),
}
MODULES: dict[type[nn.Module], str] = {cls: kind for kind, classes in _MODULES.items() for cls in classes}

_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "relu": (
        *(F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.rrelu, F.rrelu_),
        *(torch.rrelu, torch.rrelu_, F.threshold, torch.threshold, torch.threshold_),
    ),
    "gelu": (F.gelu,),
    "silu": (F.silu,),
    "hardswish": (F.hardswish,),
    "mish": (F.mish,),
    "elu": (F.elu, F.elu_, F.selu, F.selu_, torch.selu, torch.selu_, F.celu, F.celu_, torch.celu, torch.celu_),
    "prelu": (F.prelu, torch.prelu),
    "sigmoid": (F.sigmoid, torch.sigmoid, F.hardsigmoid, F.logsigmoid),
    "tanh": (F.tanh, torch.tanh, F.hardtanh),
    "softmax": (F.softmax, torch.softmax, F.log_softmax, torch.log_softmax),
    "softplus": (F.softplus,),
    "glu": (F.glu,),
}
FUNCTIONS: dict[Any, str] = {function: kind for kind, functions in _FUNCTIONS.items() for function in functions}

_METHODS = {
    "relu": "relu relu_",
    "sigmoid": "sigmoid sigmoid_",
    "tanh": "tanh tanh_",
    "softmax": "softmax log_softmax",
}
TENSOR_METHODS: dict[str, str] = {name: kind for kind, names in _METHODS.items() for name in names.split()}

# Names that other libraries and users give to the same families, in lower case without underscores.
_NAMES = {
    "relu": "relu relu6 leakyrelu relu2 squaredrelu relusquared",
    "gelu": (
        "gelu gelunew newgelu fastgelu gelufast quickgelu geluquick gelutanh gelupytorchtanh clippedgelu "
        "bloomgelu accurategelu"
    ),
    "silu": "silu swish",
    "hardswish": "hardswish hswish",
    "mish": "mish hardmish",
    "elu": "elu selu celu xielu",
    "prelu": "prelu",
    "sigmoid": "sigmoid hardsigmoid hsigmoid logsigmoid",
    "tanh": "tanh hardtanh",
    "softmax": "softmax logsoftmax",
    "softplus": "softplus",
    "glu": "glu",
    "laplace": "laplace",
}
NAMES: dict[str, str] = {name: kind for kind, names in _NAMES.items() for name in names.split()}

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


@remembered
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
    if _ends_in_relu(type(module)) and ".qat" in type(module).__module__:
        return "relu"  # a layer with its ReLU and fake quantization, all in floating point
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
    quantized = ".quantized" in type(module).__module__ and not isinstance(module, nn.ReLU)
    return "relu" if quantized and _ends_in_relu(type(module)) else None


def _ends_in_relu(cls: type) -> bool:
    """Say whether a class of torch's quantization computes a ReLU last."""
    return cls.__module__.startswith("torch.") and "ReLU" in cls.__name__


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


#: Types whose ``__name__`` is safe to read; other objects may import something, or raise.
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
