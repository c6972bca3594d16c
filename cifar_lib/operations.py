"""The operations of RandAugment, AutoAugment and TrivialAugment, on batches of uint8 images.

Each operation is one function of the images (n, 3, 32, 32) and a magnitude; OPERATIONS lists them
all. Their pixels are those of Pillow 10 to 13, to the last one (nearest pixel, black outside):
tests/test_augment.py compares every operation at every magnitude and sign.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import autoaugment as reference
from torchvision.transforms.v2 import functional as kernels

from cifar_lib import hardware

SIZE = 32
NEAREST = reference.InterpolationMode.NEAREST

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
SIGNED = (*GEOMETRIC, "Brightness", "Color", "Contrast", "Sharpness")
# The order counts: random numbers choose among the operations by their position.
OPS = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")
AUTO_OPS = (*OPS, "Invert")  # AutoAugment's


class Op(NamedTuple):
    """An operation and how strongly it is applied, in the units of `magnitudes`."""

    name: str
    magnitude: float


def magnitudes(name: str, bins: int = 31, wide: bool = False) -> list[float]:
    """What an operation's strength is in each bin, as torchvision has it.

    Shears: the tangent of the angle. Translations: pixels. Rotate: degrees. Brightness, Color,
    Contrast and Sharpness: by how much the factor differs from 1. Posterize: bits kept. Solarize:
    the threshold. The others: 0, which they ignore. `wide` gives TrivialAugmentWide's ranges.
    """
    if wide:
        space = reference.TrivialAugmentWide()._augmentation_space(bins)
    else:  # AutoAugment's are the same
        space = reference.RandAugment()._augmentation_space(bins, (SIZE, SIZE))
    values, _ = space.get(name, (torch.zeros(1), False))
    return values.float().expand(bins).tolist()


# Operations that move pixels.


def move(name: str, images: Tensor, magnitude: float) -> Tensor:
    """Shear, translate or rotate: every pixel is copied from the one that Pillow takes it from."""
    source, is_inside = _source_pixels(name, magnitude, images.device)  # (1024,) each
    # On a CPU gather with an expanded index is three times as fast as images[:, :, source].
    index = source.expand(*images.shape[:2], -1)  # (n, 3, 1024)
    moved = images.flatten(2).gather(2, index)  # (n, 3, 1024)
    return moved.mul_(is_inside).view_as(images)


@lru_cache(maxsize=1024)
def _source_pixels(name: str, magnitude: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of the 1024 pixels after a move, the pixel it was before, int64 (1024,), and whether
    that lay inside the image, as 0 or 1, uint8 (1024,).

    Pillow itself says so: it moves a picture whose pixels are numbered from 1, and 0 is outside.
    """
    numbers = np.arange(1, SIZE * SIZE + 1, dtype=np.int32).reshape(SIZE, SIZE)
    picture = Image.fromarray(numbers)
    moved = np.array(reference._apply_op(picture, name, magnitude, NEAREST, fill=None))
    source = torch.from_numpy(moved).long().flatten().to(device)  # (1024,)
    return (source - 1).clamp_(min=0), (source > 0).to(torch.uint8)


# Operations that blend each image with a plainer one: base + (1 + change) (image - base).


def brightness(images: Tensor, change: float) -> Tensor:
    """Away from black, or towards it where `change` is negative."""
    return _blend(images.new_zeros(1), images, change)


def color(images: Tensor, change: float) -> Tensor:
    """Away from the grey image, or towards it."""
    return _blend(_grey(images), images, change)


def contrast(images: Tensor, change: float) -> Tensor:
    """Away from the image's mean grey level, or towards it."""
    return _blend(_grey(images).mean((1, 2, 3), keepdim=True), images, change)


def sharpness(images: Tensor, change: float) -> Tensor:
    """Away from the smoothed image, or towards it."""
    return _blend(_smooth(images), images, change)


def _blend(base: Tensor, images: Tensor, change: float) -> Tensor:
    """Pillow's blend: the base is rounded to whole levels, the result is cut at 0 and 255."""
    base = (base + 0.5).floor_()
    # Neither lerp nor addcmul: they round once where Pillow rounds twice.
    blended = images.float().sub_(base).mul_(1 + change).add_(base)
    return blended.clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Grey levels, whole numbers as float32 (n, 1, 32, 32): exact, since no sum reaches 2**24."""
    red, green, blue = images.float().split(1, dim=1)  # (n, 1, 32, 32) each
    total = red * 19595 + green * 38470 + blue * 7471
    return total.add_(32768).div_(65536).floor_()


def _smooth(images: Tensor) -> Tensor:
    """Each pixel averaged with its neighbours by (1 1 1, 1 5 1, 1 1 1) / 13, float32; the border
    stays as it is."""
    smooth = images.float()
    columns = smooth[:, :, :-2] + smooth[:, :, 1:-1]
    columns.add_(smooth[:, :, 2:])  # (n, 3, 30, 32): sums of three rows
    around = columns[..., :-2] + columns[..., 1:-1]
    around.add_(columns[..., 2:])  # (n, 3, 30, 30): sums of three by three pixels
    inner = smooth[:, :, 1:-1, 1:-1]
    inner.copy_(around.add_(inner, alpha=4).mul_(1 / 13))
    return smooth


# Operations on the levels of single pixels.


def identity(images: Tensor, _: float) -> Tensor:
    return images


def invert(images: Tensor, _: float) -> Tensor:
    return 255 - images


def posterize(images: Tensor, bits: float) -> Tensor:
    """Only the highest bits of each value are kept."""
    return images & (256 - 2 ** (8 - int(bits)))


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Values at the threshold or above it are inverted."""
    return torch.where(images >= math.ceil(threshold), 255 - images, images)


def autocontrast(images: Tensor, _: float) -> Tensor:
    """Each channel is stretched to 0 to 255, unless it is constant. (Pillow's arithmetic may cut
    the brightest value to 254.)"""
    if images.device.type == hardware.APPLE_GPU:  # which lacks the float64 of Pillow
        return autocontrast(images.cpu(), 0.0).to(images.device)
    darkest, brightest = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    is_constant = darkest == brightest  # (n, 3, 1, 1)
    darkest = darkest.masked_fill(is_constant, 0).double()
    brightest = brightest.masked_fill(is_constant, 255).double()
    # A plain 255 / x would be computed as 255 times 1 / x, which rounds differently.
    scale = torch.tensor(255.0) / (brightest - darkest)
    return images.double().mul_(scale).sub_(darkest * scale).to(torch.uint8)


def equalize(images: Tensor, _: float) -> Tensor:
    """Each channel's levels are spread so that they occur about equally often."""
    return kernels.equalize(images)


OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Identity": identity,
    **{name: partial(move, name) for name in GEOMETRIC},
    "Brightness": brightness,
    "Color": color,
    "Contrast": contrast,
    "Sharpness": sharpness,
    "Posterize": posterize,
    "Solarize": solarize,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": invert,
}


def apply_op(images: Tensor, name: str, magnitude: float) -> Tensor:
    """One operation on all images: uint8 (n, 3, 32, 32) -> the same shape; the images stay."""
    return OPERATIONS[name](images, magnitude)
