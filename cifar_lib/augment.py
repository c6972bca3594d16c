"""One epoch of augmentation as a pure function of (images, policy, seed, epoch).

All random numbers are drawn first, on the CPU. Images that get the same operation then share a
kernel, with the pixels that torchvision's PIL pipeline has for the same draws.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from torchvision.transforms import autoaugment as reference
from torchvision.transforms.v2 import functional as kernels

from cifar_lib import hardware

SIZE = 32
CUTOUT_FILL = (125, 123, 114)  # round(255 * CIFAR10_MEAN): Cutout zeroes after normalisation
# arXiv:1909.13719, arXiv:1805.09501 (its policies for CIFAR-10), arXiv:2103.10158 (its wide ranges)
OP_SETS = ("none", "randaugment", "autoaugment", "trivialaugment")
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
SIGNED = (*GEOMETRIC, "Brightness", "Color", "Contrast", "Sharpness")
OPS = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")
AUTO_OPS = (*OPS, "Invert")
NEAREST = reference.InterpolationMode.NEAREST
Side = Annotated[int, Field(ge=0, le=SIZE)]
Probability = Annotated[float, Field(ge=0, le=1)]
# A value that doesn't fit its field's type is pydantic's ValidationError; text is read.
STRICT = ConfigDict(allow_inf_nan=False, extra="forbid")
checked = checked_dataclass(frozen=True, config=STRICT)


@checked
class Policy:
    """What happens to a training image; the default is the published pipeline."""

    crop_padding: Side = 4  # black pixels on each side, then a random 32x32 crop; 0: no crop
    flip: Probability = 0.5  # of a mirror image
    ops: Literal[OP_SETS] = "randaugment"
    num_ops: Annotated[int, Field(ge=1, le=100)] = 2  # an image goes through (RandAugment)
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9  # of 31 bins (RandAugment)
    erasing: Probability = 0.5  # of RandomErasing: a black box of 2 to 33 % of the area
    cutout: Side = 0  # of a square of mean colour (DeVries & Taylor 2017); 0: none


@dataclass(frozen=True)
class Draws:
    """The random numbers of n images; indexing selects images. All on the CPU."""

    offsets: Tensor  # int64 (n, 2): top and left of the crop in the padded image
    mirrored: Tensor  # bool (n,)
    ops: Tensor  # int64 (n, slots): which of `operations(policy)` happens in each slot
    boxes: Tensor  # int64 (n, 4): top, left, height, width to erase; height 0: nothing
    holes: Tensor  # int64 (n, 4): the same for Cutout

    def __getitem__(self, index: Tensor | slice) -> "Draws":
        return Draws(*(values[index] for values in vars(self).values()))


def augment_epoch(
    images: Tensor, policy: Policy, seed: int, epoch: int, chunk: int = 4096
) -> Tensor:
    """All images augmented for one epoch: uint8 (N, 3, 32, 32) -> the same, in the same order."""
    draws = draw(len(images), policy, seed, epoch)
    parts = [slice(start, start + chunk) for start in range(0, len(images), chunk)]
    return torch.cat([augment(images[part], policy, draws[part]) for part in parts])


def augment(images: Tensor, policy: Policy, draws: Draws) -> Tensor:
    """Images with their draws applied, on their device: uint8 (n, 3, 32, 32) -> the same."""
    images = crop(images, draws.offsets, policy.crop_padding)
    images = flip(images, draws.mirrored)
    images = apply_ops(images, operations(policy), draws.ops)
    images = erase(images, draws.boxes)
    return erase(images, draws.holes, CUTOUT_FILL) if policy.cutout else images


def random_stream(seed: int, epoch: int, purpose: int = 0) -> torch.Generator:
    """A CPU generator of its own for each (seed, epoch, purpose)."""
    state = np.random.SeedSequence((seed, epoch, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw(n: int, policy: Policy, seed: int, epoch: int) -> Draws:
    """The draws of n images for one epoch, with the distributions of torchvision's transforms."""
    generator = random_stream(seed, epoch)
    offsets = torch.randint(2 * policy.crop_padding + 1, (n, 2), generator=generator)
    mirrored = torch.rand(n, generator=generator) < policy.flip
    ops = _draw_ops(n, policy, generator)
    boxes = _draw_boxes(n, policy.erasing, generator)
    centres = torch.randint(SIZE, (n, 2), generator=generator)
    sides = torch.full((n, 2), policy.cutout)
    return Draws(offsets, mirrored, ops, boxes, torch.cat([centres - sides // 2, sides], dim=1))


def _draw_ops(n: int, policy: Policy, generator: torch.Generator) -> Tensor:
    _, lookup = _operation_table(policy.ops, policy.magnitude)
    if policy.ops == "autoaugment":  # one of 25 pairs of (name, probability, bin) for each image
        policies = reference.AutoAugment(reference.AutoAugmentPolicy.CIFAR10).policies
        name = torch.tensor([[AUTO_OPS.index(op) for op, _, _ in pair] for pair in policies])
        probability = torch.tensor([[p for _, p, _ in pair] for pair in policies])
        magnitude = torch.tensor([[k or 0 for _, _, k in pair] for pair in policies])
        chosen = torch.randint(len(policies), (n,), generator=generator)
        negative = torch.randint(2, (n, 2), generator=generator)
        happens = torch.rand(n, 2, generator=generator) <= probability[chosen]
        return happens * lookup[name[chosen], magnitude[chosen], negative]  # 0 is Identity
    slots = {"none": 0, "randaugment": policy.num_ops, "trivialaugment": 1}[policy.ops]
    name = torch.randint(len(OPS), (n, slots), generator=generator)
    magnitude = torch.randint(lookup.shape[1], (n, slots), generator=generator)
    negative = torch.randint(2, (n, slots), generator=generator)
    return lookup[name, magnitude, negative]


def _draw_boxes(n: int, probability: float, generator: torch.Generator) -> Tensor:
    """RandomErasing(scale=(0.02, 0.33), ratio=(0.3, 3.3)): the first of ten tries that fits."""
    happens = torch.rand(n, generator=generator) < probability
    area = SIZE * SIZE * torch.empty(n, 10).uniform_(0.02, 0.33, generator=generator)
    ratio = torch.empty(n, 10).uniform_(math.log(0.3), math.log(3.3), generator=generator).exp()
    position = torch.rand(n, 2, generator=generator)
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=2).round().long()
    fits = (sides < SIZE).all(2)  # (n, 10)
    side = sides[torch.arange(n), fits.int().argmax(1)]  # (n, 2): height, width
    corner = (position * (SIZE - side + 1)).long()
    return torch.cat([corner, side], dim=1) * (happens & fits.any(1)).long()[:, None]


def operations(policy: Policy) -> tuple[tuple[str, float], ...]:
    """The distinct (name, magnitude) pairs of a policy, which Draws.ops counts in."""
    return _operation_table(policy.ops, policy.magnitude)[0]


@lru_cache
def _operation_table(ops: str, magnitude: int) -> tuple[tuple[tuple[str, float], ...], Tensor]:
    """`operations`, and where in them each (name, bin, sign) is: int64 (names, bins, 2)."""
    names, bins = (AUTO_OPS, 10) if ops == "autoaugment" else (OPS, 31)
    used = slice(magnitude, magnitude + 1) if ops == "randaugment" else slice(bins)
    every = []
    for name in names:
        for value in magnitudes(name, bins, wide=ops == "trivialaugment")[used]:
            every += [(name, value), (name, -value if name in SIGNED else value)]
    pairs = tuple(dict.fromkeys(every))
    return pairs, torch.tensor([pairs.index(pair) for pair in every]).view(len(names), -1, 2)


def magnitudes(name: str, bins: int = 31, wide: bool = False) -> list[float]:
    """What torchvision takes each bin for: a shear's tangent, pixels, degrees, the change of a
    factor of 1, bits kept, a threshold; 0 for nothing. `wide`: in TrivialAugmentWide."""
    space = reference.RandAugment()._augmentation_space(bins, (SIZE, SIZE))  # AutoAugment's too
    if wide:
        space = reference.TrivialAugmentWide()._augmentation_space(bins)
    values, _ = space.get(name, (torch.zeros(1), False))
    return values.float().expand(bins).tolist()


def apply_ops(images: Tensor, table: tuple[tuple[str, float], ...], ops: Tensor) -> Tensor:
    """Each image i of uint8 (n, 3, 32, 32) through `table[ops[i, 0]]`, `table[ops[i, 1]]` ..."""
    for slot in ops.unbind(1):
        order = slot.argsort(stable=True)
        counts = torch.bincount(slot, minlength=len(table)).tolist()
        groups = images.index_select(0, _beside(images, order)).split(counts)
        done = [apply_op(x, *pair) for x, pair in zip(groups, table, strict=True) if len(x)]
        # Two gathers of whole images are ten times faster on a CPU than one of each group.
        images = torch.cat(done).index_select(0, _beside(images, order.argsort()))
    return images


def apply_op(images: Tensor, name: str, magnitude: float) -> Tensor:
    """One operation on all images, to the last pixel as Pillow 10 to 13 computes it (nearest pixel,
    black outside): uint8 (n, 3, 32, 32) -> the same."""
    if name in GEOMETRIC:
        source, inside = _source_pixels(name, magnitude, images.device)
        # gather with an expanded index: four times faster on a CPU than indexing
        moved = images.flatten(2).gather(2, source.expand(*images.shape[:2], -1))
        return moved.mul_(inside).view_as(images)
    if name in OWN_KERNELS:
        return OWN_KERNELS[name](images, magnitude)
    return reference._apply_op(images, name, magnitude, NEAREST, fill=None)


@lru_cache(maxsize=1024)
def _source_pixels(name: str, magnitude: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of the 1024 pixels each pixel of a moved image was, int64 (1024,), and 1 where it was
    inside, uint8 (1024,): torchvision's own operation on a PIL image of pixel numbers."""
    numbers = Image.fromarray(np.arange(1, SIZE * SIZE + 1, dtype=np.int32).reshape(SIZE, SIZE))
    moved = np.array(reference._apply_op(numbers, name, magnitude, NEAREST, fill=None))
    source = torch.from_numpy(moved).long().flatten().to(device)
    return (source - 1).clamp_(min=0), (source > 0).to(torch.uint8)


def _blend(base: Tensor, images: Tensor, change: float) -> Tensor:
    """Pillow's blend: base, rounded to whole levels, + (1 + change) (image - base), then cut."""
    base = (base + 0.5).floor_()
    # Not lerp or addcmul, which round once where Pillow rounds twice.
    return images.float().sub_(base).mul_(1 + change).add_(base).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Whole grey levels, float32 (n, 1, 32, 32): exact, as no sum reaches 2**24."""
    red, green, blue = images.float().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471).add_(32768).div_(65536).floor_()


def _smooth(images: Tensor) -> Tensor:
    """(1 1 1, 1 5 1, 1 1 1) / 13 around each pixel, the border as it is: float32."""
    smooth = images.float()
    columns = (smooth[:, :, :-2] + smooth[:, :, 1:-1]).add_(smooth[:, :, 2:])  # (n, 3, 30, 32)
    around = (columns[..., :-2] + columns[..., 1:-1]).add_(columns[..., 2:])  # (n, 3, 30, 30)
    inner = smooth[:, :, 1:-1, 1:-1]
    inner.copy_(around.add_(inner, alpha=4).mul_(1 / 13))
    return smooth


def _autocontrast(images: Tensor) -> Tensor:
    """Each channel stretched to 0 to 255, unless it is flat; the brightest may be cut to 254."""
    if images.device.type == hardware.APPLE_GPU:  # which lacks the float64 that Pillow computes in
        return _autocontrast(images.cpu()).to(images.device)
    dark, bright = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = dark == bright
    dark, bright = dark.masked_fill(flat, 0).double(), bright.masked_fill(flat, 255).double()
    scale = torch.tensor(255.0) / (bright - dark)  # a plain 255 / x is 255 times 1 / x
    return images.double().mul_(scale).sub_(dark * scale).to(torch.uint8)


OWN_KERNELS = {  # where torchvision's for tensors isn't Pillow's, or is slow
    "Brightness": lambda images, change: _blend(images.new_zeros(1), images, change),
    "Color": lambda images, change: _blend(_grey(images), images, change),
    "Contrast": lambda images, change: _blend(_grey(images).mean((1, 2, 3), True), images, change),
    "Sharpness": lambda images, change: _blend(_smooth(images), images, change),
    "Solarize": lambda images, level: images ^ -(images >= math.ceil(level)).view(torch.uint8),
    "AutoContrast": lambda images, _: _autocontrast(images),
    "Equalize": lambda images, _: kernels.equalize(images),
}


def _beside(images: Tensor, values: Tensor) -> Tensor:
    """`values` where the images are."""
    return hardware.send(values, images.device)


def crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """A 32x32 window at `offsets` int64 (n, 2) of each image with `padding` black pixels around."""
    side = SIZE + 2 * padding
    # A window is copied as 32 runs of 32 pixels: three times faster on a CPU than indexing windows.
    runs = torch.nn.functional.pad(images, (padding,) * 4).flatten().unfold(0, SIZE, 1)
    top, left = _beside(images, offsets)[:, :, None, None].unbind(1)  # (n, 1, 1)
    channel = torch.arange(3 * len(images), device=images.device).view(-1, 3, 1)
    row = channel * side + top + torch.arange(SIZE, device=images.device)  # (n, 3, 32)
    return runs.index_select(0, (row * side + left).flatten()).view_as(images)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Left and right exchanged where `mirrored` bool (n,) says so."""
    order = torch.where(mirrored, len(images), 0) + torch.arange(len(images))
    return torch.cat([images, images.flip(3)]).index_select(0, _beside(images, order))


def erase(images: Tensor, boxes: Tensor, fill: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """`fill` in each image's box (top, left, height, width) int64 (n, 4), which may stick out."""
    corner, side = _beside(images, boxes)[:, :, None].split(2, dim=1)  # (n, 2, 1)
    pixel = torch.arange(SIZE, device=images.device)
    rows, columns = ((pixel >= corner) & (pixel < corner + side)).unbind(1)  # (n, 32)
    hole = (rows[:, :, None] & columns[:, None, :])[:, None].to(torch.uint8)  # (n, 1, 32, 32)
    out = images * (1 - hole)  # a product is six times faster than masked_fill on a CPU
    if any(fill):
        out += hole * _beside(images, torch.tensor(fill, dtype=torch.uint8)).view(3, 1, 1)
    return out
