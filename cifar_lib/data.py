"""CIFAR-10 as uint8 tensors: how it is found, read, split, measured and normalised."""

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
REAL, STAND_IN = "CIFAR-10", "stand-in data"  # two values of `ImageSet.source`
Channels = tuple[float, ...]  # three numbers: one each for red, green and blue

# The means and standard deviations below belong to values in [0, 1].
# The first two are taken over all pixels of the 50,000 training images, by `channel_statistics`.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
# A widespread wrong value, which the published run used. It is each image's own standard deviation,
# averaged over the images (notebook 1).
PUBLISHED_STD = (0.2023, 0.1994, 0.2010)
# The published run normalised CIFAR-10's test images with these values. Their origin is unknown.
# They match no statistics of CIFAR-10 that we know of.
PUBLISHED_TEST_MEAN = (0.5303, 0.4737, 0.4658)
PUBLISHED_TEST_STD = (0.2822, 0.2553, 0.2613)
# The published run normalised the Kaggle competition's images with these values. They
# are those images' own statistics, according to the report.
KAGGLE_MEAN = (0.4765, 0.4808, 0.4958)
KAGGLE_STD = (0.2303, 0.2267, 0.2268)

FOLDER = CIFAR10.base_folder  # cifar-10-batches-py
KAGGLE_INPUT = Path("/kaggle/input")  # where Kaggle mounts data sets


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels and ids, and where they come from.

    images: uint8 (N, 3, 32, 32).
    labels: int64 (N,), positions in CLASSES; None if they are unknown.
    ids: one per image, as its file gives them; None if the file has no ids.
    source: REAL, STAND_IN, or a file's name and how it was read.
    """

    images: Tensor
    labels: Tensor | None = None
    ids: tuple[int | str, ...] | None = None
    source: str = REAL

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | np.ndarray | slice) -> "ImageSet":
        """Return the images at `index` with their labels and ids.

        index: positions, a mask or a slice, on the CPU, whatever the device of the images.
        """
        positions = torch.arange(len(self))[index]  # int64, whatever `index` is
        on_device = send(positions, self.images.device)
        labels = None if self.labels is None else self.labels[on_device]
        ids = None if self.ids is None else tuple(self.ids[i] for i in positions.tolist())
        return ImageSet(self.images[on_device], labels, ids, self.source)

    def to(self, device: torch.device | str) -> "ImageSet":
        """Return the same set with its images and labels on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)


# Finding and reading.


