"""The data of a study's tasks: what a seed trains on, and what its network is judged by.

The judging samples of a final run are the test set, the same for all seeds; those of a trial are a validation set that
no training set of a trial overlaps. What takes long to make or decode is kept in the user's cache folder.
"""

from __future__ import annotations

import importlib
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from regimewrap.errors import DataError, MissingExtraError
from regimewrap.files import write_whole
from regimewrap.recipes.data import NAMED, load_data
from regimewrap.recipes.study.image_files import read_images, version
from regimewrap.recipes.study.spec import Images, Mnist1d

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from regimewrap.recipes.study.spec import Characters

#: What a network is judged by: the validation set for trials, the test set for final runs.
Part = Literal["validation", "test"]

_POOL, _VALIDATION, _TEST = 20_000, 5_000, 20_000  # of MNIST-1D
_VALIDATION_SHARE = 0.2  # of the training images
_TEXT_SHARES = (0.8, 0.9)  # where training ends and validation ends
_TEST_WINDOWS = 400
_SOURCES = ("argparse", "ast", "dataclasses", "inspect", "logging", "pathlib", "tarfile", "typing")


@final
@dataclass(frozen=True)
class Data:
    """Samples to train on and to judge by. Inputs of bytes are normalised by ``mean`` and ``std`` when taken."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    about: str
    mean: Tensor | None = None
    std: Tensor | None = None

    def inputs(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the training samples at ``index``, ready for the network, and their labels."""
        return self.ready(self.x[index]), self.y[index]

    def ready(self, x: Tensor) -> Tensor:
        """Return inputs as the network takes them."""
        return x if self.mean is None or self.std is None else (x.float() - self.mean) / self.std

    def order(self, seed: int, batch_size: int) -> Iterator[Tensor]:
        """Yield the indices of each update's samples without end: epochs, shuffled anew, their last part left out."""
        generator = torch.Generator().manual_seed(seed)
        size = min(batch_size, len(self.y))
        while True:
            order = torch.randperm(len(self.y), generator=generator)
            yield from (part for part in torch.split(order, size) if len(part) == size)


def load(task: Mnist1d | Images | Characters, seed: int, part: Part, folder: Path | None = None) -> Data:
    """Return the data of one run.

    Args:
        task: which.
        seed: of the draw of training samples and of the labels that noise replaces.
        part: what to judge by.
        folder: where data files that the task names are looked for; the current folder if ``None``.

    Raises:
        DataError: there is no usable data, or fewer samples than the task asks for.
        MissingExtraError: a package is missing.
    """
    if isinstance(task, Mnist1d):
        return _mnist1d(task, seed, part)
    if isinstance(task, Images):
        return _images(task, seed, part, folder)
    return _characters(task, part)


def _mnist1d(task: Mnist1d, seed: int, part: Part) -> Data:
    x, y = _cached("mnist1d-1", _make_mnist1d)
    pool, rest = slice(0, _POOL), _POOL + _VALIDATION
    judge = slice(_POOL, rest) if part == "validation" else slice(rest, rest + task.test_samples)
    draw = torch.Generator().manual_seed(seed)
    pick = torch.randperm(_POOL, generator=draw)[: task.train_samples]
    train_y = _noisy(y[pool][pick], task.label_noise, 10, draw)
    about = f"MNIST-1D, generated; {task.train_samples} training samples of a pool of {_POOL}"
    return Data(x[pool][pick], train_y, x[judge], y[judge], 10, about)


def _make_mnist1d() -> tuple[Tensor, Tensor]:
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError:
        raise MissingExtraError("mnist1d", "study") from None
    settings = get_dataset_args()
    settings.num_samples, settings.train_split, settings.seed = _POOL + _VALIDATION + _TEST, 1.0, 1
    made = make_dataset(settings)
    return torch.tensor(made["x"], dtype=torch.float32).unsqueeze(1), torch.tensor(made["y"], dtype=torch.int64)


