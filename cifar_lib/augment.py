"""One epoch of augmentation as a pure function of (images, policy, seed, epoch), each image with
its own draws.

All random numbers of an epoch are drawn first, on the CPU, so they depend on nothing but (n,
policy, seed, epoch): not on the device, the chunk size, workers or restarts. Then images that get
the same operation are grouped and go through one batched kernel. The published pipeline
(torchvision's transforms on PIL images) draws and computes image by image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as pil
from PIL import Image
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.v2 import functional as kernels

from cifar_lib.errors import InputError

SIZE = 32
CUTOUT_FILL = (
    125,
    123,
    114,
)  # round(255 * CIFAR10_MEAN): Cutout zeroes after normalisation, which is the mean colour
OP_SETS = ("none", "randaugment", "autoaugment", "trivialaugment")
SIGNED = (
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
)
GEOMETRIC = SIGNED[:5]
OPS = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")
AUTO_OPS = (*OPS, "Invert")


@dataclass(frozen=True)
class Policy:
    """What happens to a training image; the default is the published pipeline."""

    crop_padding: int = 4  # black pixels on each side, then a random 32x32 crop; 0: no crop
    flip: float = 0.5  # probability of a mirror image
    ops: str = "randaugment"  # one of OP_SETS
    num_ops: int = 2  # operations an image goes through (RandAugment)
    magnitude: int = 9  # of 31 bins, 0 to 30 (RandAugment)
    erasing: float = 0.5  # probability of RandomErasing: a black box of 2 to 33 % of the area
    cutout: int = (
        0  # side of a square of mean colour, centred anywhere (DeVries & Taylor 2017); 0: none
    )

    def __post_init__(self):
        checks = {
            "crop_padding": 0 <= self.crop_padding <= SIZE,
            "flip": 0 <= self.flip <= 1,
            "ops": self.ops in OP_SETS,
            "num_ops": 1 <= self.num_ops <= 100,
            "magnitude": 0 <= self.magnitude <= 30,
            "erasing": 0 <= self.erasing <= 1,
            "cutout": 0 <= self.cutout <= SIZE,
        }
        for name, good in checks.items():
            if not good:
                raise InputError(
                    f"policy.{name}: {getattr(self, name)!r} is out of range (ops: one of {OP_SETS})"
                )


@dataclass(frozen=True)
class Draws:
    """The random numbers of n images; indexing selects images. All on the CPU."""

    offsets: Tensor  # int64 (n, 2): top and left of the crop in the padded image
    mirrored: Tensor  # bool (n,)
    ops: Tensor  # int64 (n, slots): which of `operations(policy)` happens in each slot
    boxes: Tensor  # int64 (n, 4): top, left, height, width to erase; height 0: nothing
    holes: Tensor  # int64 (n, 4): the same for Cutout

    def __getitem__(self, index: Tensor | slice) -> "Draws":
        return Draws(*(getattr(self, field.name)[index] for field in fields(self)))


def augment_epoch(
    images: Tensor, policy: Policy, seed: int, epoch: int, chunk: int = 4096
) -> Tensor:
    """All images augmented for one epoch: uint8 (N, 3, 32, 32) -> the same, in the same order, on
    the same device."""
    draws = draw(len(images), policy, seed, epoch)
    parts = [slice(start, start + chunk) for start in range(0, len(images), chunk)]
    return torch.cat([augment(images[part], policy, draws[part]) for part in parts])


def augment(images: Tensor, policy: Policy, draws: Draws) -> Tensor:
    """Images with their draws applied: crop, flip, operations, erasing, Cutout; uint8 (n, 3, 32,
    32) -> the same."""
    if policy.crop_padding:
        images = crop(images, draws.offsets, policy.crop_padding)
    if policy.flip:
        images = flip(images, draws.mirrored)
    if policy.ops != "none":
        images = apply_ops(images, operations(policy), draws.ops)
    if policy.erasing:
        images = erase(images, draws.boxes)
    if policy.cutout:
        images = erase(images, draws.holes, CUTOUT_FILL)
    return images


def random_stream(seed: int, epoch: int, purpose: int = 0) -> torch.Generator:
    """A CPU generator of its own for each (seed, epoch, purpose)."""
    state = np.random.SeedSequence((seed, epoch, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw(n: int, policy: Policy, seed: int, epoch: int) -> Draws:
    """The draws of n images for one epoch, with the distributions of torchvision's transforms."""
    generator = random_stream(seed, epoch)
    return Draws(
        offsets=torch.randint(2 * policy.crop_padding + 1, (n, 2), generator=generator),
        mirrored=torch.rand(n, generator=generator) < policy.flip,
        ops=_draw_ops(n, policy, generator),
        boxes=_draw_boxes(n, policy.erasing, generator),
        holes=_draw_holes(n, policy.cutout, generator),
    )