def load_cifar10(
    root: str | os.PathLike | None = None,
    give_up_after: float = math.inf,
    home: Path = Path("data"),
    archives: Path | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Return the 50,000 training and the 10,000 test images. The md5 of each file is checked.

    If `find_cifar10` finds no folder, CIFAR-10 is downloaded into `home`, from the address in
    `CIFAR10_MIRROR` or from other sources. The download is given up after `give_up_after` seconds.
    If a folder `archives` is given, the downloaded archive is kept there.

    Raises InputError if CIFAR-10 is neither found whole nor downloaded.
    """
    folder = find_cifar10(root, home)
    if folder is None:
        mirror = environment.read("CIFAR10_MIRROR")
        folder = download_cifar10(home, mirror, give_up_after, archives)
    return _read(folder, CIFAR10.train_list), _read(folder, CIFAR10.test_list)


def find_cifar10(root: str | os.PathLike | None = None, home: Path = Path("data")) -> Path | None:
    """Return the folder that holds CIFAR-10's files, or None.

    The search looks in `root`, or in the folder that the environment variable `CIFAR10_ROOT` names.
    If neither is given, it looks in `home` and in Kaggle's input folder. A folder that lacks one of
    the files is skipped. But if the user named the place, and it has no complete folder, the
    incomplete one is returned, because reading it says which file is missing.

    Raises InputError if `root` or `CIFAR10_ROOT` is given, but doesn't contain such a folder.
    """
    named = root or environment.read("CIFAR10_ROOT")
    if not named:
        # Kaggle mounts data sets at different depths: <name>/ or datasets/<user>/<name>/.
        places = [home / FOLDER, *sorted(KAGGLE_INPUT.glob(f"**/{FOLDER}"))]
        return next(filter(_has_all_batches, places), None)

    # The path may name the folder itself, or the folder that contains it.
    places = [Path(named, FOLDER), Path(named)]
    for folder in filter(_has_all_batches, places):
        return folder

    # A folder with the right name may lack a file. Reading it will say which one.
    for folder in places:
        if folder.name == FOLDER and os.path.isdir(folder):
            return folder
    what = f"{'the given path' if root else 'CIFAR10_ROOT'}: expected {FOLDER}/ in {named}"
    raise InputError(f"{what}, found none: name the folder that holds {FOLDER}/")


def _has_all_batches(folder: Path) -> bool:
    """Return whether `folder` has all six of CIFAR-10's files."""
    files = CIFAR10.train_list + CIFAR10.test_list
    return all(os.path.isfile(folder / name) for name, _ in files)


def _read(folder: Path, files: list[list[str]]) -> ImageSet:
    """Return the images and labels of `files`, which lists each file's name and md5.

    torchvision.datasets.CIFAR10 could read them too. But it doesn't say which file is damaged, and
    it unpickles whatever a file contains. `pickles.read` accepts only arrays and plain data.

    Raises InputError if a file is missing or has another md5; the message names the file.
    """
    images, labels = [], []
    for name, md5 in files:
        remedy = "copy the file again, or move the folder away to download it again"
        with explained(f"{folder / name} can't be read", remedy):
            content = read_regular(folder / name, pickles.MAX_BYTES)
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
                raise ValueError(f"expected md5 {md5}, the file differs")
        batch = pickles.read(content)
        images.append(batch["data"].reshape(-1, 3, 32, 32))  # from (10000, 3072)
        labels += batch["labels"]
    return ImageSet(torch.from_numpy(np.concatenate(images)), torch.tensor(labels))


# Splitting.


def stratified_split(labels: Tensor, n_validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split images into training and validation images; classes have the same shares in both.

    labels: int64 (N,). Returns the positions of the training images, int64 (N - n_validation,),
    and of the validation images, int64 (n_validation,), each in ascending order.

    Raises InputError if a part would have fewer images than there are classes, or if a class has
    only one image.
    """
    n = len(labels)
    sizes = f"{n} images into {n - n_validation} and {n_validation}"
    with explained(f"can't split {sizes}", "choose another train_size or validation_size"):
        parts = train_test_split(
            np.arange(n), test_size=n_validation, stratify=labels.cpu(), random_state=seed
        )
    train, validation = (torch.from_numpy(np.sort(part)) for part in parts)
    return train, validation


# Measuring.


def channel_histogram(images: Tensor) -> Tensor:
    """Count how often each value occurs in each channel.

    uint8 (N, 3, H, W) -> int64 (3, 256) on the CPU.
    """
    counts = torch.zeros(3, 256, dtype=torch.int64, device=images.device)
    for chunk in images.split(2000):  # saves memory: `flatten` copies a channel's values
        for channel in range(3):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    return counts.cpu()


def channel_statistics(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and standard deviation of each channel over all pixels of all images.

    uint8 (N, 3, H, W) -> float64 (3,) each, in [0, 1].

    With S1 the sum of x and S2 the sum of x^2 over n pixels, the mean is S1 / n, and the standard
    deviation is sqrt(S2 / n - (S1 / n)^2). Both sums are exact, because they are whole numbers.
    """
    counts = channel_histogram(images).numpy()  # (3, 256)
    values = np.arange(256)
    n = counts.sum(1)  # (3,), like s1 and s2
    s1 = counts @ values
    s2 = counts @ values**2
    return s1 / n / 255, np.sqrt(s2 / n - (s1 / n) ** 2) / 255


# Normalising.


@dataclass(frozen=True)
class Normalization:
    """The mean and standard deviation of each channel, in [0, 1], to normalise images with.

    A network predicts well only if images are normalised as its weights expect. Normalising takes
    both `mean` and `std`, so they are passed around together.
    """

    mean: Channels
    std: Channels

    @classmethod
    def of(cls, images: Tensor) -> "Normalization":
        """Return the normalization with the statistics of `images`, uint8 (N, 3, H, W).

        Raises InputError if a channel is constant, because nothing can be divided by its standard
        deviation, 0.
        """
        mean, std = channel_statistics(images)
        if min(std) == 0:
            what = (
                "images: a colour channel has the same value everywhere, so it can't be normalised"
            )
            raise InputError(f"{what}: use images with contrast, or --adapt none in `submit`")
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def __call__(self, images: Tensor) -> Tensor:
        """Return (x / 255 - mean) / std in each channel: uint8 (N, 3, H, W) -> float32.

        The result is on the images' device, in the memory format for that device.
        """
        return rescale(images, *self.scale_and_offset(images.device))

    def scale_and_offset(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the scale and the offset with which x * scale - offset is the normalised image.

        Both are float32 (1, 3, 1, 1), on `device`. Training sends them there once, and then calls
        `rescale` on each batch.
        """
        scale = 1 / (255 * torch.tensor(self.std, dtype=torch.float32))  # (3,)
        offset = torch.tensor(self.mean, dtype=torch.float32) * 255 * scale  # (3,)
        return scale.view(1, 3, 1, 1).to(device), offset.view(1, 3, 1, 1).to(device)


def rescale(images: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return x * scale - offset: uint8 (N, 3, H, W) -> float32, in the device's memory format."""
    scaled = images.float().mul_(scale).sub_(offset)
    # The memory format is changed last. On a CPU this is three times as fast as changing it first.
    return scaled.contiguous(memory_format=memory_format(images.device))
