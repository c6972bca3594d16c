"""CIFAR-10 as uint8 tensors: found, read, split, measured, normalised."""

import hashlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import CIFAR10

from cifar_lib import environment, pickles
from cifar_lib.download import download_cifar10
from cifar_lib.errors import InputError, explained
from cifar_lib.files import read_regular
from cifar_lib.hardware import memory_format, send

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CAT, DOG = CLASSES.index("cat"), CLASSES.index("dog")
REAL, STAND_IN = "CIFAR-10", "stand-in data"  # what an ImageSet gives as its source
Channels = tuple[float, ...]  # one number for each of red, green and blue

# Over all pixels of the 50,000 training images, in [0, 1]; `channel_statistics` computes them.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
# The widespread wrong one: the mean of the images' own standard deviations (notebook 1).
PUBLISHED_STD = (0.2023, 0.1994, 0.2010)
# What the published run normalised CIFAR-10's test images by. It is no statistic of CIFAR-10 that
# we know of.
PUBLISHED_TEST_MEAN = (0.5303, 0.4737, 0.4658)
PUBLISHED_TEST_STD = (0.2822, 0.2553, 0.2613)
# What it normalised the competition's images by: those images' own statistics.
KAGGLE_MEAN = (0.4765, 0.4808, 0.4958)
KAGGLE_STD = (0.2303, 0.2267, 0.2268)

FOLDER = CIFAR10.base_folder  # cifar-10-batches-py
KAGGLE_INPUT = Path("/kaggle/input")


@dataclass(frozen=True)
class ImageSet:
    """Images, and what belongs to each of them.

    images: uint8 (N, 3, 32, 32).
    labels: int64 (N,), class numbers; None where nobody knows them.
    ids: one per image, carried along from the file that it came from; None where it had none.
    source: REAL, STAND_IN, or a file's name and how it was read.
    """

    images: Tensor
    labels: Tensor | None = None
    ids: tuple[int | str, ...] | None = None
    source: str = REAL

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | np.ndarray | slice) -> "ImageSet":
        """The images at `index` (positions, a mask or a slice), with their labels and ids."""
        positions = torch.arange(len(self))[index]
        on_device = send(positions, self.images.device)
        labels = None if self.labels is None else self.labels[on_device]
        ids = None if self.ids is None else tuple(self.ids[i] for i in positions.tolist())
        return ImageSet(self.images[on_device], labels, ids, self.source)

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set with its images and labels on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)


# Found and read.