# Operations: RandAugment (arXiv:1909.13719), AutoAugment for CIFAR-10 (1805.09501),
# TrivialAugmentWide (2103.10158)


def operations(policy: Policy) -> tuple[tuple[str, float], ...]:
    """The distinct (name, magnitude) pairs that images of this policy may go through; Draws.ops
    counts in it."""
    return _operation_table(policy.ops, policy.magnitude)[0]


@lru_cache
def _operation_table(ops: str, magnitude: int) -> tuple[tuple[tuple[str, float], ...], Tensor]:
    """All distinct (name, magnitude) pairs, and int64 (names, bins, 2) that leads from (name, bin,
    sign) into them.

    RandAugment uses one bin of its 31, which leaves 23 pairs: 14 operations, 9 of them with two
    signs.
    """
    names, bins = (AUTO_OPS, 10) if ops == "autoaugment" else (OPS, 31)
    used = [magnitude] if ops == "randaugment" else range(bins)
    pairs: dict[tuple[str, float], int] = {}
    lookup = torch.empty(len(names), len(used), 2, dtype=torch.int64)
    for i, name in enumerate(names):
        values = magnitudes(name, bins, wide=ops == "trivialaugment")
        for k, value in enumerate(values[m] for m in used):
            for negative in (0, 1):
                signed = -value if negative and name in SIGNED else value
                lookup[i, k, negative] = pairs.setdefault((name, signed), len(pairs))
    return tuple(pairs), lookup


def magnitudes(name: str, bins: int = 31, wide: bool = False) -> list[float]:
    """What each magnitude bin of an operation means, as torchvision has it for 32x32 images.

    Shear: the tangent of the angle; Translate: pixels; Rotate: degrees; Brightness to Sharpness:
    change of the factor 1; Posterize: bits kept; Solarize: threshold. `wide`: TrivialAugmentWide's
    ranges.
    """
    top = {"Shear": (0.3, 0.99), "Translate": (150 / 331 * SIZE, 32.0), "Rotate": (30.0, 135.0)}
    if name in SIGNED:
        limit = top.get(name.rstrip("XY"), (0.9, 0.99))[wide]
        return torch.linspace(0.0, limit, bins).tolist()
    if name == "Posterize":
        return (8 - (torch.arange(bins) / ((bins - 1) / (6 if wide else 4))).round()).tolist()
    if name == "Solarize":
        return torch.linspace(255.0, 0.0, bins).tolist()
    return [0.0] * bins


def _draw_ops(n: int, policy: Policy, generator: torch.Generator) -> Tensor:
    if policy.ops == "none":
        return torch.empty(n, 0, dtype=torch.int64)
    if policy.ops == "autoaugment":
        return _draw_autoaugment(n, generator)
    slots = policy.num_ops if policy.ops == "randaugment" else 1
    _, lookup = _operation_table(policy.ops, policy.magnitude)
    name = torch.randint(len(OPS), (n, slots), generator=generator)
    magnitude = torch.randint(lookup.shape[1], (n, slots), generator=generator)
    negative = torch.randint(2, (n, slots), generator=generator)
    return lookup[name, magnitude, negative]


def _draw_autoaugment(n: int, generator: torch.Generator) -> Tensor:
    """One of 25 pairs of (name, probability, bin) an image, from torchvision's table."""
    policies = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    name = torch.tensor([[AUTO_OPS.index(op) for op, _, _ in pair] for pair in policies])  # (25, 2)
    probability = torch.tensor([[p for _, p, _ in pair] for pair in policies])
    magnitude = torch.tensor([[k or 0 for _, _, k in pair] for pair in policies])
    _, lookup = _operation_table("autoaugment", 0)
    chosen = torch.randint(len(policies), (n,), generator=generator)
    negative = torch.randint(2, (n, 2), generator=generator)
    happens = torch.rand(n, 2, generator=generator) <= probability[chosen]
    identity = lookup[AUTO_OPS.index("Identity"), 0, 0]
    return torch.where(happens, lookup[name[chosen], magnitude[chosen], negative], identity)


def apply_ops(images: Tensor, table: tuple[tuple[str, float], ...], ops: Tensor) -> Tensor:
    """Each image through its operations `table[ops[i, 0]]`, `table[ops[i, 1]]`...: uint8 (n, 3, 32,
    32) -> the same."""
    for slot in ops.unbind(1):
        order = slot.argsort(stable=True)
        counts = torch.bincount(slot, minlength=len(table)).tolist()
        groups = images.index_select(0, order.to(images.device)).split(counts)
        done = [
            apply_op(group, *pair) for group, pair in zip(groups, table, strict=True) if len(group)
        ]
        # Two gathers of whole images are ten times faster on a CPU than a gather and a scatter for
        # each group.
        images = (
            torch.cat(done).index_select(0, order.argsort().to(images.device)) if done else images
        )
    return images


