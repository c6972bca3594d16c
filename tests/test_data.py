"""CIFAR-10 found, read, split and normalised; and the data that stand in for it."""

import hashlib
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torchvision.datasets import CIFAR10

from cifar_lib import data
from cifar_lib.data import CAT, DOG, FOLDER, ImageSet, Normalization, find_cifar10, load_cifar10
from cifar_lib.errors import InputError
from cifar_lib.evaluate import confusion_matrix
from notebooks.course.stand_in import generate_stand_in


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """A machine without CIFAR-10; the working directory is its empty folder `work`."""
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.setattr(data, "KAGGLE_INPUT", tmp_path / "kaggle")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def place(folder: Path, whole: bool = True) -> Path:
    """CIFAR-10's folder in `folder`, with all of its files, each empty, or without the last one."""
    (folder / FOLDER).mkdir(parents=True)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name in names if whole else names[:-1]:
        (folder / FOLDER / name).touch()
    return folder / FOLDER


def test_the_first_whole_folder_is_found_and_a_named_one_comes_first(nowhere, monkeypatch):
    place(nowhere / "work" / "data", whole=False)
    half = place(nowhere / "kaggle" / "a", whole=False)
    assert find_cifar10() is None
    assert find_cifar10(half.parent) == half  # named: reading it says what is missing
    second = place(nowhere / "kaggle" / "datasets" / "somebody" / "b")
    assert find_cifar10() == second
    first = place(nowhere / "kaggle" / "b")
    assert find_cifar10() == first
    home = place(nowhere / "home")
    assert find_cifar10(home=home.parent) == home
    variable = place(nowhere / "variable")
    monkeypatch.setenv("CIFAR10_ROOT", str(variable.parent))
    assert find_cifar10(home=home.parent) == variable
    explicit = place(nowhere / "explicit")
    assert find_cifar10(explicit.parent) == find_cifar10(str(explicit)) == explicit


