"""What a run needs besides pictures, policy and seed, as one value. The command line holds the defaults."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, final

from regimewrap.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping


@final
@dataclass(frozen=True)
class Settings:
    """Options of ``regimewrap train``, whose help explains them."""

    model: str
    model_kwargs: dict[str, Any]
    pretrained: bool
    img_size: int | None
    epochs: int
    batch_size: int
    opt: str
    lr: float
    weight_decay: float
    warmup_epochs: float
    clip_grad: float | None
    smoothing: float
    ema: float | None
    amp: bool
    augment: bool
    crop_scale: float
    hflip: float
    color_jitter: float
    aa: str | None
    re_prob: float
    mixup: float
    keep_ratios: tuple[float, ...]


def settings_from(options: Mapping[str, Any]) -> Settings:
    """Return settings from the options of the command line, of which others are left aside.

    Raises:
        DataError: the learning rate or one of ``model_kwargs``, texts like ``drop_rate=0.1``, makes no sense.
    """
    if not 0 < options["lr"] < math.inf:
        raise DataError(f"--lr must be a positive number; got {options['lr']:g}.")
    pairs = dict(_pair(text) for text in options["model_kwargs"] or ())
    named = {each.name: options[each.name] for each in fields(Settings)}
    return Settings(**{**named, "model_kwargs": pairs})


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise DataError(f"--model-kwargs takes NAME=VALUE; got {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # text without quotes