def _images(task: Images, seed: int, part: Part, folder: Path | None) -> Data:
    source = task.data if task.data in NAMED else str((folder or Path()) / task.data)
    kept = source if source in NAMED else f"{Path(source).name}-{version(Path(source))}"
    x, y, test_x, test_y = _cached(f"{kept}-{task.side}", lambda: _decoded(source, task.side))
    draw = torch.Generator().manual_seed(seed)
    pool = torch.arange(len(y))
    if part == "validation":
        shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        cut = int(_VALIDATION_SHARE * len(y))
        held, pool = shuffled[:cut], shuffled[cut:]
        test_x, test_y = x[held], y[held]
    wanted = len(pool) if task.train_samples is None else task.train_samples
    if wanted > len(y):
        raise DataError(f"{task.data} has {len(y)} training images; the task asks for {wanted}. Lower train_samples.")
    pick = pool[torch.randperm(len(pool), generator=draw)[:wanted]]
    classes = int(y.max()) + 1
    labels = _noisy(y[pick], task.label_noise, classes, draw)
    pixels = x[pick].float()
    mean = pixels.mean(dim=(0, 2, 3)).view(-1, 1, 1)
    std = pixels.std(dim=(0, 2, 3)).clamp_min(1.0).view(-1, 1, 1)
    about = (
        f"{Path(task.data).name}, {x.shape[2]}×{x.shape[3]} pixels; {len(pick)} training, {len(test_y)} judging images"
    )
    return Data(x[pick], labels, test_x, test_y, classes, about, mean, std)


def _decoded(source: str, side: int | None) -> tuple[Tensor, ...]:
    if source in NAMED:
        data = load_data(source)
        whole = [(data.train.pixels, data.train.labels), (data.test.pixels, data.test.labels)]
    else:
        whole = read_images(Path(source))
    parts: list[Tensor] = []
    for pixels, labels in whole:
        if side is not None:
            if pixels.shape[2] % side or pixels.shape[3] % side:
                height, width = pixels.shape[2:]
                raise DataError(f"side must divide the images' {width}×{height} pixels; got {side}.")
            split = [F.adaptive_avg_pool2d(each.float(), side).round().byte() for each in torch.split(pixels, 1000)]
            pixels = torch.cat(split)
        parts += [pixels, labels]
    return tuple(parts)


def load_before(task: Characters) -> Data:
    """Return what a task's networks are trained on before the arms begin: the documentation."""
    return _characters(task, "validation", before=True)


def _characters(task: Characters, part: Part, *, before: bool = False) -> Data:
    from pydoc_data.topics import topics

    texts = {"the text of Python's pydoc_data.topics": "".join(topics[name] for name in sorted(topics))}
    if task.before is not None:
        code = "".join(inspect.getsource(importlib.import_module(name)) for name in _SOURCES)
        texts["the source code of eight modules of Python's standard library"] = code
    alphabet = sorted(set("".join(texts.values())))
    number = {each: index for index, each in enumerate(alphabet)}
    about, text = list(texts.items())[0 if before else -1]
    codes = torch.tensor([number[each] for each in text])
    first, second = (int(share * len(codes)) for share in _TEXT_SHARES)
    windows = codes[:first].unfold(0, task.context + 1, 1)
    judge = (codes[first:second] if part == "validation" else codes[second:]).unfold(0, task.context + 1, task.context)
    judge = judge[:: max(1, len(judge) // _TEST_WINDOWS)][:_TEST_WINDOWS]
    about = f"{about}, {len(text)} characters of {len(alphabet)} kinds"
    return Data(windows[:, :-1], windows[:, 1:], judge[:, :-1], judge[:, 1:], len(alphabet), about)


def _noisy(labels: Tensor, share: float, classes: int, draw: torch.Generator) -> Tensor:
    """Return labels of which a share, drawn, is another class."""
    wrong = torch.rand(len(labels), generator=draw) < share
    shift = torch.randint(1, classes, (len(labels),), generator=draw)
    return torch.where(wrong, (labels + shift) % classes, labels)


def _cached(name: str, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regimewrap"
    path = root / f"{name}.pt"
    if name.startswith("digits-"):  # quicker made than read
        return make()
    try:
        if path.exists():
            return tuple(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError):  # damaged: made anew
        pass
    made = make()
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda beside: torch.save(list(made), beside))
    except (OSError, DataError):  # a full disk or a home that cannot be written: it is only a copy
        pass
    return made
