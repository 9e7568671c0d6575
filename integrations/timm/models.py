"""Names in timm's registry: the wide residual networks of the method's experiments, and any other model, wrapped.

timm calls an entry point with everything that its command line knows, so each takes more than it needs. No gate and no
training here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import timm
from timm.models import generate_default_cfgs, is_model, list_models, register_model

from regimewrap import RegimePolicy, wrap
from regimewrap.errors import WrapError
from regimewrap.files import nearest
from regimewrap.recipes.wide_resnet import WideResNet

from .open_loop import drive_from_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from regimewrap.policy import PolicyLike

_CIFAR: dict[str, Any] = {
    "url": "",
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "first_conv": "stem",
    "classifier": "head.classifier",
}
# timm looks for this name.
default_cfgs = generate_default_cfgs({"regimewrap_wrn28_4": _CIFAR, "regimewrap_wrn28_10": _CIFAR})

# What timm passes to every model, and what can only be what these networks are anyway.
_FOR_WEIGHTS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def regimewrap_wrn28_4(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Return WRN-28-4 for CIFAR, the network of the method's experiments, not wrapped.

    Args:
        pretrained: must be false: there are no weights.
        **kwargs: ``num_classes`` (10), ``in_chans`` (3), ``norm`` (``"rms"`` or ``"batch"``) and ``activation``
            (``"module"`` or ``"function"``); see ``regimewrap.recipes.wide_resnet.WideResNet``.

    Raises:
        WrapError: ``pretrained``, or an option that the network does not have.
    """
    return _wide_resnet("regimewrap_wrn28_4", 4, pretrained, **kwargs)


def regimewrap_wrn28_10(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Return WRN-28-10 for CIFAR, not wrapped; arguments and errors as for ``regimewrap_wrn28_4``."""
    return _wide_resnet("regimewrap_wrn28_10", 10, pretrained, **kwargs)


def regimewrap_auto(
    pretrained: bool = False,
    *,
    base: str | None = None,
    policy: PolicyLike = "mixed",
    total_steps: int | None = None,
    drive: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Return any model of timm, wrapped: ``--model regimewrap_auto --model-kwargs base=resnet18 policy=mixed``.

    Args:
        pretrained: as for the base model.
        base: name of a model of timm, with or without a tag.
        policy: a policy, a preset's name, or the path of a policy file.
        total_steps: optimizer updates of the whole run, to which a preset is scaled; ``mixed`` needs none.
        drive: move the keep ratio at each step of the optimizer over the parameters. For loops that cannot be changed,
            such as timm's ``train.py``: the loss is not to be had there, so only a policy that needs no signal works,
            and the first update says so. ``RegimeTask`` takes over by itself; for a ``RegimeCycler`` of
            your own, pass false.
        **kwargs: for the base model.

    Returns:
        The base model itself; its weights have the names that they have without regimewrap.

    Raises:
        WrapError: there is no such base, or it cannot be wrapped.
        PolicyError: there is no such policy.
    """
    if not isinstance(base, str):
        raise WrapError("regimewrap_auto wraps another model of timm: pass base, as in --model-kwargs base=resnet18.")
    name = base.partition(".")[0]
    if ":" not in base and (not is_model(name) or name == "regimewrap_auto"):  # a colon names a hub or a folder
        raise WrapError(f"timm has no model {base!r} to wrap.{nearest(name, list_models())}")
    chosen = RegimePolicy.of(policy, total_steps)
    model: nn.Module = timm.create_model(base, pretrained=pretrained, **kwargs)
    wrap(model, chosen)
    if drive:
        drive_from_optimizer(model, total_steps)
    return model


def _wide_resnet(
    name: str, width: int, pretrained: bool, num_classes: int = 10, in_chans: int = 3, **kwargs: Any
) -> WideResNet:
    if pretrained:
        raise WrapError(f"there are no pretrained weights of {name}; leave pretrained out.")
    own = {option: kwargs.pop(option) for option in ("norm", "activation") if option in kwargs}
    # timm's train.py passes its defaults: no dropout, average pooling.
    unknown = [
        option for option, value in kwargs.items() if option not in _FOR_WEIGHTS and value not in (0, None, "avg")
    ]
    if unknown:
        raise WrapError(f"{name} takes num_classes, in_chans, norm and activation; got {', '.join(unknown)}.")
    model = WideResNet(28, width, num_classes, in_channels=in_chans, **own)
    # What timm's train.py and data configuration ask a model for.
    about = {**_CIFAR, "architecture": name, "num_classes": num_classes}
    model.__dict__.update(num_classes=num_classes, pretrained_cfg=about, default_cfg=about)
    return model


def _register(*entry_points: Callable[..., nn.Module]) -> None:
    for entry_point in entry_points:
        if not is_model(entry_point.__name__):  # timm warns of a second time, as when a doctest collector imports again
            register_model(entry_point)


_register(regimewrap_wrn28_4, regimewrap_wrn28_10, regimewrap_auto)
