from __future__ import annotations

import urllib.request
from urllib.error import URLError

import pytest
import torch
import torchvision

from regimewrap.errors import DataError
from regimewrap.recipes.data import ImageSet, load_data


def test_digits_come_with_a_fixed_split():
    data, again = load_data("digits"), load_data("digits", seed=5)

    assert (len(data.train), len(data.test)) == (1000, 797)
    assert data.channels == 1
    assert data.classes == tuple("0123456789")
    assert torch.equal(data.test.pixels, again.test.pixels)


def test_a_limit_keeps_every_class_its_share_and_is_drawn_with_the_seed():
    first, same, other = (load_data("digits", limit=200, seed=seed) for seed in (1, 1, 2))

    assert first.train.labels.bincount().tolist() == [20] * 10
    assert len(first.test) == 797
    assert torch.equal(first.train.pixels, same.train.pixels)
    assert not torch.equal(first.train.pixels, other.train.pixels)


def test_a_limit_above_the_number_of_images_keeps_them_all():
    data = load_data("digits", limit=10**9, test_limit=10**9)

    assert (len(data.train), len(data.test)) == (1000, 797)


def test_training_images_are_normalised_and_test_images_by_the_same_numbers():
    data = load_data("digits", limit=300)
    images = torch.cat([x for x, _ in data.train.batches(64)])

    assert images.mean().abs() < 1e-5
    assert (images.std(correction=0) - 1).abs() < 1e-5
    assert data.test.mean is data.train.mean
    assert "normalised by the training images' mean" in data.about


def test_a_constant_channel_is_not_divided_by_zero():
    mean, std = torch.tensor([[[7.0]]]), torch.tensor([[[1.0]]])
    images = ImageSet(torch.full((2, 1, 2, 2), 7, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), mean, std)

    assert torch.equal(images[0][0], torch.zeros(1, 2, 2))


def test_batches_hold_every_image_once_in_the_generators_order():
    train = load_data("digits", limit=50).train
    in_order = torch.cat([y for _, y in train.batches(7)])
    shuffled, same = (torch.cat([x for x, _ in train.batches(7, torch.Generator().manual_seed(3))]) for _ in range(2))

    assert torch.equal(in_order, train.labels)
    assert torch.equal(shuffled, same)
    assert torch.equal(
        shuffled.sum((1, 2, 3)).sort().values, train._normalised(train.pixels).sum((1, 2, 3)).sort().values
    )


def test_a_torch_data_loader_takes_the_sets():
    loader = torch.utils.data.DataLoader(load_data("digits", limit=20).train, batch_size=10)

    assert [tuple(x.shape) for x, _ in loader] == [(10, 1, 8, 8)] * 2


def test_cifar10_comes_from_torchvision_and_is_drawn_from(monkeypatch, tmp_path):
    class FakeCifar10:
        classes = tuple(f"class {number}" for number in range(10))

        def __init__(self, root, train, download):
            assert download
            assert root == tmp_path / "regimewrap"
            count = 50 if train else 20
            self.data = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 32, 32, 3).numpy()
            self.targets = [index % 10 for index in range(count)]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar10)

    data = load_data("cifar10", limit=20, test_limit=10)

    assert data.train.pixels.shape == (20, 3, 32, 32)
    assert data.train.labels.tolist() == (data.train.pixels[:, 0, 0, 0] % 10).tolist()
    assert data.test.labels.sort().values.tolist() == list(range(10))


def test_cifar10_without_a_network_says_so_and_what_to_do(monkeypatch, tmp_path):
    def no_network(*_args, **_kwargs):
        raise URLError("no network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)

    with pytest.raises(DataError, match=r"CIFAR-10 could not be downloaded .*Put .* there yourself"):
        load_data("cifar10")


def test_another_name_is_met_with_the_nearest():
    with pytest.raises(DataError, match=r"data must be one of digits, cifar10; got 'digit'\. Did you mean 'digits'"):
        load_data("digit")


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(DataError, match=f"test_limit must be at least 1; got {limit}"):
        load_data("digits", test_limit=limit)


def test_a_limit_that_would_lose_a_class_is_refused():
    with pytest.raises(DataError, match="limit must be at least 10, so that each class is seen; got 5"):
        load_data("digits", limit=5)