def test_a_named_place_without_it_is_an_error_even_if_another_has_it(nowhere, monkeypatch):
    place(nowhere / "work" / "data")
    monkeypatch.setenv("CIFAR10_ROOT", str(nowhere))
    where = re.escape(str(nowhere))
    with pytest.raises(InputError, match=rf"^CIFAR10_ROOT: expected {FOLDER}/ in {where}, found"):
        load_cifar10()
    with pytest.raises(InputError, match="^the given path: .*absent"):
        load_cifar10(nowhere / "absent")


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A folder of two images a batch, in the real format, whose md5 are taken for the real ones."""
    folder, listed = place(tmp_path), []
    for i, (name, _) in enumerate(CIFAR10.train_list + CIFAR10.test_list):
        pixels = np.full((2, 3072), i, dtype=np.uint8)
        pixels[:, 1] = 77  # row 0, column 1, red
        content = pickle.dumps({"data": pixels, "labels": [i, 9 - i]}, 2)
        (folder / name).write_bytes(content)
        listed.append((name, hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(CIFAR10, "test_list", listed[5:])
    return folder


def test_files_are_read_as_channels_first_images(tiny):
    train, test = load_cifar10(tiny)
    assert train.images.shape == (10, 3, 32, 32) and train.images.dtype == torch.uint8
    assert train.images.is_contiguous() and train.labels.dtype == torch.int64
    assert train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert test.labels.tolist() == [5, 4] and len(test) == 2
    assert train.images[2:4].unique().tolist() == [1, 77]
    assert (train.images == 77).nonzero()[:, 1:].unique(dim=0).tolist() == [[0, 0, 1]]
    assert train.source == test.source == data.REAL


def test_a_batch_that_is_not_whole_is_named(tiny, monkeypatch):
    def refused(name: str, reason: str) -> None:
        where, remedy = re.escape(str(tiny / name)), "copy the file again, or move the folder away"
        with pytest.raises(InputError, match=f"^{where} .*{reason}.*: {remedy}"):
            load_cifar10(tiny)

    with monkeypatch.context() as broken_disk:
        broken_disk.setattr(Path, "read_bytes", lambda _: os.close(-1))
        refused("data_batch_1", "can't be read .Bad file descriptor")
    path = tiny / "test_batch"
    path.write_bytes(path.read_bytes()[:-1])
    refused("test_batch", "expected md5 [0-9a-f]{32}, the file differs")
    path.unlink()
    refused("test_batch", "can't be read .No such file")
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(path)
        refused("test_batch", "can't be read .it isn't a regular file")


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (torch.tensor([3, 0, 3]), [3, 0, 3]),
        (np.array([4, 1]), [4, 1]),
        (slice(1, 4, 2), [1, 3]),
        (torch.tensor([True, False, False, False, True]), [0, 4]),
        (torch.tensor([], dtype=torch.int64), []),
    ],
)
def test_indexing_carries_labels_and_ids_where_there_are_any(index, expected):
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 32, 32)
    whole = ImageSet(images, torch.arange(5) * 10, ids=("a", "b", "c", "d", "e"), source="a file")
    part = whole[index].to("cpu")
    assert part.images[:, 0, 0, 0].tolist() == expected and len(part) == len(expected)
    assert part.labels.tolist() == [10 * i for i in expected]
    assert part.ids == tuple("abcde"[i] for i in expected) and part.source == "a file"
    assert {t.device.type for t in (whole.to("meta").images, whole.to("meta").labels)} == {"meta"}
    bare = ImageSet(images)[index].to("cpu")
    assert bare.labels is None and bare.ids is None


def test_a_split_is_stratified_disjoint_by_seed_and_has_every_class_in_both_parts():
    labels = torch.arange(200) % 10
    train, validation = data.stratified_split(labels, 50, seed=3)
    assert train.dtype == torch.int64 and labels[validation].bincount().tolist() == [5] * 10
    assert torch.cat([train, validation]).sort().values.tolist() == list(range(200))
    assert all(torch.equal(part, part.sort().values) for part in (train, validation))
    assert torch.equal(data.stratified_split(labels, 50, seed=3)[1], validation)
    assert not torch.equal(data.stratified_split(labels, 50, seed=4)[1], validation)
    for n in (0, 5, 195, 201):
        with pytest.raises(InputError, match=f"^can't split 200 images into {200 - n} and {n} "):
            data.stratified_split(labels, n, seed=0)


@pytest.fixture(scope="module")
def random_images() -> torch.Tensor:
    """More than a chunk of 2,000, of other colours in each channel."""
    top = torch.tensor([256, 100, 30]).view(3, 1, 1)
    noise = torch.rand(2100, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return (noise * top).to(torch.uint8)


def test_statistics_are_those_of_all_pixels_in_float64(random_images):
    mean, std = data.channel_statistics(random_images)
    pixels = random_images.double().transpose(0, 1).flatten(1) / 255
    np.testing.assert_allclose(mean, pixels.mean(1), rtol=1e-13)
    np.testing.assert_allclose(std, pixels.std(1, correction=0), rtol=1e-12)
    assert data.channel_histogram(random_images)[1, 42] == (random_images[:, 1] == 42).sum()
    assert Normalization.of(random_images) == Normalization(tuple(mean), tuple(std))
    random_images = random_images.clone()
    random_images[:, 2] = 7
    with pytest.raises(InputError, match="^images: a colour channel has the same value"):
        Normalization.of(random_images)


def test_a_normalization_is_channel_by_channel_and_leaves_the_images(random_images):
    images, mean, std = random_images[:50], (0.1, 0.5, 0.9), (0.2, 1.0, 3.0)
    before, normalization = images.clone(), Normalization(mean, std)
    result = normalization(images)
    centred = images.double() / 255 - torch.tensor(mean).view(3, 1, 1)
    expected = centred / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-6)
    assert result.dtype == torch.float32 and result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    once = normalization.scale_and_offset(images.device)
    assert torch.equal(data.rescale(images, *once), result)


def test_constants_are_what_the_real_training_images_give(cifar10):
    for part, n in zip(cifar10, (50_000, 10_000), strict=True):
        assert part.labels.bincount().tolist() == [n // 10] * 10
    images = cifar10[0].images
    mean, std = data.channel_statistics(images)
    assert tuple(mean.round(4)) == data.CIFAR10_MEAN
    assert tuple(std.round(4)) == data.CIFAR10_STD
    own = torch.cat([chunk.flatten(2).double().std(2) for chunk in images.split(2000)])
    assert tuple((own.mean(0) / 255).numpy().round(4)) == data.PUBLISHED_STD


def test_the_stand_in_is_deterministic_balanced_and_marked():
    parts, again, others = (generate_stand_in(120, 40, seed) for seed in (0, 0, 1))
    for part, same, other, n in zip(parts, again, others, (120, 40), strict=True):
        assert part.labels.bincount().tolist() == [n // 10] * 10 and part.source == data.STAND_IN
        assert torch.equal(part.images, same.images) and torch.equal(part.labels, same.labels)
        assert not torch.equal(part.images, other.images)
    every = torch.cat([part.images for part in parts]).flatten(1)
    assert every.dtype == torch.uint8 and len(every.unique(dim=0)) == 160


def test_cat_and_dog_are_the_hardest_to_tell_apart_in_the_stand_in():
    train, test = generate_stand_in(1200, 500)
    coarse = [F.avg_pool2d(part.images.float(), 4).flatten(1).numpy() for part in (train, test)]
    guesses = KNeighborsClassifier(5).fit(coarse[0], train.labels).predict(coarse[1])
    matrix = confusion_matrix(F.one_hot(torch.tensor(guesses), 10), test.labels)
    pairs = np.triu(matrix + matrix.T, k=1)
    assert pairs[CAT, DOG] > max(9, 2 * (pairs.sum() - pairs[CAT, DOG]))
    assert matrix.trace() > 0.8 * 500  # and yet it can be learnt
