"""The augmentation against Pillow, torchvision and its own plain definitions."""

import hashlib
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency, chisquare, ks_2samp
from torchvision import transforms as tv
from torchvision.transforms import autoaugment
from torchvision.transforms import functional as pil

from benchmarks import plain
from cifar_lib import augment as ours
from cifar_lib import operations
from cifar_lib.augment import Policy, augment_epoch, draw, op_table
from cifar_lib.data import CIFAR10_MEAN, PUBLISHED_STD, Normalization, rescale
from cifar_lib.operations import apply_op

N = 60_000
BLACK = torch.zeros(3, 32, 32, dtype=torch.uint8)
THEIRS = {
    "randaugment": tv.RandAugment(2, 9),
    "trivialaugment": tv.TrivialAugmentWide(),
    "autoaugment": tv.AutoAugment(tv.AutoAugmentPolicy.CIFAR10),
}
REPORT_DRAWS = "191aad7481eb9cffa14d12e74be71f8507b275fa5317ca0ff7f64ae23f0b06bc"
REPORT_BYTES = "8d9c3995567f20cdee2ed75e34a8004f067e7fe43e938108f956e6cbd1259fa7"


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def with_pil(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    return autoaugment._apply_op(image, name, magnitude, tv.InterpolationMode.NEAREST, fill=None)


def from_pil(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def every_pair(ops: str) -> set[tuple[str, float]]:
    """Each operation at each magnitude and sign."""
    return set().union(*(op_table(Policy(ops=ops, magnitude=m)) for m in range(31)))


def assert_no_pixel_differs(images: torch.Tensor, pairs: set[tuple[str, float]]) -> None:
    pictures, before = [to_pil(image) for image in images], images.clone()
    for name, magnitude in sorted(pairs):
        expected = from_pil([with_pil(picture, name, magnitude) for picture in pictures])
        differing = (apply_op(images, name, magnitude) != expected).sum().item()
        assert differing == 0, f"{name} at {magnitude}: {differing} values"
    assert torch.equal(images, before)


def test_no_pixel_differs_from_pillows_at_any_magnitude(pictures):
    assert_no_pixel_differs(pictures, set.union(*map(every_pair, THEIRS)))


def test_magnitudes_are_randaugments_unless_the_wide_ones_are_asked_for():
    assert max(operations.magnitudes("Rotate")) == pytest.approx(30)
    assert max(operations.magnitudes("Rotate", wide=True)) == pytest.approx(135)


def test_no_pixel_of_a_real_image_differs_from_pillows(cifar10):
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    real = cifar10[0].images[order[:200]]
    published = set(op_table(Policy()))
    assert_no_pixel_differs(real, published)
    assert_no_pixel_differs(real[:12], set.union(*map(every_pair, THEIRS)) - published)


@pytest.mark.parametrize("ops", THEIRS)
def test_operations_magnitudes_and_signs_are_drawn_as_torchvision_does(ops, monkeypatch):
    """Operations that leave an image as it is are not counted: AutoAugment doesn't call them."""
    transform, image, called, theirs = THEIRS[ops], to_pil(BLACK), [], Counter()
    space = lru_cache(transform._augmentation_space)  # the same each time, and slow
    monkeypatch.setattr(transform, "_augmentation_space", space)
    monkeypatch.setattr(autoaugment, "_apply_op", lambda _, *op, **how: called.append(op))
    torch.manual_seed(0)
    for _ in range(8000):
        called.clear()
        transform(image)
        theirs[tuple(op for op in called if op[0] != "Identity")] += 1
    table = op_table(Policy(ops=ops))
    drawn = [[table[i] for i in row] for row in draw(N, Policy(ops=ops), 11, 2).ops.tolist()]
    our = Counter(tuple(op for op in row if op[0] != "Identity") for row in drawn)
    assert all(our[row] for row, n in theirs.items() if n >= 5)
    counts = [(our[row], theirs[row]) for row in our | theirs if our[row] + theirs[row] >= 40]
    assert sum(map(sum, counts)) > 0.98 * (N + 8000)
    assert chi2_contingency(counts).pvalue > 1e-3


def test_places_are_uniform_and_independent_and_events_have_their_probability():
    draws = draw(N, Policy(crop_padding=4, cutout=8, flip=0.3, erasing=0.3), seed=0, epoch=0)
    assert (draws.holes[:, 2:] == 8).all()
    for places, side in ((draws.offsets, 9), (draws.holes[:, :2] + 4, 32)):
        counts = torch.bincount(places[:, 0] * side + places[:, 1], minlength=side**2)
        assert len(counts) == side**2
        assert chisquare(counts).pvalue > 1e-3
    is_erased = draws.boxes[:, 2] > 0
    assert (draws.boxes[~is_erased] == 0).all()
    for share in (draws.mirrored.float().mean().item(), is_erased.float().mean().item()):
        assert share == pytest.approx(0.3, abs=0.01)
    never = draw(N, Policy(flip=0, erasing=0), seed=0, epoch=0)
    assert not never.mirrored.any() and not never.boxes.any()


def test_an_alternating_flip_mirrors_the_other_half_in_each_epoch_and_changes_nothing_else():
    policy = Policy(alternating_flip=True, flip=0, ops="none")
    first, second, third = (draw(N, policy, seed=1, epoch=epoch).mirrored for epoch in range(3))
    assert torch.equal(first, ~second) and torch.equal(first, third)
    assert first.float().mean().item() == pytest.approx(0.5, abs=0.01)

    # How an image begins depends on the seed and its position alone.
    other = draw(N, policy, seed=2, epoch=0).mirrored
    assert (first == other).float().mean().item() == pytest.approx(0.5, abs=0.01)
    alternating, random = (vars(draw(N, p, 1, 1)) for p in (policy, Policy(flip=0, ops="none")))
    assert not random["mirrored"].any()
    assert all(
        torch.equal(alternating[name], random[name]) for name in random if name != "mirrored"
    )


@pytest.mark.parametrize("ops", THEIRS)
def test_a_share_of_the_images_goes_through_operations(ops):
    every = draw(N, Policy(ops=ops), seed=1, epoch=2)
    some = draw(N, Policy(ops=ops, ops_probability=0.3), seed=1, epoch=2)
    gone_through = (every.ops == some.ops).all(1)
    assert (some.ops[~gone_through] == ours.IDENTITY).all()
    changed = (every.ops != ours.IDENTITY).any(1)  # the others can't be told apart
    share = gone_through[changed].float().mean().item()
    assert share == pytest.approx(0.3, abs=0.01)
    for name in ("offsets", "mirrored", "boxes", "holes"):
        assert torch.equal(getattr(every, name), getattr(some, name))
    nothing = draw(N, Policy(ops=ops, ops_probability=0), seed=1, epoch=2)
    assert (nothing.ops == ours.IDENTITY).all()
    assert op_table(Policy(ops=ops))[ours.IDENTITY].name == "Identity"


def test_erased_boxes_have_torchvisions_sizes_and_places():
    torch.manual_seed(0)
    scale, ratio = (0.02, 0.33), (0.3, 3.3)
    theirs = [tv.RandomErasing.get_params(BLACK, scale, ratio, [0.0])[:4] for _ in range(4000)]
    boxes = draw(N, Policy(erasing=1.0), seed=1, epoch=0).boxes
    assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 32).all()
    assert boxes[:, 2:].max() == 31  # never from border to border
    measures = []
    for top, left, height, width in (boxes.T, torch.tensor(theirs).T):
        sums = (top + height, left + width)
        measures.append((top, left, height, width, height * width, height / width, *sums))
    for our, their in zip(*measures, strict=True):
        assert ks_2samp(our, their, method="asymp").pvalue > 1e-3


@pytest.mark.parametrize("ops", THEIRS)
def test_the_same_draws_give_torchvisions_pixels_and_cutouts_colour(ops, pictures):
    images = pictures.repeat(10, 1, 1, 1)
    policy = Policy(ops=ops, num_ops=3, magnitude=20, erasing=0.7, cutout=6)
    draws, table = draw(len(images), policy, seed=5, epoch=0), op_table(policy)
    assert draws.ops.shape[1] == {"randaugment": 3, "autoaugment": 2, "trivialaugment": 1}[ops]
    expected = []
    for i, image in enumerate(images):
        picture = pil.crop(pil.pad(to_pil(image), 4), *draws.offsets[i].tolist(), 32, 32)
        picture = pil.hflip(picture) if draws.mirrored[i] else picture
        for op in draws.ops[i].tolist():
            picture = with_pil(picture, *table[op])
        tensor = from_pil([picture])[0].clone()
        expected.append(pil.erase(tensor, *draws.boxes[i].tolist(), v=torch.tensor(0)))
    mean_colour = tuple(round(255 * mean) for mean in CIFAR10_MEAN)
    expected = plain.erase(torch.stack(expected), draws.holes, mean_colour)
    assert torch.equal(ours.augment(images, policy, draws), expected)


@pytest.mark.parametrize("ops", THEIRS)
def test_each_step_is_the_plain_one_of_its_docstring(ops, pictures):
    images = pictures.repeat(10, 1, 1, 1)
    policy = Policy(ops=ops, erasing=0.7, cutout=16)
    draws, table = draw(len(images), policy, seed=3, epoch=1), op_table(policy)
    for step, *arguments in (
        ("crop", draws.offsets, 4),
        ("crop", torch.zeros_like(draws.offsets), 0),
        ("flip", draws.mirrored),
        ("apply_ops", table, draws.ops),
        ("erase", draws.boxes),
        ("erase", draws.holes, ours.CUTOUT_FILL),
    ):
        expected = getattr(plain, step)(images, *arguments)
        assert torch.equal(getattr(ours, step)(images, *arguments), expected), step


def test_what_is_made_faster_is_the_plain_version_of_its_docstring(pictures):
    every_value = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 3, 32, 32)
    # Channels with as few steps as possible: constant, two values, and nearly constant ones.
    uneven = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    for i, n in enumerate((1, 254, 255, 256, 509, 510, 1023, 1024)):
        uneven[i].flatten(1)[:, :n] = 200
    images = torch.cat([pictures, every_value, uneven, 255 - uneven])
    for op in every_pair("trivialaugment"):
        if op.name in operations.GEOMETRIC:
            moved = plain.move(op.name, images, op.magnitude)
            assert torch.equal(apply_op(images, *op), moved), op
        elif op.name == "Solarize":
            solarized = plain.solarize(images, op.magnitude)
            assert torch.equal(apply_op(images, *op), solarized), op
    assert torch.equal(operations.equalize(images, 0.0), plain.equalize(images, 0.0))
    levels = torch.arange(0, 255.5, 1 / 64)
    assert torch.equal(operations.to_uint8(levels), plain.to_uint8(levels))
    assert torch.equal(operations.to_uint8(levels.double()), plain.to_uint8(levels.double()))
    numbers = Normalization(CIFAR10_MEAN, PUBLISHED_STD).scale_and_offset(images.device)
    assert torch.equal(rescale(images, *numbers), plain.rescale(images, *numbers))


