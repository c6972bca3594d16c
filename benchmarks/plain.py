"""Steps of the augmentation written the plain way, as their docstrings in cifar_lib define them.

A test holds the package's equal to these; benchmarks/augment.py measures how much faster it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_lib.operations import SIZE, Op, apply_op


def crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """A slice of each padded image."""
    padded = F.pad(images, (padding,) * 4)
    corners = zip(padded, offsets.tolist(), strict=True)
    return torch.stack([p[:, top : top + SIZE, left : left + SIZE] for p, (top, left) in corners])


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """torch.where on the pixels."""
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def erase(images: Tensor, boxes: Tensor, fill: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """torch.where on the pixels."""
    row, column = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    top, left, height, width = boxes[:, :, None, None, None].unbind(1)  # (n, 1, 1, 1) each
    in_rows, in_columns = (row >= top) & (row < top + height), (column >= left)
    hole = in_rows & in_columns & (column < left + width)  # (n, 1, 32, 32)
    colour = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1)
    return torch.where(hole, colour, images)


def apply_ops(images: Tensor, table: tuple[Op, ...], ops: Tensor) -> Tensor:
    """Each operation on the images that a mask selects."""
    for slot in ops.unbind(1):
        changed = torch.empty_like(images)
        for number, op in enumerate(table):
            chosen = slot == number
            changed[chosen] = apply_op(images[chosen], *op)
        images = changed
    return images
