"""The one file that a run saves: weights, and all that is needed to use them on a new picture.

Plain data and tensors, so that it loads with ``weights_only=True``. Writes and reads; trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import timm
import torch

from regimewrap import RegimePolicy, wrap
from regimewrap.errors import DataError, RegimewrapError, StateError
from regimewrap.files import nearest, write_whole
from regimewrap.train.pictures import plain_transform

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

VERSION = 1
MODEL_FILE = "model.pt"
CHECKPOINT_FILE = "checkpoint.pt"
_FIELDS = {"version", "model", "model_kwargs", "classes", "look", "policy", "data", "accuracy", "weights"}


@final
@dataclass(frozen=True)
class Trained:
    """A saved model, wrapped and in eval mode, with what its file says of it.

    Attributes:
        model: gated under the policy that it was trained with.
        classes: names, in the order of the model's outputs.
        look: how pictures are prepared: size, mean, standard deviation, cropping; timm's names.
        about: everything else in the file: ``model``, ``model_kwargs``, ``policy``, ``data`` (the folder) and
            ``accuracy`` on the validation pictures at each keep ratio.
    """

    model: nn.Module
    classes: tuple[str, ...]
    look: dict[str, Any]
    about: dict[str, Any]

    def prepare(self, picture: Any) -> torch.Tensor:
        """Return an RGB picture as the model's input, float32 of shape (3, height, width)."""
        prepared: torch.Tensor = plain_transform(self.look)(picture)
        return prepared


def create(
    name: str, classes: int, options: dict[str, Any], *, pretrained: bool = False, img_size: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model of timm; return it with the options that build it again.

    Args:
        name: such as ``"resnet18"`` or ``"vit_small_patch16_224.augreg_in1k"``.
        classes: how many.
        options: for ``timm.create_model``.
        pretrained: begin with timm's weights, from the network.
        img_size: passed on where the model takes it, as transformers do.

    Raises:
        RegimewrapError: timm has no such model, or refuses the options; the message is one line.
    """
    bare = name.partition(".")[0]
    if ":" not in name and not timm.is_model(bare):  # a colon names a hub or a folder
        raise DataError(f"timm has no model {name!r}.{nearest(bare, timm.list_models())}")
    tries = [options] if img_size is None or "img_size" in options else [{**options, "img_size": img_size}, options]
    for number, each in enumerate(tries, 1):
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=classes, **each), each
        except Exception as error:  # timm refuses with errors of many kinds
            if number < len(tries) and isinstance(error, TypeError) and "img_size" in str(error):
                continue
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise RegimewrapError(f"timm cannot build {name}: {reason}") from error
    raise AssertionError("one of the tries returns or raises")


def save(path: Path, network: nn.Module, **about: Any) -> None:
    """Write the file, whole or not at all; ``about`` has the other fields, plain data.

    Raises:
        DataError: it cannot be written.
    """
    weights = {name: value.cpu() for name, value in network.state_dict().items()}
    content = {"version": VERSION, **about, "weights": weights}
    write_whole(path, lambda file: torch.save(content, file))


def load(run: Path, device: torch.device | None = None) -> Trained:
    """Load a run's model, wrapped and in eval mode.

    Args:
        run: the folder of ``regimewrap train``, for its ``model.pt``, or one of its files.
        device: the CPU if ``None``.

    Raises:
        DataError: there is no such file.
        StateError: it is damaged, or another program wrote it.
    """
    path = run / MODEL_FILE if run.is_dir() else run
    if run.is_dir() and not path.exists() and (run / CHECKPOINT_FILE).exists():
        raise DataError(f"{run} holds a run that has not ended: repeat its command with --resume.")
    content = read(path, "regimewrap train")
    if content.keys() < _FIELDS or content["version"] != VERSION:
        raise StateError(f"{path} is not a model of regimewrap train, or of another version; expected {VERSION}.")
    model, _ = create(content["model"], len(content["classes"]), content["model_kwargs"])
    try:
        model.load_state_dict(content["weights"])
    except RuntimeError as error:
        raise StateError(f"{path} does not fit {content['model']}: {' '.join(str(error).split())[:200]}") from None
    wrap(model, RegimePolicy.model_validate(content["policy"]))
    model.to(device or torch.device("cpu")).eval()
    about = {name: content[name] for name in _FIELDS - {"version", "classes", "look", "weights"}}
    return Trained(model, tuple(content["classes"]), content["look"], about)


def read(path: Path, writer: str) -> dict[str, Any]:
    """Return the mapping that a file of torch's holds, tensors on the CPU.

    Raises:
        DataError: there is no such file.
        StateError: it is damaged, or holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"there is no {path}; expected what {writer} left.") from None
    except Exception as error:  # torch and pickle raise many kinds for damaged files
        reason = str(error).partition("\n")[0][:200]
        raise StateError(f"{path} is damaged, or not a file of {writer}: {reason}") from error
    if not isinstance(content, dict):
        raise StateError(f"{path} holds a {type(content).__name__}; expected what {writer} writes.")
    return content
