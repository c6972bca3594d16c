"""Shifted images with known labels: CIFAR-10's as they might look if they came from elsewhere."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as kernels

from cifar_lib import data
from cifar_lib.data import Channels, ImageSet
from cifar_lib.errors import InputError
from cifar_lib.files import write_atomically

SEVERITIES = (1, 2, 3, 4, 5)


def _statistics(images: Tensor, distance: int) -> Tensor:
    """Return the images with channel statistics that differ from CIFAR-10's.

    The difference is `distance` times that of the competition's images.
    """
    mean = np.add(data.CIFAR10_MEAN, distance * np.subtract(data.KAGGLE_MEAN, data.CIFAR10_MEAN))
    std = np.add(data.CIFAR10_STD, distance * np.subtract(data.KAGGLE_STD, data.CIFAR10_STD))
    return match_statistics(images, mean, std)


def _noise(images: Tensor, sigma: float) -> Tensor:
    """Return the images with normal noise, which is the same in every call.

    sigma: the noise's standard deviation, for pixel values in [0, 1].
    """
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    moved = images + (255 * sigma * noise).to(images.device)
    return moved.round().clamp(0, 255).to(torch.uint8)


def _blur(images: Tensor, sigma: float) -> Tensor:
    return kernels.gaussian_blur(images, 7, sigma)


def _jpeg(images: Tensor, quality: int) -> Tensor:
    return kernels.jpeg(images.cpu(), quality).to(images.device)


def _pixelate(images: Tensor, side: int) -> Tensor:
    """Return the images shrunk to `side` x `side` pixels, and enlarged again without smoothing."""
    small = kernels.resize(images, [side, side], kernels.InterpolationMode.BILINEAR, antialias=True)
    return kernels.resize(small, [32, 32], kernels.InterpolationMode.NEAREST_EXACT)


# Each family's amounts at severities 1 to 5. Those of contrast, noise, blur and JPEG are
# CIFAR-10-C's (Hendrycks and Dietterich 2019, arXiv:1903.12261); brightness goes towards dark,
# saturation towards grey.
FAMILIES = {
    "statistics": (_statistics, (1, 2, 3, 4, 5)),  # 1: a synthetic copy of the published custom set
    "brightness": (kernels.adjust_brightness, (0.85, 0.7, 0.55, 0.4, 0.25)),
    "contrast": (kernels.adjust_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "saturation": (kernels.adjust_saturation, (0.8, 0.6, 0.4, 0.2, 0.0)),
    "noise": (_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "blur": (_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "jpeg": (_jpeg, (80, 65, 58, 50, 40)),
    "pixelate": (_pixelate, (24, 20, 16, 12, 8)),
}
# What texts, figures and tables call the families.
NAMES = dict(zip(FAMILIES, FAMILIES, strict=True)) | {
    "statistics": "channel statistics",
    "brightness": "darkness",
    "jpeg": "JPEG",
    "pixelate": "pixelation",
}


def shifted(images: Tensor, family: str, severity: int) -> Tensor:
    """Return the images as another source might have given them, the same in every call.

    uint8 (N, 3, 32, 32) -> uint8 (N, 3, 32, 32); `severity` is 1 to 5.
    """
    change, amounts = FAMILIES[family]
    return change(images, amounts[SEVERITIES.index(severity)])


def match_statistics(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """Return the images with this mean and standard deviation per channel, in [0, 1].

    uint8 (N, 3, H, W) -> uint8 (N, 3, H, W), with one gain and one offset per channel for the whole
    set. Values are cut off at 0 and 255, which moves the statistics again, so gain and offset are
    corrected up to 20 times.

    Raises InputError if a channel is constant, because no gain can spread it.
    """
    mean, std = np.asarray(mean), np.asarray(std)
    start_mean, start_std = data.channel_statistics(images)
    if min(start_std) == 0:
        raise InputError("shift: a channel of these images is constant: use images with contrast")
    counts = data.channel_histogram(images).numpy()  # (3, 256)
    gain = std / start_std  # (3,)
    offset = mean - gain * start_mean  # (3,)
    for _ in range(20):
        # What each value becomes: (3, 256).
        table = np.arange(256) * gain[:, None] + 255 * offset[:, None]
        table = table.round().clip(0, 255)

        # The statistics of the images with these values.
        now_mean = np.average(table, 1, counts) / 255
        now_std = np.sqrt(np.average(table**2, 1, counts) / 255**2 - now_mean**2)
        if max(np.abs(now_mean - mean).max(), np.abs(now_std - std).max()) < 5e-5:
            break

        # Correct gain and offset for the difference that remains. A larger gain also moves the
        # mean, which the last term takes back, roughly; the loop does the rest.
        gain *= std / now_std
        offset += mean - now_mean - (std / now_std - 1) * start_mean * gain
    table = torch.from_numpy(table.astype(np.uint8)).to(images.device)
    channels = [table[c][images[:, c].long()] for c in range(3)]  # (N, H, W) each
    return torch.stack(channels, dim=1)


def generate_test_file(path: str | os.PathLike, test: ImageSet, seed: int = 0) -> ImageSet:
    """Write a file in the competition's format, and return its images with their labels.

    The file is a stand-in for the real one. It holds the images of `test` in another order, with
    the channel statistics of the competition's images.

    Raises InputError if a channel of `test` is constant.
    """
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    shuffled = test[order]
    images = match_statistics(shuffled.images, data.KAGGLE_MEAN, data.KAGGLE_STD)
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()  # (N, 32, 32, 3), as the file has them
    ids = list(range(len(images)))
    write_atomically(Path(path), pickle.dumps({b"data": pixels, b"ids": ids}, protocol=4))
    return replace(shuffled, images=images, ids=tuple(ids))
