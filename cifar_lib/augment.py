"""One epoch of augmentation as a pure function of (images, policy, seed, epoch).

All random numbers are drawn first, on the CPU (`draw`); then the pixels change (`augment`).
Therefore the result doesn't depend on the size of batches, on restarts or on the device, and all
images that get the same operation can be changed in one call.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from torchvision.transforms import autoaugment

from cifar_lib import hardware
from cifar_lib.operations import AUTO_OPS, OPS, SIGNED, SIZE, Op, apply_op, magnitudes

# How the operations are chosen: RandAugment (arXiv:1909.13719), AutoAugment (arXiv:1805.09501, its
# policies for CIFAR-10) and TrivialAugment (arXiv:2103.10158, its wide ranges).
RULES = ("none", "randaugment", "autoaugment", "trivialaugment")
# The position in `op_table` of the operation that changes nothing. OPS and AUTO_OPS begin with it.
IDENTITY = 0
# The mean colour, round(255 * CIFAR10_MEAN). Normalised, it is 0, which is what Cutout fills in.
CUTOUT_FILL = (125, 123, 114)
# What an epoch's random numbers are for. Each purpose has a stream of its own. Ordinary mirroring
# belongs to AUGMENTING, alternating flip has a stream for itself.
AUGMENTING, SHUFFLING, ALTERNATING = 0, 1, 2

Pixels = Annotated[int, Field(ge=0, le=SIZE)]
Probability = Annotated[float, Field(ge=0, le=1)]
# `checked` makes a dataclass that checks its values. It parses text ("4" becomes 4), and raises
# pydantic's ValidationError if a value doesn't fit its field's type or range.
checked = checked_dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False, extra="forbid"))


@checked
class Policy:
    """What happens to a training image. The defaults are those of the student report."""

    crop_padding: Pixels = 4  # black, on each side; then a random 32x32 crop; 0: no crop
    flip: Probability = 0.5  # probability of mirroring
    # in place of `flip`: each image is mirrored in every other epoch, and a random number decides
    # whether it begins mirrored (Jordan 2024, arXiv:2404.00498)
    alternating_flip: bool = False
    ops: Literal[RULES] = "randaugment"
    ops_probability: Probability = 1.0  # probability that an image goes through operations
    num_ops: Annotated[int, Field(ge=1, le=100)] = 2  # operations per image (RandAugment)
    # how strong operations are: one of 31 levels, which torchvision calls bins (RandAugment)
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    erasing: Probability = 0.5  # probability of a black rectangle of 2 to 33 % of the area
    cutout: Pixels = 0  # side of a square of mean colour (DeVries & Taylor 2017); 0: none


@dataclass(frozen=True)
class Draws:
    """The random numbers of n images, all on the CPU. Indexing selects images.

    Each image goes through one operation per slot, one after the other.
    """

    offsets: Tensor  # int64 (n, 2): top and left of the crop in the padded image
    mirrored: Tensor  # bool (n,)
    ops: Tensor  # int64 (n, slots): which of `op_table(policy)` happens in each slot
    boxes: Tensor  # int64 (n, 4): top, left, height, width to erase; all 0: nothing
    holes: Tensor  # int64 (n, 4): Cutout's squares, which may lie partly outside the image

    def __getitem__(self, index: Tensor | slice) -> "Draws":
        return Draws(*(values[index] for values in vars(self).values()))


def augment_epoch(
    images: Tensor, policy: Policy, seed: int, epoch: int, chunk: int = 4096
) -> Tensor:
    """Augment all images for one epoch: uint8 (N, 3, 32, 32), in and out, in the same order.

    Training does the same batch by batch; this function is for looking at the result. It changes
    `chunk` images at a time, which affects only how much memory it takes.
    """
    draws = draw(len(images), policy, seed, epoch)
    parts = [slice(start, start + chunk) for start in range(0, len(images), chunk)]
    return torch.cat([augment(images[part], policy, draws[part]) for part in parts])


def augment(images: Tensor, policy: Policy, draws: Draws) -> Tensor:
    """Augment images by their draws, on the images' device: uint8 (n, 3, 32, 32), in and out."""
    images = crop(images, draws.offsets, policy.crop_padding)
    images = flip(images, draws.mirrored)
    images = apply_ops(images, op_table(policy), draws.ops)
    images = erase(images, draws.boxes)
    if policy.cutout:
        images = erase(images, draws.holes, CUTOUT_FILL)
    return images


