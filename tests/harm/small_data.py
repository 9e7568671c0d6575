"""Small data that packages ship or generate, and what is done to it in all tasks alike."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

Split = tuple[Tensor, Tensor, Tensor, Tensor]  # inputs and targets to train on, and to test on


def split(x: Tensor, y: Tensor, train: int, generator: torch.Generator) -> Split:
    """Return ``train`` samples drawn at random, and all others to test on."""
    order = torch.randperm(len(x), generator=generator)
    first, rest = order[:train], order[train:]
    return x[first], y[first], x[rest], y[rest]


@cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 0.6, torch.tensor(y)


@cache
def mnist1d() -> tuple[Tensor, Tensor]:
    """12,000 signals of 40 values in ten classes, made by the generator of MNIST-1D."""
    from mnist1d.data import get_dataset_args, make_dataset

    args = get_dataset_args()
    args.num_samples, args.train_split = 12_000, 1.0
    made = make_dataset(args)
    return torch.tensor(made["x"], dtype=torch.float32).unsqueeze(1), torch.tensor(made["y"])


@cache
def rows() -> tuple[Tensor, Tensor]:
    """12,000 rows of 30 numbers in six classes."""
    from sklearn.datasets import make_classification

    x, y = make_classification(
        12_000, 30, n_informative=12, n_redundant=6, n_classes=6, n_clusters_per_class=3, class_sep=1.2, random_state=0
    )
    x = torch.tensor(x, dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0), torch.tensor(y)


@cache
def curve() -> tuple[Tensor, Tensor]:
    """12,000 values of Friedman's first function, with noise that makes 4 % of their variance."""
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(12_000, n_features=10, noise=1.0, random_state=0)
    y = torch.tensor(y, dtype=torch.float32)
    return torch.tensor(x, dtype=torch.float32) * 2 - 1, (y - y.mean()) / y.std()


@cache
def tiles() -> tuple[Tensor, Tensor]:
    """The 8,480 tiles of 8×8 pixels of scikit-learn's two photographs, in colour, as input and as target."""
    from sklearn.datasets import load_sample_images

    photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images]).float()
    x = F.unfold(photographs.permute(0, 3, 1, 2), 8, stride=8).transpose(1, 2).flatten(0, 1)
    x = (x - x.mean()) / x.std()
    return x, x


def mislabelled(y: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Draw the label of a share of the samples anew, so that a tenth of these keep theirs."""
    wrong = torch.rand(len(y), generator=generator) < share
    return torch.where(wrong, torch.randint(0, 10, (len(y),), generator=generator), y)


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move each digit by up to one pixel."""
    padded = F.pad(x, (1, 1, 1, 1), value=-0.6)
    moves = torch.randint(0, 3, (len(x), 2), generator=generator).tolist()
    return torch.stack([image[:, i : i + 8, j : j + 8] for image, (i, j) in zip(padded, moves, strict=True)])