def statistics(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Numbers of each image that its augmentation moves: contrast, mean, black, white, distance,
    edges; (6, n)."""
    values = images.float()
    parts = (values, values == 0, values == 255, (values - originals).abs(), values.diff().abs())
    return torch.stack([values.std((1, 2, 3)), *(part.float().mean((1, 2, 3)) for part in parts)])


def test_the_pipeline_cannot_be_told_from_torchvisions_by_statistics(stand_in):
    originals = stand_in[0].images.repeat(25, 1, 1, 1)
    torch.manual_seed(0)
    steps = [tv.RandomCrop(32, padding=4), tv.RandomHorizontalFlip(), tv.RandAugment(2, 9)]
    published = tv.Compose([*steps, tv.PILToTensor(), tv.RandomErasing(p=0.5)])
    theirs = torch.stack([published(to_pil(image)) for image in originals])
    expected = statistics(theirs, originals)

    def smallest(policy: Policy) -> float:
        got = statistics(augment_epoch(originals, policy, seed=0, epoch=0), originals)
        return min(ks_2samp(*pair).pvalue for pair in zip(got, expected, strict=True))

    assert smallest(Policy()) > 0.01
    wrong = [Policy(magnitude=12), Policy(erasing=0.25), Policy(crop_padding=2), Policy(num_ops=1)]
    assert all(smallest(policy) < 1e-4 for policy in wrong)


@pytest.mark.parametrize("ops", THEIRS)
def test_an_epoch_is_a_pure_function_of_images_policy_seed_and_epoch(ops, pictures):
    policy = Policy(ops=ops, cutout=6)
    before = pictures.clone()
    once = augment_epoch(pictures, policy, seed=1, epoch=2)
    assert once.shape == pictures.shape and once.dtype == torch.uint8
    assert torch.equal(augment_epoch(pictures, policy, seed=1, epoch=2, chunk=5), once)
    assert not torch.equal(augment_epoch(pictures, policy, seed=1, epoch=3), once)
    assert not torch.equal(augment_epoch(pictures, policy, seed=2, epoch=2), once)
    assert torch.equal(pictures, before)
    nothing = Policy(crop_padding=0, flip=0.0, ops="none", erasing=0.0)
    assert torch.equal(augment_epoch(pictures, nothing, 0, 0), pictures)


def test_a_fixed_epoch_of_the_report_policy_keeps_its_draws_and_bytes():
    pixel = torch.arange(128 * 3 * 32 * 32)
    values = pixel * 7 + pixel // 32 * 3 + pixel // 1024 * 50
    images = values.remainder(256).to(torch.uint8).view(128, 3, 32, 32)
    draws = vars(draw(128, Policy(), seed=42, epoch=7)).values()
    drawn_bytes = b"".join(tensor.numpy().tobytes() for tensor in draws)
    assert hashlib.sha256(drawn_bytes).hexdigest() == REPORT_DRAWS
    result = augment_epoch(images, Policy(), seed=42, epoch=7)
    assert hashlib.sha256(result.numpy().tobytes()).hexdigest() == REPORT_BYTES
