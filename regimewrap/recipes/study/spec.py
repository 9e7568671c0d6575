"""What a study compares, as one frozen value from one file: tasks, arms, seeds, trials. Nothing runs here."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, final

from pydantic import Field, field_validator, model_validator

from regimewrap.errors import DataError, PolicyError
from regimewrap.files import nearest, shown
from regimewrap.policy.reading import parse_yaml
from regimewrap.policy.settings import Count, NonNegative, Positive, Ratio, Settings, Weight
from regimewrap.recipes.study.arms import ARMS
from regimewrap.recipes.wide_resnet import parse_arch

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Seeds of trials start here, so that no final run has one of them.
FIRST_TRIAL_SEED = 100_000

Name = Annotated[str, Field(min_length=1)]
_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


@final
class Training(Settings):
    """How every arm of a task is trained; the learning rate is the middle of what the trials try."""

    steps: Count = Field(description="Optimizer updates.")
    batch_size: Count = Field(description="Samples in an update; for text, sequences.")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd has Nesterov momentum 0.9.")
    lr: Positive = Field(description="Learning rate at the start; it follows a cosine to zero.")
    weight_decay: NonNegative = Field(0.0, description="In the optimizer, for every arm but weight-decay.")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Of the forward pass, by autocast.")


@final
class Mnist1d(Settings):
    """MNIST-1D (arXiv 2011.14439), generated, and a convolutional network."""

    kind: Literal["mnist1d"] = "mnist1d"
    train_samples: Count = Field(4000, le=20_000, description="Drawn by each seed from a pool of 20,000.")
    test_samples: Count = Field(20_000, le=20_000, description="The same for every seed.")
    label_noise: Weight = Field(0.0, description="Share of the training labels replaced by another class.")
    channels: Count = Field(24, description="Of each of three convolutions.")
    training: Training


@final
class Images(Settings):
    """Images and a wide residual network, or hidden layers of one width."""

    kind: Literal["images"] = "images"
    data: str = Field(min_length=1, description="digits, cifar10 (torchvision), or a folder or zip of images.")
    side: Count | None = Field(None, description="Images are averaged down to so many pixels a side.")
    train_samples: Count | None = Field(None, description="Drawn by each seed; all if left out.")
    label_noise: Weight = Field(0.0, description="Share of the training labels replaced by another class.")
    arch: str = Field(
        "wrn-10-1",
        pattern=r"^(wrn|mlp)-[0-9]{1,6}-[0-9]{1,6}$",
        description="wrn-DEPTH-WIDTH, or mlp-LAYERS-UNITS: hidden layers and the units of each.",
    )
    norm: Literal["rms", "batch"] = Field("rms", description="Normalisation layers.")
    training: Training

    @field_validator("arch")
    @classmethod
    def _buildable(cls, arch: str) -> str:
        if arch.startswith("wrn-"):
            parse_arch(arch)
        return arch


@final
class Characters(Settings):
    """The next character of Python's own documentation, and a small causal transformer; gates in scope position."""

    kind: Literal["characters"] = "characters"
    activation: Literal["relu", "gelu", "swiglu"] = Field("relu", description="Of the MLPs.")
    layers: Count = Field(2, description="Transformer blocks.")
    width: Count = Field(96, description="Of the residual stream; a multiple of 32.")
    context: Count = Field(64, description="Characters in a sequence.")
    before: Training | None = Field(
        None, description="A dense training first; the arms then go on with the source code of the standard library."
    )
    training: Training


Task = Annotated[Mnist1d | Images | Characters, Field(discriminator="kind")]


@final
class Trials(Settings):
    """How each arm's learning rate and own knob are chosen: the same number of trials for each arm."""

    count: Count = Field(1, description="Trials of each arm; the first has the spec's own numbers.")
    seeds: Count = Field(1, description="Seeds of each trial, none of which a final run has.")


@final
class Study(Settings):
    """Arms × seeds × tasks. ``docs/evidence/specs/`` holds examples."""

    schema_version: Literal[1] = Field(1, description="The version of this format.")
    name: Name = Field(description="What the report is called.")
    arms: tuple[str, ...] = Field(min_length=1, description="Names of arms; dense must be among them.")
    seeds: Count = Field(8, le=10_000, description="Final runs of each arm and task, with seeds 0, 1, ...")
    budgets: tuple[Ratio, ...] = Field(
        (1.0, 0.5, 0.2, 0.1, 0.05), min_length=1, description="Keep ratios to evaluate at."
    )
    trials: Trials = Field(default_factory=lambda: Trials())
    tasks: dict[Name, Task] = Field(min_length=1, description="Tasks by name.")
    cost: str = Field("", description="What the study takes, in words, shown before it runs.")

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for name in arms:
            if name not in ARMS:
                raise ValueError(f"no arm is called {shown(name)}.{nearest(name, ARMS)} Arms: {', '.join(ARMS)}.")
        if len(set(arms)) < len(arms):
            raise ValueError("an arm is named twice.")
        if "dense" not in arms:
            raise ValueError("dense must be among the arms; the others are compared with it.")
        return arms

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.budgets[0] != 1.0 or list(self.budgets) != sorted(set(self.budgets), reverse=True):
            raise ValueError(f"budgets must start with 1 and fall, such as 1, 0.5, 0.1; got {shown(self.budgets)}.")
        for name in (self.name, *self.tasks):
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(
                    "names of a study and its tasks are of a-z, 0-9, hyphens and dots, for they name files; "
                    f"got {shown(name)}."
                )
        for name, task in self.tasks.items():
            if isinstance(task, Characters) and task.activation != "relu" and "l1" in self.arms:
                raise ValueError(f"tasks.{name}: arm l1 needs activation relu, whose units are exactly zero or not.")
        return self


def load_study(where: str) -> Study:
    """Return the study in a YAML file, or one that comes with the package by its name, such as ``cifar10-paper``.

    Raises:
        DataError: there is no such file or study, or it cannot be read.
        PolicyError: it is not a valid study; each line of the message names the file.
    """
    shipped = {each.name.removesuffix(".yaml"): each for each in _shipped()}
    source = shipped.get(where) or Path(where)
    try:
        if not where:
            raise DataError(f"no study was named. Built in: {', '.join(shipped)}.")
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        hint = nearest(where, shipped)
        known = ", ".join(shipped)
        raise DataError(f"{where}: no study can be read here: {reason}.{hint} Built in: {known}.") from None
    try:
        data = parse_yaml(text)
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from None
    if not isinstance(data, dict):
        raise PolicyError(f"{where}: a study is a mapping ({', '.join(Study.model_fields)}); got {shown(data)}.")
    try:
        return Study.model_validate(data)
    except PolicyError as error:
        raise PolicyError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None


def pick(names: Iterable[str], asked: str | None, what: str) -> tuple[str, ...]:
    """Return those of ``names`` that a comma-separated list asks for, all if it is ``None``, in their own order.

    Raises:
        PolicyError: it asks for another.
    """
    known = tuple(names)
    wanted = known if asked is None else tuple(each.strip() for each in asked.split(",") if each.strip())
    if not wanted:
        raise PolicyError(f"no {what} was named; the study has {', '.join(known)}.")
    for name in wanted:
        if name not in known:
            near = nearest(name, known)
            raise PolicyError(f"the study has no {what} called {shown(name)}.{near} It has {', '.join(known)}.")
    return tuple(name for name in known if name in wanted)


def _shipped() -> list[Path]:
    folder = Path(str(resources.files("regimewrap.recipes.study")))
    return sorted(folder.glob("*.yaml"))
