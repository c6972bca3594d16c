"""Generated images in CIFAR-10's shape, for machines without CIFAR-10."""

import torch
import torch.nn.functional as F

from cifar_lib.data import CAT, CLASSES, DOG, STAND_IN, ImageSet

PATTERNS = 6  # of each class
MAX_OFFSET = 4  # pixels to either side


def generate_stand_in(
    n_train: int = 50_000, n_test: int = 10_000, seed: int = 0
) -> tuple[ImageSet, ImageSet]:
    """Return training and test images, in which cat and dog are the hardest to tell apart.

    A class has a few smooth colour patterns. An image is one of these patterns, moved sideways and
    perhaps mirrored. Up to 45 % of a pattern of another class is blended in. For a cat it is up to
    65 % of a dog's pattern, and for a dog up to 65 % of a cat's. Then its contrast is
    raised or lowered, and it gets noise. The same `seed` gives the same images.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(len(CLASSES) * PATTERNS, 3, 5, 5, generator=generator)
    patterns = F.interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)

    # Every view of every pattern: (mirrored, offset, pattern, 3, 32, 32).
    offsets = range(-MAX_OFFSET, MAX_OFFSET + 1)
    moved = torch.stack([patterns.roll(offset, dims=3) for offset in offsets])
    views = torch.stack([moved, moved.flip(4)])
    return _draw(n_train, views, generator), _draw(n_test, views, generator)


def _draw(n: int, views: torch.Tensor, generator: torch.Generator) -> ImageSet:
    """Return n images made of these views, with labels as evenly distributed as possible."""
    # The class of each image and the other class that is mixed in.
    labels = (torch.arange(n) % len(CLASSES))[torch.randperm(n, generator=generator)]
    other = (labels + torch.randint(1, len(CLASSES), (n,), generator=generator)) % len(CLASSES)
    pet = (labels == CAT) | (labels == DOG)
    other = torch.where(pet, CAT + DOG - labels, other)

    # What is done to each image. Factors of its pixels have the shape (n, 1, 1, 1).
    blend = torch.rand(n, generator=generator) * torch.where(pet, 0.65, 0.45)
    gain = 0.7 + 0.6 * torch.rand(n, generator=generator)
    blend, gain = blend.view(-1, 1, 1, 1), gain.view(-1, 1, 1, 1)
    mirrored = (torch.rand(n, generator=generator) < 0.5).long()
    pattern = torch.stack([labels, other]) * PATTERNS  # (2, n): of the class, of the other
    pattern += torch.randint(PATTERNS, (2, n), generator=generator)
    offset = torch.randint(2 * MAX_OFFSET + 1, (n,), generator=generator)

    images = torch.empty(n, 3, 32, 32, dtype=torch.uint8)
    for part in torch.arange(n).split(2048):
        own, mixed_in = views[mirrored[part], offset[part], pattern[:, part]]
        blended = own.lerp(mixed_in, blend[part]).sub_(0.5).mul_(gain[part]).add_(0.5)
        images[part] = blended.clamp_(0, 1).mul_(223).to(torch.uint8)
    noise = torch.randint(0, 33, images.shape, generator=generator, dtype=torch.uint8)
    return ImageSet(images + noise, labels, source=STAND_IN)