def apply_op(images: Tensor, name: str, magnitude: float) -> Tensor:
    """One operation at one magnitude on all images: uint8 (n, 3, 32, 32) -> the same; nearest
    pixel, black outside."""
    if name in GEOMETRIC:
        source = _source_pixels(name, magnitude).to(images.device)
        return _gather_pixels(images, source.clamp(min=0)).mul_(
            (source >= 0).to(torch.uint8).view(SIZE, SIZE)
        )
    colour: dict[str, Callable[[], Tensor]] = {
        "Identity": lambda: images,
        "Brightness": lambda: kernels.adjust_brightness(images, 1 + magnitude),
        "Color": lambda: kernels.adjust_saturation(images, 1 + magnitude),
        "Contrast": lambda: adjust_contrast(images, 1 + magnitude),
        "Sharpness": lambda: sharpen(images, 1 + magnitude),
        "Posterize": lambda: kernels.posterize(images, int(magnitude)),
        "Solarize": lambda: solarize(images, magnitude),
        "AutoContrast": lambda: kernels.autocontrast(images),
        "Equalize": lambda: equalize(images),
        "Invert": lambda: kernels.invert(images),
    }
    if name not in colour:
        raise InputError(f"unknown operation {name!r}: expected one of {', '.join(AUTO_OPS)}")
    return colour[name]()


def _gather_pixels(images: Tensor, source: Tensor) -> Tensor:
    """Pixel `source[k]` of every image as its pixel k: int64 (1024,)."""
    # gather with an expanded index: four times faster on a CPU than indexing
    return (
        images.flatten(2).gather(2, source.expand(*images.shape[:2], SIZE * SIZE)).view_as(images)
    )


@lru_cache(maxsize=512)
def _source_pixels(name: str, magnitude: float) -> Tensor:
    """Where each of the 1024 pixels of a moved image comes from, -1 for outside: int64 (1024,).

    The map is torchvision's own PIL operation on an image of pixel numbers, so the result is PIL's
    to the last pixel.
    """
    numbers = Image.fromarray(np.arange(1, SIZE * SIZE + 1, dtype=np.int32).reshape(SIZE, SIZE))
    if name == "Rotate":
        moved = pil.rotate(numbers, magnitude)
    else:
        axis = (1, 0) if name.endswith("X") else (0, 1)
        degrees = math.degrees(math.atan(magnitude))
        shear = [a * degrees if name.startswith("Shear") else 0.0 for a in axis]
        translate = [a * int(magnitude) if name.startswith("Translate") else 0 for a in axis]
        centre = [0, 0] if name.startswith("Shear") else None
        moved = pil.affine(
            numbers, angle=0.0, translate=translate, scale=1.0, shear=shear, center=centre
        )
    return torch.from_numpy(np.array(moved)).long().flatten() - 1


# Operations of our own: where torchvision's tensor kernel isn't PIL's, or is slow on a CPU


def adjust_contrast(images: Tensor, factor: float) -> Tensor:
    """PIL's Contrast: away from or towards the image's mean grey: uint8 (n, 3, H, W) -> the same.

    PIL rounds that mean to a whole grey level; torchvision's tensor kernel does not and is two
    levels off at factor 2.
    """
    grey = (
        kernels.rgb_to_grayscale(images)
        .flatten(1)
        .float()
        .mean(1)
        .add_(0.5)
        .floor_()
        .view(-1, 1, 1, 1)
    )
    return images.float().sub_(grey).mul_(factor).add_(grey).clamp_(0, 255).to(torch.uint8)


def sharpen(images: Tensor, factor: float) -> Tensor:
    """PIL's Sharpness: away from (factor > 1) or towards a 3x3 smoothed image: uint8 (n, 3, 32, 32)
    -> the same.

    The smoothing kernel is (1 1 1, 1 5 1, 1 1 1) / 13, the border stays. The sums run over whole
    images laid out as rows of 1024 pixels, in whole numbers; what wraps around falls on the border
    and is dropped.
    """
    rows = images.reshape(-1, SIZE * SIZE).to(torch.int16)
    columns = (rows[:, : -2 * SIZE] + rows[:, SIZE:-SIZE]).add_(rows[:, 2 * SIZE :])
    box = (columns[:, :-2] + columns[:, 1:-1]).add_(
        columns[:, 2:]
    )  # around pixels 33, 34 ... of the image
    inner = rows[:, SIZE + 1 : -SIZE - 1]
    smooth = (
        box.add_(inner, alpha=4).float().add_(6.5).mul_(1 / 13).floor_()
    )  # (box + 4 inner + 6) // 13
    sharp = smooth.lerp_(inner.float(), factor).clamp_(0, 255).to(torch.uint8)
    out = images.clone()
    out[..., 1:-1, 1:-1] = F.pad(sharp, (0, 2)).view(*images.shape[:2], SIZE - 2, SIZE)[..., :-2]
    return out


