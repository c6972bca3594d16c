"""The operations of RandAugment, AutoAugment and TrivialAugment, on batches of uint8 images.

Each operation is one function of the images, uint8 (n, 3, 32, 32), and a magnitude; OPERATIONS
lists them all. They give exactly the pixels that Pillow gives when it takes the nearest pixel and
fills with black. tests/test_augment.py compares every operation at every magnitude and sign.
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

from cifar_lib import hardware

SIZE = 32  # height and width of an image, in pixels
NEAREST = reference.InterpolationMode.NEAREST

# Operations that move pixels.
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
# Operations whose magnitude gets a random sign, because they go either way.
SIGNED = (*GEOMETRIC, "Brightness", "Color", "Contrast", "Sharpness")
# Random numbers choose operations by their position here, so another order would change training.
OPS = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")
AUTO_OPS = (*OPS, "Invert")  # the operations of AutoAugment


class Op(NamedTuple):
    """An operation and how strongly it is applied, in the units of `magnitudes`."""

    name: str
    magnitude: float


def magnitudes(name: str, bins: int = 31, wide: bool = False) -> list[float]:
    """Return the magnitudes of the operation `name`, as torchvision defines them.

    There is one for each level of strength, which torchvision calls a bin.

    ShearX and ShearY: the tangent of the angle.
    TranslateX and TranslateY: pixels.
    Rotate: degrees.
    Brightness, Color, Contrast, Sharpness: how much Pillow's enhancement factor differs from 1.
    Posterize: how many bits are kept.
    Solarize: the threshold.
    All others: 0, which they ignore.

    With `wide` the ranges are those of TrivialAugmentWide, else those that RandAugment and
    AutoAugment have.
    """
    # torchvision's table: {name: (its magnitudes, whether their sign is drawn)}.
    if wide:
        table = reference.TrivialAugmentWide()._augmentation_space(bins)
    else:
        table = reference.RandAugment()._augmentation_space(bins, (SIZE, SIZE))

    # Invert isn't in the table. An operation without magnitudes has a single 0 there. `expand`
    # repeats a single 0 for each bin.
    values, _ = table.get(name, (torch.zeros(1), False))
    return values.float().expand(bins).tolist()


# Operations that move pixels. Each pixel of the result is a copy of one pixel of the image, its
# source pixel, or black.


def move(name: str, images: Tensor, magnitude: float) -> Tensor:
    """Shear, translate or rotate the images, with the same source pixels as Pillow."""
    source, is_inside = _source_pixels(name, magnitude, images.device)  # (1024,) each
    # On a CPU, gather with an expanded index is three times as fast as images[:, :, source].
    index = source.expand(*images.shape[:2], -1)  # (n, 3, 1024)
    moved = images.flatten(2).gather(2, index)  # (n, 3, 1024)
    return moved.mul_(is_inside).view_as(images)


@lru_cache(maxsize=1024)
def _source_pixels(name: str, magnitude: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which source pixel a move copies to each of the 1024 pixels of its result.

    The first tensor, int64 (1024,), is the source pixel's position in the flattened image. The
    second, uint8 (1024,), is 1 where the source pixel lies inside the image, and 0 where the result
    is black.
    """
    # Let Pillow move a picture whose pixels are numbered from 1, and fill it with 0.
    numbers = np.arange(1, SIZE * SIZE + 1, dtype=np.int32).reshape(SIZE, SIZE)
    picture = Image.fromarray(numbers)
    moved = np.array(reference._apply_op(picture, name, magnitude, NEAREST, fill=None))
    source_numbers = torch.from_numpy(moved).long().flatten().to(device)  # (1024,), 0 for black
    return (source_numbers - 1).clamp_(min=0), (source_numbers > 0).to(torch.uint8)


# Operations that blend each image with a plainer one, the base. They return
# base + (1 + change) * (image - base): a positive change moves the image away from the base, a
# negative one towards it.


def brightness(images: Tensor, change: float) -> Tensor:
    """Blend each image with black. Black is 0, which leaves image * (1 + change)."""
    return to_uint8(images.float().mul_(1 + change).clamp_(0, 255))


def color(images: Tensor, change: float) -> Tensor:
    """Blend each image with the same image in grey."""
    return _blend(_grey(images), images, change)


def contrast(images: Tensor, change: float) -> Tensor:
    """Blend each image with its own mean grey level, rounded: one number per image."""
    mean = _grey(images).mean((1, 2, 3), keepdim=True)  # (n, 1, 1, 1)
    return _blend(_round(mean), images, change)


def sharpness(images: Tensor, change: float) -> Tensor:
    """Blend each image with the same image smoothed. The outermost pixels stay as they are."""
    inner = images[:, :, 1:-1, 1:-1]  # (n, 3, 30, 30), a view
    sharpened = images.clone()
    sharpened[:, :, 1:-1, 1:-1] = _blend(_smooth(images), inner, change)
    return sharpened


def _blend(base: Tensor, images: Tensor, change: float) -> Tensor:
    """Blend as Pillow does. The base consists of whole levels, in float32."""
    # Pillow rounds the product and the sum to float32. lerp and addcmul would round only once.
    blended = images.float().sub_(base).mul_(1 + change).add_(base)
    return to_uint8(blended.clamp_(0, 255))


def to_uint8(levels: Tensor) -> Tensor:
    """Convert levels from 0 to 255, float32 or float64, to uint8: fractions are dropped."""
    # On a CPU PyTorch converts floats to uint8 one by one. Through int16 it is three times as fast.
    return levels.to(torch.int16).to(torch.uint8)