# The draws.


def random_stream(seed: int, epoch: int, purpose: int = AUGMENTING) -> torch.Generator:
    """Return the CPU generator of (seed, epoch, purpose). Each combination has its own.

    NumPy's SeedSequence mixes the three numbers. If they were added up, seed 1 in epoch 2 would get
    the random numbers of seed 2 in epoch 1.
    """
    state = np.random.SeedSequence((seed, epoch, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw(n: int, policy: Policy, seed: int, epoch: int) -> Draws:
    """Draw the random numbers of n images for one epoch.

    They are distributed as in torchvision's transforms, but don't have the same values.
    """
    generator = random_stream(seed, epoch)

    # Where the crop begins, and whether the image is mirrored. The second is drawn even where it is
    # then replaced, so that the numbers drawn after it stay the same.
    offsets = torch.randint(2 * policy.crop_padding + 1, (n, 2), generator=generator)
    mirrored = torch.rand(n, generator=generator) < policy.flip
    if policy.alternating_flip:
        mirrored = _alternately_mirrored(n, seed, epoch)

    # Which operation each slot gets.
    if policy.ops == "autoaugment":
        ops = _draw_autoaugment(n, generator)
    else:
        ops = _draw_uniform(n, policy, generator)

    # Which box is erased, and Cutout's square. Only the square's centre has to be in the image.
    boxes = _draw_boxes(n, policy.erasing, generator)
    centres = torch.randint(SIZE, (n, 2), generator=generator)
    sides = torch.full((n, 2), policy.cutout)
    holes = torch.cat([centres - sides // 2, sides], dim=1)  # (n, 4)

    # Whether an image's operations happen. This is drawn last, so that all numbers above are those
    # that versions without it drew.
    happen = torch.rand(n, 1, generator=generator) < policy.ops_probability
    ops = torch.where(happen, ops, IDENTITY)  # (n, slots)
    return Draws(offsets, mirrored, ops, boxes, holes)


def _alternately_mirrored(n: int, seed: int, epoch: int) -> Tensor:
    """Return bool (n,): the images that are mirrored in this epoch. In the next one the others are.

    The seed decides how each image begins.
    """
    begins_mirrored = torch.rand(n, generator=random_stream(seed, 0, ALTERNATING)) < 0.5
    return begins_mirrored if epoch % 2 == 0 else ~begins_mirrored


def _draw_uniform(n: int, policy: Policy, generator: torch.Generator) -> Tensor:
    """Draw for RandAugment or TrivialAugment: operation, bin and sign of each slot are uniform.

    Returns int64 (n, slots), positions in `op_table(policy)`. The rule "none" has no slots.
    """
    _, op_positions = _operation_table(policy.ops, policy.magnitude)  # (names, bins, 2)
    n_names, n_bins, n_signs = op_positions.shape
    slots = {"none": 0, "randaugment": policy.num_ops, "trivialaugment": 1}[policy.ops]
    name = torch.randint(n_names, (n, slots), generator=generator)
    bin_ = torch.randint(n_bins, (n, slots), generator=generator)
    sign = torch.randint(n_signs, (n, slots), generator=generator)
    return op_positions[name, bin_, sign]  # (n, slots)


def _draw_autoaugment(n: int, generator: torch.Generator) -> Tensor:
    """Draw for AutoAugment: each image gets one of 25 pairs of (operation, probability, bin).

    Returns int64 (n, 2), positions in the rule's table.
    """
    _, op_positions = _operation_table("autoaugment", 0)  # the same table for every magnitude
    pairs = autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy.CIFAR10).policies
    name = torch.tensor([[AUTO_OPS.index(op) for op, _, _ in pair] for pair in pairs])  # (25, 2)
    probability = torch.tensor([[p for _, p, _ in pair] for pair in pairs])  # (25, 2)
    # An operation without magnitudes has no bin: it has the same position in all of them.
    bin_ = torch.tensor([[k or 0 for _, _, k in pair] for pair in pairs])  # (25, 2)

    chosen = torch.randint(len(pairs), (n,), generator=generator)
    sign = torch.randint(2, (n, 2), generator=generator)
    happens = torch.rand(n, 2, generator=generator) <= probability[chosen]  # <= as in torchvision
    op = op_positions[name[chosen], bin_[chosen], sign]  # (n, 2)
    return torch.where(happens, op, IDENTITY)


def _draw_boxes(n: int, probability: float, generator: torch.Generator) -> Tensor:
    """Draw for RandomErasing(scale=(0.02, 0.33), ratio=(0.3, 3.3)).

    Returns int64 (n, 4), all 0 for no box. As in torchvision, ten sizes are drawn for each box, and
    the first one that is smaller than the image is used.
    """
    happens = torch.rand(n, generator=generator) < probability
    area = SIZE * SIZE * torch.empty(n, 10).uniform_(0.02, 0.33, generator=generator)
    log_ratio = torch.empty(n, 10).uniform_(math.log(0.3), math.log(3.3), generator=generator)
    ratio = log_ratio.exp()
    fraction = torch.rand(n, 2, generator=generator)

    # The first size that fits: argmax finds the first True, and 0 where there is none.
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=2)  # (n, 10, 2)
    sides = sides.round().long()
    fits = (sides < SIZE).all(2)  # (n, 10)
    side = sides[torch.arange(n), fits.int().argmax(1)]  # (n, 2): height and width

    # Somewhere inside the image.
    corner = (fraction * (SIZE - side + 1)).long()  # (n, 2): top and left
    box = torch.cat([corner, side], dim=1)  # (n, 4)
    is_erased = happens & fits.any(1)
    return torch.where(is_erased[:, None], box, 0)


def op_table(policy: Policy) -> tuple[Op, ...]:
    """Return a policy's distinct operations. `Draws.ops` holds positions in them."""
    return _operation_table(policy.ops, policy.magnitude)[0]


@lru_cache
def _operation_table(rule: str, magnitude: int) -> tuple[tuple[Op, ...], Tensor]:
    """Return a rule's distinct operations, and the position of each choice of name, bin and sign.

    The positions are int64 (names, bins, 2). RandAugment has one bin, the one of its magnitude.
    Choices that do the same, like both signs of an operation that has no sign, share a position, so
    that `apply_ops` changes their images in one group.
    """
    names, bins = (AUTO_OPS, 10) if rule == "autoaugment" else (OPS, 31)
    positions: list[int] = []
    table: dict[Op, int] = {}  # each operation's position
    for name in names:
        values = magnitudes(name, bins, wide=rule == "trivialaugment")
        if rule == "randaugment":
            values = [values[magnitude]]
        for value in values:
            opposite = -value if name in SIGNED else value
            for op in (Op(name, value), Op(name, opposite)):
                # An operation that isn't in the table yet is added at the end.
                positions.append(table.setdefault(op, len(table)))
    return tuple(table), torch.tensor(positions).view(len(names), -1, 2)  # in the loops' order


# The pixels. The gains in speed that comments name were measured by benchmarks/augment.py against
# the simple versions in benchmarks/plain.py. A test checks that both versions give the same pixels.


def crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Give each image a black border of `padding` pixels, and cut a 32x32 window out of it.

    images: uint8 (n, 3, 32, 32), in and out. offsets: int64 (n, 2), the top and left of each window
    in the padded image: padded[i, :, top : top + 32, left : left + 32].
    """
    side = SIZE + 2 * padding
    padded = torch.nn.functional.pad(images, (padding,) * 4)  # (n, 3, side, side)

    # View all pixels as one long sequence, in which runs[k] are the 32 pixels from pixel k on. A
    # window has 32 such runs in each channel. Each begins `side` pixels after the one before.
    # Copying runs is four times as fast on a CPU as cutting the windows out one by one.
    runs = padded.flatten().unfold(0, SIZE, 1)  # (n * 3 * side * side - 31, 32), a view

    # Where each run begins: its row, counted through all planes (the channels of all images), and
    # its column.
    offsets = _on_device_of(images, offsets)[:, :, None, None]  # (n, 2, 1, 1)
    top, left = offsets.unbind(1)  # (n, 1, 1) each
    plane = torch.arange(3 * len(images), device=images.device).view(-1, 3, 1)  # (n, 3, 1)
    row = plane * side + top + torch.arange(SIZE, device=images.device)  # (n, 3, 32)
    start = row * side + left  # (n, 3, 32)
    windows = runs.index_select(0, start.flatten())  # (n * 3 * 32, 32)
    return windows.view_as(images)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the images for which `mirrored`, bool (n,), is true."""
    # Put the n mirror images behind the n images, and take image i or n + i. Copying whole images
    # is three times as fast on a CPU as torch.where on their pixels.
    both = torch.cat([images, images.flip(3)])  # (2n, 3, 32, 32)
    position = torch.arange(len(images)) + torch.where(mirrored, len(images), 0)  # (n,)
    return both.index_select(0, _on_device_of(images, position))


def apply_ops(images: Tensor, table: tuple[Op, ...], ops: Tensor) -> Tensor:
    """Apply the operation table[ops[i, 0]] to each image i, then table[ops[i, 1]], and so on.

    images: uint8 (n, 3, 32, 32), in and out. ops: int64 (n, slots), on the CPU.
    """
    for slot in ops.unbind(1):  # (n,)
        # Sort the images' positions by their operation, and divide them into one group for each.
        order = slot.argsort(stable=True)
        counts = torch.bincount(slot, minlength=len(table)).tolist()
        groups = _on_device_of(images, order).split(counts)

        # Apply each operation to its group, and put the images back in their places: the inverse
        # permutation of `order` is order.argsort().
        done = [
            apply_op(images.index_select(0, group), *op)
            for group, op in zip(groups, table, strict=True)
            if len(group)
        ]
        images = torch.cat(done).index_select(0, _on_device_of(images, order.argsort()))
    return images


def erase(images: Tensor, boxes: Tensor, fill: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """Put the colour `fill` into each image's box.

    images: uint8 (n, 3, 32, 32), in and out. boxes: int64 (n, 4), each a top, left, height and
    width: images[i, :, top : top + height, left : left + width] = fill. Parts of a box that lie
    outside the image are cut off, also above it and to its left.
    """
    corner, side = _on_device_of(images, boxes)[:, :, None].split(2, dim=1)  # (n, 2, 1) each
    pixel = torch.arange(SIZE, device=images.device)
    # A pixel is kept if its row or its column lies outside the box.
    is_outside = (pixel < corner) | (pixel >= corner + side)  # bool (n, 2, 32)
    row_is_outside, column_is_outside = is_outside.unbind(1)  # (n, 32) each
    is_kept = row_is_outside[:, None, :, None] | column_is_outside[:, None, None, :]
    # Multiplying by 0 in the box and by 1 around it is three times as fast on a CPU as torch.where.
    kept = is_kept.view(torch.uint8)  # (n, 1, 32, 32)
    erased = images * kept
    if any(fill):
        colour = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1)
        erased += (1 - kept) * _on_device_of(images, colour)
    return erased


def _on_device_of(images: Tensor, values: Tensor) -> Tensor:
    """Return `values`, a tensor on the CPU, on the images' device, without waiting for a GPU."""
    return hardware.send(values, images.device)