def solarize(images: Tensor, threshold: float) -> Tensor:
    """255 - x for every value x of at least `threshold`: uint8 -> the same."""
    inverted = (images >= math.ceil(threshold)).view(torch.uint8).neg()  # 255 where true
    return images ^ inverted


def equalize(images: Tensor) -> Tensor:
    """PIL's Equalize, which flattens each channel's histogram: uint8 (n, 3, 32, 32) -> the same."""
    rows = images.reshape(-1, SIZE * SIZE)
    start = torch.arange(0, 256 * len(rows), 256, dtype=torch.int32, device=images.device)[:, None]
    count = torch.bincount((rows + start).view(-1), minlength=256 * len(rows)).view(-1, 256)
    brightest = count.gather(1, rows.amax(1, keepdim=True).long())
    step = (SIZE * SIZE - brightest) // 255  # 0: one value or nearly so, which PIL leaves alone
    below = count.cumsum(1).sub_(count)
    table = below.add_(step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device)).to(torch.uint8)
    return table.gather(1, rows.long()).view_as(images)


# Geometry of the frame: crop, flip, boxes


def crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """A 32x32 window at `offsets` int64 (n, 2) of each image padded with `padding` black pixels on
    every side."""
    windows = (
        F.pad(images, (padding,) * 4).unfold(2, SIZE, 1).unfold(3, SIZE, 1)
    )  # (n, 3, 2p+1, 2p+1, 32, 32) view
    top, left = offsets.unbind(1)
    if (
        images.device.type == "cpu"
    ):  # numpy copies whole rows of a window: three times as fast as torch here
        return torch.from_numpy(
            windows.numpy()[np.arange(len(images)), :, top.numpy(), left.numpy()]
        )
    top, left = top.to(images.device), left.to(images.device)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Left and right exchanged where `mirrored` bool (n,) says so."""
    pixel = torch.arange(SIZE * SIZE, device=images.device)
    mirror = _gather_pixels(images, pixel.view(SIZE, SIZE).flip(1).flatten())
    order = torch.where(mirrored, len(images), 0) + torch.arange(len(images))
    return torch.cat([images, mirror]).index_select(0, order.to(images.device))


def erase(images: Tensor, boxes: Tensor, fill: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """`fill` inside each image's box (top, left, height, width) int64 (n, 4); what lies outside the
    image is cut."""
    top, left, height, width = boxes.to(images.device)[:, :, None].unbind(1)
    pixel = torch.arange(SIZE, device=images.device)
    rows = (pixel >= top) & (pixel < top + height)  # (n, 32)
    columns = (pixel >= left) & (pixel < left + width)
    hole = (rows[:, :, None] & columns[:, None, :])[:, None].to(torch.uint8)  # (n, 1, 32, 32)
    out = images * (1 - hole)  # a product is six times faster than masked_fill on a CPU
    if any(fill):
        out += hole * torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1).to(images.device)
    return out


def _draw_boxes(n: int, probability: float, generator: torch.Generator) -> Tensor:
    """RandomErasing(p, scale=(0.02, 0.33), ratio=(0.3, 3.3)): the first of ten tries that fits,
    else nothing."""
    happens = torch.rand(n, generator=generator) < probability
    area = SIZE * SIZE * torch.empty(n, 10).uniform_(0.02, 0.33, generator=generator)
    ratio = torch.empty(n, 10).uniform_(math.log(0.3), math.log(3.3), generator=generator).exp()
    position = torch.rand(n, 2, generator=generator)
    sides = (
        torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=2).round().long()
    )  # (n, 10, 2)
    fits = (sides < SIZE).all(2)
    side = sides[torch.arange(n), fits.int().argmax(1)]  # (n, 2): height, width
    corner = (position * (SIZE - side + 1)).long()
    return torch.cat([corner, side], dim=1) * (happens & fits.any(1)).long()[:, None]


def _draw_holes(n: int, side: int, generator: torch.Generator) -> Tensor:
    centre = torch.randint(SIZE, (n, 2), generator=generator)
    return torch.cat([centre - side // 2, torch.full((n, 2), side)], dim=1)
