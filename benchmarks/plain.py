"""Simple versions of the steps of cifar_lib/augment.py, of some operations, and of normalisation.

They compute what the docstrings of the package's versions say. A test checks that both give the
same pixels, and benchmarks/augment.py measures how many times as fast the package's versions are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as kernels

from cifar_lib import operations
from cifar_lib.hardware import memory_format
from cifar_lib.operations import SIZE, Op, apply_op


def crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Cut a slice out of each padded image: uint8 (n, 3, 32, 32) -> the same.

    offsets: int64 (n, 2), each slice's top and left.
    """
    padded = F.pad(images, (padding,) * 4)  # (n, 3, 32 + 2 * padding, 32 + 2 * padding)
    corners = zip(padded, offsets.tolist(), strict=True)
    return torch.stack([p[:, top : top + SIZE, left : left + SIZE] for p, (top, left) in corners])


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Choose each pixel from the mirror image or the image; `mirrored` is bool (n,)."""
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def erase(images: Tensor, boxes: Tensor, fill: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """Choose each pixel from the colour `fill`, inside the box, or the image.

    boxes: int64 (n, 4), each box's top, left, height and width.
    """
    row, column = torch.arange(SIZE)[:, None], torch.arange(SIZE)  # (32, 1) and (32,)
    top, left, height, width = boxes[:, :, None, None, None].unbind(1)  # (n, 1, 1, 1) each
    in_rows = (row >= top) & (row < top + height)  # (n, 1, 32, 1)
    in_columns = (column >= left) & (column < left + width)  # (n, 1, 1, 32)
    hole = in_rows & in_columns  # (n, 1, 32, 32)
    colour = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1)
    return torch.where(hole, colour, images)


def apply_ops(images: Tensor, table: tuple[Op, ...], ops: Tensor) -> Tensor:
    """Apply each operation to the images that have drawn it, which a mask selects.

    ops: int64 (n, slots), positions in `table`.
    """
    for slot in ops.unbind(1):  # (n,)
        changed = torch.empty_like(images)
        for number, op in enumerate(table):
            chosen = slot == number
            changed[chosen] = apply_op(images[chosen], *op)
        images = changed
    return images


def move(name: str, images: Tensor, magnitude: float) -> Tensor:
    """Take each pixel from its source pixel by indexing."""
    source, is_inside = operations._source_pixels(name, magnitude, images.device)  # (1024,) each
    return (images.flatten(2)[:, :, source] * is_inside).view_as(images)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Choose each value from the inverted image, where it is at the threshold or above it."""
    return torch.where(images >= threshold, 255 - images, images)


def equalize(images: Tensor, _: float) -> Tensor:
    """Let torchvision do it."""
    return kernels.equalize(images)


def to_uint8(levels: Tensor) -> Tensor:
    """Convert levels from 0 to 255, of float dtype, in one call."""
    return levels.to(torch.uint8)


def rescale(images: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Change the memory format first, then compute x * scale - offset."""
    floats = images.float().contiguous(memory_format=memory_format(images.device))
    return floats * scale - offset