def load_cifar10(
    root: str | os.PathLike | None = None,
    give_up_after: float = math.inf,
    home: Path = Path("data"),
    archives: Path | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Return the 50,000 training and 10,000 test images, with the md5 of each file checked.

    They are looked for as `find_cifar10` does; where they aren't, they are downloaded into `home`
    (see `download_cifar10`), from the address in `CIFAR10_MIRROR` or from other sources, for
    `give_up_after` seconds at most.

    Raises InputError if there is no whole CIFAR-10.
    """
    folder = find_cifar10(root, home)
    if folder is None:
        mirror = environment.read("CIFAR10_MIRROR")
        folder = download_cifar10(home, mirror, give_up_after, archives)
    return _read(folder, CIFAR10.train_list), _read(folder, CIFAR10.test_list)


def find_cifar10(root: str | os.PathLike | None = None, home: Path = Path("data")) -> Path | None:
    """Return the folder that holds CIFAR-10's files, or None.

    It is looked for in `root`; if none is given, in `CIFAR10_ROOT`; if that isn't set, in `home`
    and in Kaggle's input folder. A folder that lacks one of the files is passed over.

    Raises InputError if `root` or `CIFAR10_ROOT` is given and holds no such folder.
    """
    named = root or environment.read("CIFAR10_ROOT")
    if not named:
        # Kaggle mounts data sets at different depths: <name>/, or datasets/<user>/<name>/.
        found = [home / FOLDER, *sorted(KAGGLE_INPUT.glob(f"**/{FOLDER}"))]
        return next(filter(_has_all_batches, found), None)

    places = [Path(named, FOLDER), Path(named)]
    for folder in filter(_has_all_batches, places):
        return folder
    # A folder of that name that isn't whole: reading it will say which file is missing.
    for folder in places:
        if folder.name == FOLDER and os.path.isdir(folder):
            return folder
    what = f"{'the given path' if root else 'CIFAR10_ROOT'}: expected {FOLDER}/ in {named}"
    raise InputError(f"{what}, found none: name the folder that holds {FOLDER}/")


def _has_all_batches(folder: Path) -> bool:
    files = CIFAR10.train_list + CIFAR10.test_list
    return all(os.path.isfile(folder / name) for name, _ in files)


def _read(folder: Path, files: list[list[str]]) -> ImageSet:
    """The images of some batches, each given by its file's name and md5.

    torchvision.datasets.CIFAR10 reads them too, but of a damaged file it says only that something
    is missing or damaged; here the message names the file. And it would unpickle whatever it finds.
    """
    images, labels = [], []
    for name, md5 in files:
        remedy = "delete the folder to download it again, or copy the file again"
        with explained(f"{folder / name} can't be read", remedy):
            content = read_regular(folder / name, pickles.MAX_BYTES)
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
                raise ValueError(f"expected md5 {md5}, the file differs")
        batch = pickles.read(content)
        images.append(batch["data"].reshape(-1, 3, 32, 32))  # from (10000, 3072)
        labels += batch["labels"]
    return ImageSet(torch.from_numpy(np.concatenate(images)), torch.tensor(labels))


# Split.


def stratified_split(labels: Tensor, n_validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split images into a training and a validation part in which classes have equal shares.

    Returns the positions of both, int64, each in rising order.

    Raises InputError if a class would be missing from one of them.
    """
    n = len(labels)
    sizes = f"{n} images into {n - n_validation} and {n_validation}"
    with explained(f"can't split {sizes}", "choose another number"):
        parts = train_test_split(
            np.arange(n), test_size=n_validation, stratify=labels.cpu(), random_state=seed
        )
    train, validation = (torch.from_numpy(np.sort(part)) for part in parts)
    return train, validation


# Measured.


def channel_histogram(images: Tensor) -> Tensor:
    """Count how often each value occurs in each channel.

    uint8 (N, 3, H, W) -> int64 (3, 256) on the CPU.
    """
    counts = torch.zeros(3, 256, dtype=torch.int64, device=images.device)
    for chunk in images.split(2000):
        for channel in range(3):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    return counts.cpu()


def channel_statistics(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and standard deviation of each channel over all pixels of a set.

    uint8 (N, 3, H, W) -> float64 (3,) each, in [0, 1]. With the whole numbers S1 = sum of x and
    S2 = sum of x^2 over n pixels they are S1 / n and sqrt(S2 / n - (S1 / n)^2), without rounding
    on the way.
    """
    counts = channel_histogram(images).numpy()
    values = np.arange(256)
    n, s1, s2 = counts.sum(1), counts @ values, counts @ values**2
    return s1 / n / 255, np.sqrt(s2 / n - (s1 / n) ** 2) / 255


# Normalised.


@dataclass(frozen=True)
class Normalization:
    """The mean and standard deviation of each channel, in [0, 1], that belong together.

    A network predicts well only what is normalised as its weights expect, so the two travel as one.
    """

    mean: Channels
    std: Channels

    @classmethod
    def of(cls, images: Tensor) -> "Normalization":
        """The one by the statistics of these images themselves, uint8 (N, 3, H, W).

        Raises InputError if a channel is constant: nothing can be divided by its deviation of 0.
        """
        mean, std = channel_statistics(images)
        if min(std) == 0:
            what = "images: expected different values in each channel, one is constant"
            raise InputError(f"{what}: use images with contrast, or --adapt none")
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def __call__(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std in each channel: uint8 (N, 3, H, W) -> float32, on their device.

        The result has the memory format that is fast there.
        """
        return rescale(images, *self.scale_and_offset(images.device))

    def scale_and_offset(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same as x * scale - offset, float32 (1, 3, 1, 1) each, on `device`.

        Who normalises many batches sends these once instead of once a batch.
        """
        scale = 1 / (255 * torch.tensor(self.std, dtype=torch.float32))
        offset = torch.tensor(self.mean, dtype=torch.float32) * 255 * scale
        return scale.view(1, 3, 1, 1).to(device), offset.view(1, 3, 1, 1).to(device)


def rescale(images: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """x * scale - offset: uint8 (N, 3, H, W) -> float32, in the memory format of their device."""
    scaled = images.float().mul_(scale).sub_(offset)
    # The format as the last step: channels-last on a CPU is four times faster than as the first.
    return scaled.contiguous(memory_format=memory_format(images.device))
