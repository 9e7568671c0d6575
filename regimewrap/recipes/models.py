"""A model from what a user writes on the command line. Builds it, without weights from a network; changes nothing."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regimewrap.errors import MissingExtraError, WrapError
from regimewrap.files import nearest

if TYPE_CHECKING:
    from collections.abc import Callable

_FORMS = "torchvision:NAME, timm:NAME or PACKAGE.MODULE:CALLABLE"


def load_model(target: str) -> nn.Module:
    """Build the model that ``torchvision:NAME``, ``timm:NAME`` or ``PACKAGE.MODULE:CALLABLE`` names.

    A model of torchvision or timm is built without memory for its parameters where it allows that: enough for a plan.
    A callable is called without arguments; modules in the current folder are found.

    Raises:
        WrapError: the text has another form, names nothing, or does not give a ``torch.nn.Module``.
        MissingExtraError: torchvision or timm is needed.
    """
    source, colon, name = target.partition(":")
    if not (source and colon and name):
        raise WrapError(f"a model is named as {_FORMS}; got {target!r}.")
    if source == "torchvision":
        return _torchvision(name)
    if source == "timm":
        return _timm(name)
    return _called(source, name)


def _torchvision(name: str) -> nn.Module:
    try:
        from torchvision import models
    except ImportError:
        raise MissingExtraError("torchvision", "cli") from None
    if name not in models.list_models():
        raise WrapError(f"torchvision has no model {name!r}.{nearest(name, models.list_models())}")
    builder = models.get_model_builder(name)
    # Some models would fetch a pretrained backbone, or spend a minute on initial weights, unless told not to.
    offered = inspect.signature(builder).parameters
    unwanted = {"weights": None, "weights_backbone": None, "init_weights": False}
    settings = {key: value for key, value in unwanted.items() if key in offered}
    return _without_memory(lambda: builder(**settings))


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise MissingExtraError("timm", "timm") from None
    if not timm.is_model(name):
        raise WrapError(f"timm has no model {name!r}.{nearest(name, timm.list_models())}")
    return _without_memory(lambda: timm.create_model(name, pretrained=False))


def _without_memory(build: Callable[[], Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' advice on initial weights that we don't keep
        try:
            with torch.device("meta"):
                model = build()
        except Exception:  # noqa: BLE001  # some models compute with their initial weights
            model = build()
    return _checked(model, "it")


def _called(module_name: str, path: str) -> nn.Module:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # a script's own folder is there instead
    found: Any = _imported(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            where = getattr(found, "__name__", module_name)
            public = [each for each in dir(found) if not each.startswith("_")]
            raise WrapError(f"{where} has no {part!r}.{nearest(part, public)}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    label = f"{module_name}:{path}"
    if not callable(found):
        raise WrapError(f"{label} is {type(found).__name__}; expected a torch.nn.Module or a callable that makes one.")
    try:
        return _checked(found(), f"{label}()")
    except WrapError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise WrapError(f"{label}() failed: {_one_line(error)}. It is called without arguments.") from error


def _imported(name: str) -> Any:
    if not all(part.isidentifier() for part in name.split(".")):
        raise WrapError(f"{name!r} is not a module's name; a model is named as {_FORMS}.")
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else ""
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise WrapError(f"there is no module {missing!r}.{nearest(missing, _siblings(missing))}") from None
        raise WrapError(f"importing {name} failed: {_one_line(error)}.") from error


def _siblings(name: str) -> list[str]:
    """Return the names of modules that could have been meant instead."""
    parent, _, _ = name.rpartition(".")
    if not parent:
        return ["torchvision", "timm", *(module.name for module in pkgutil.iter_modules())]
    path = getattr(sys.modules.get(parent), "__path__", [])
    return [f"{parent}.{module.name}" for module in pkgutil.iter_modules(path)]


def _checked(made: Any, label: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise WrapError(f"{label} gave {type(made).__name__}; expected a torch.nn.Module.")
    return made


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