def _round(levels: Tensor) -> Tensor:
    """Round non-negative levels to whole ones, in place. A half is rounded up."""
    return levels.add_(0.5).floor_()


def _grey(images: Tensor) -> Tensor:
    """Return grey levels, float32 (n, 1, 32, 32), which are whole numbers, as Pillow rounds them.

    Below 2**24 float32 is exact for whole numbers, and no sum here reaches that.
    """
    red, green, blue = images.float().split(1, dim=1)  # (n, 1, 32, 32) each
    # These are Pillow's weights, whose sum is 65536.
    total = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return _round(total.div_(65536))


def _smooth(images: Tensor) -> Tensor:
    """Return each inner pixel averaged with its eight neighbours, rounded to whole levels.

    uint8 (n, 3, 32, 32) -> float32 (n, 3, 30, 30). The weights are (1 1 1, 1 5 1, 1 1 1) / 13.
    """
    values = images.to(torch.int16)  # the sums are at most 13 * 255, which fits

    # Sums of three vertically adjacent pixels, then of three such sums side by side.
    columns = values[:, :, :-2] + values[:, :, 1:-1]
    columns.add_(values[:, :, 2:])  # (n, 3, 30, 32)
    squares = columns[..., :-2] + columns[..., 1:-1]
    squares.add_(columns[..., 2:])  # (n, 3, 30, 30): each 3x3 square with equal weights

    # The middle pixel is already counted once; adding it four more times makes its weight 5.
    squares.add_(values[:, :, 1:-1, 1:-1], alpha=4)
    return _round(squares.float().mul_(1 / 13))


# Operations that map values to values: within a channel of an image, equal values become the same
# value, wherever they are. All of them take a magnitude; those that don't use it call it `_`.


def identity(images: Tensor, _: float) -> Tensor:
    """Return the images themselves."""
    return images


def invert(images: Tensor, _: float) -> Tensor:
    """Exchange dark and bright."""
    return 255 - images


def posterize(images: Tensor, bits: float) -> Tensor:
    """Keep only the highest `bits` of the 8 bits of each value."""
    return images & (256 - 2 ** (8 - int(bits)))  # 4 bits: & 0b11110000


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the values that are at the threshold or above it."""
    # A whole number x is at least the threshold just if it is at least the threshold rounded up,
    # and the comparison with a whole number stays in uint8.
    is_inverted = (images >= math.ceil(threshold)).view(torch.uint8)  # 1 or 0
    # 255 - x is x with all its bits flipped, that is x ^ 255, and x ^ 0 is x. This is three times
    # as fast on a CPU as torch.where.
    return images ^ is_inverted.mul_(255)


def autocontrast(images: Tensor, _: float) -> Tensor:
    """Stretch each channel so that its values go from 0 to 255, unless it is constant.

    As in Pillow, whose arithmetic this follows, the brightest value may come out as 254.
    """
    # Pillow computes in float64, which an Apple GPU doesn't have: there the CPU does it.
    if images.device.type == hardware.APPLE_GPU:
        return autocontrast(images.cpu(), 0.0).to(images.device)

    # The limits of each channel. With limits of 0 and 255, a constant channel stays as it is.
    darkest = images.amin((2, 3), keepdim=True)  # (n, 3, 1, 1)
    brightest = images.amax((2, 3), keepdim=True)  # (n, 3, 1, 1)
    is_constant = darkest == brightest  # (n, 3, 1, 1)
    darkest = darkest.masked_fill(is_constant, 0).double()
    brightest = brightest.masked_fill(is_constant, 255).double()

    # PyTorch computes 255 / x as 255 * (1 / x), which rounds differently, unless 255 is a tensor.
    scale = torch.tensor(255.0) / (brightest - darkest)  # (n, 3, 1, 1)
    return to_uint8(images.double().mul_(scale).sub_(darkest * scale))


def equalize(images: Tensor, _: float) -> Tensor:
    """Spread each channel's values so that all of them occur about equally often.

    A value becomes the number of pixels that are darker, divided by `step` and rounded. The step is
    the number of pixels darker than the channel's brightest value, divided by 255 and rounded down.
    Where the step is 0, the channel stays as it is. torchvision's `equalize` gives the same values,
    but takes 1.5 times as long on a CPU.
    """
    # Count how often each value occurs in each channel, and how many pixels are darker than it.
    values = images.flatten(2).long()  # (n, 3, 1024)
    ones = torch.ones(1, dtype=torch.int32, device=images.device).expand_as(values)
    counts = ones.new_zeros((*values.shape[:2], 256)).scatter_add_(2, values, ones)  # (n, 3, 256)
    darker = counts.cumsum(2, dtype=torch.float32).sub_(counts)  # (n, 3, 256)

    # Each channel's table: what each of the 256 values becomes.
    brightest = images.flatten(2).amax(2, keepdim=True).long()  # (n, 3, 1)
    step = darker.gather(2, brightest).div_(255).floor_()  # (n, 3, 1)
    table = darker.add_((step / 2).floor_()).div_(step).clamp_(max=255)
    unchanged = torch.arange(256.0, device=images.device)
    table = to_uint8(torch.where(step == 0, unchanged, table))
    return table.gather(2, values).view_as(images)


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
    """Apply the operation `name` to all images: uint8 (n, 3, 32, 32) -> uint8 (n, 3, 32, 32).

    The given tensor isn't changed. Identity returns the given tensor itself.
    """
    return OPERATIONS[name](images, magnitude)
