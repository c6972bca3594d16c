import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import (
    AutoAugment,
    AutoAugmentPolicy,
    RandAugment,
    RandomErasing,
    TrivialAugmentWide,
)
from torchvision.transforms import functional as tv
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.functional import InterpolationMode

from cifar_lib.augment import (
    AUTO_OPS,
    CUTOUT_FILL,
    GEOMETRIC,
    OPS,
    Policy,
    apply_op,
    apply_ops,
    augment,
    augment_epoch,
    crop,
    draw,
    erase,
    flip,
    magnitudes,
    operations,
)
from cifar_lib.data import CIFAR10_MEAN
from cifar_lib.errors import InputError

N = 60_000
SPACES = {
    "randaugment": RandAugment()._augmentation_space(31, (32, 32)),
    "trivialaugment": TrivialAugmentWide()._augmentation_space(31),
    "autoaugment": AutoAugment(AutoAugmentPolicy.CIFAR10)._augmentation_space(10, (32, 32)),
}
REPORT_DRAWS = "191aad7481eb9cffa14d12e74be71f8507b275fa5317ca0ff7f64ae23f0b06bc"
REPORT_BYTES = "def2c37a63182c461664d790e30c1950f4b812c4444c443fb671d996ec890da1"


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def with_pil(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    return _apply_op(image, name, magnitude, InterpolationMode.NEAREST, fill=None)


def levels(space: dict, name: str, bin_: int) -> list[float]:
    """The magnitudes that torchvision gives an operation in a bin: one, or two where it has a
    sign."""
    if name == "Identity":
        return [0.0]
    values, signed = space[name]
    value = float(values[bin_]) if values.ndim else 0.0
    return [value, -value] if signed else [value]


def assert_frequencies(observed: Counter, expected: dict, n: int) -> None:
    """Nothing happens that shouldn't, and a chi-square test finds no difference."""
    assert set(observed) <= set(expected)
    assert sum(expected.values()) == pytest.approx(1)
    assert min(expected.values()) * n > 5
    assert (
        chisquare([observed[k] for k in expected], [p * n for p in expected.values()]).pvalue > 1e-3
    )


def drawn(policy: Policy, n: int = N) -> list[list[tuple[str, float]]]:
    """The (name, magnitude) pairs of each image."""
    table = operations(policy)
    return [[table[i] for i in row] for row in draw(n, policy, seed=11, epoch=2).ops.tolist()]


def all_operations(ops: str) -> set[tuple[str, float]]:
    """Every (name, magnitude) that the op set can ask for, at whatever magnitude it is set to."""
    magnitudes_set = range(31) if ops == "randaugment" else [9]
    return {pair for m in magnitudes_set for pair in operations(Policy(ops=ops, magnitude=m))}


# The operations against torchvision's


@pytest.mark.parametrize("ops", SPACES)
def test_magnitudes_are_torchvisions(ops):
    for name, (values, _) in SPACES[ops].items():
        bins = 10 if ops == "autoaugment" else 31
        expected = values.tolist() if values.ndim else [0.0] * bins
        assert magnitudes(name, bins, wide=ops == "trivialaugment") == expected, name


def test_randaugment_at_one_magnitude_has_23_variants():
    assert len(operations(Policy())) == 23


@pytest.mark.parametrize("ops", SPACES)
def test_operations_are_those_of_torchvision_at_every_magnitude_and_sign(ops):
    space = SPACES[ops]
    bins = 10 if ops == "autoaugment" else 31
    expected = {(name, m) for name in space for k in range(bins) for m in levels(space, name, k)}
    assert all_operations(ops) == expected | {("Identity", 0.0)}
    assert len(operations(Policy(ops=ops))) == len(set(operations(Policy(ops=ops))))


@pytest.mark.parametrize("ops", SPACES)
def test_every_operation_is_within_a_grey_level_of_pil_at_every_magnitude(ops, pictures):
    images = [to_pil(image) for image in pictures]
    before = pictures.clone()
    for name, magnitude in sorted(all_operations(ops)):
        expected = torch.stack([from_pil(with_pil(image, name, magnitude)) for image in images])
        off = (apply_op(pictures, name, magnitude).int() - expected.int()).abs().max().item()
        assert off <= (0 if name in GEOMETRIC else 1), f"{name} at {magnitude}: {off} levels"
    assert torch.equal(pictures, before)


def test_strong_operations_change_the_pictures(pictures):
    for name in AUTO_OPS:
        changed = apply_op(pictures, name, magnitudes(name)[25])
        assert torch.equal(changed, pictures) == (name == "Identity"), name


def test_an_unknown_operation_is_refused(pictures):
    with pytest.raises(InputError, match="'Blur'.*ShearX"):
        apply_op(pictures, "Blur", 1.0)


def test_each_image_gets_its_own_operations_in_their_order(pictures):
    table = (("Identity", 0.0), ("Rotate", 30.0), ("Invert", 0.0), ("TranslateX", 5.0))
    ops = torch.tensor([[1, 2], [2, 1], [0, 0], [3, 3], [0, 1], [2, 0]] * 2)
    result = apply_ops(pictures, table, ops)
    for image, (first, second), out in zip(pictures, ops.tolist(), result, strict=True):
        assert torch.equal(apply_op(apply_op(image[None], *table[first]), *table[second])[0], out)
    assert not torch.equal(
        *(apply_ops(pictures[:1], table, torch.tensor([o]))[0] for o in ([1, 2], [2, 1]))
    )


# What is drawn


def test_randaugment_draws_operations_and_signs_uniformly_and_independently():
    policy = Policy(num_ops=2, magnitude=9)
    space = SPACES["randaugment"]
    single = {
        (name, m): 1 / 14 / len(levels(space, name, 9))
        for name in OPS
        for m in levels(space, name, 9)
    }
    assert len(single) == 23
    images = drawn(policy)
    for slot in (0, 1):
        assert_frequencies(Counter(image[slot] for image in images), single, N)
    pairs = {(a, b): p * q for a, p in single.items() for b, q in single.items()}
    assert_frequencies(Counter(map(tuple, images)), pairs, N)


@pytest.mark.parametrize(("num_ops", "magnitude"), [(1, 0), (3, 30)])
def test_randaugment_takes_its_number_and_magnitude(num_ops, magnitude):
    space = SPACES["randaugment"]
    images = drawn(Policy(num_ops=num_ops, magnitude=magnitude), n=2000)
    assert {len(image) for image in images} == {num_ops}
    assert {op for image in images for op in image} == {
        (name, m) for name in OPS for m in levels(space, name, magnitude)
    }


def test_trivialaugment_draws_one_operation_bin_and_sign_uniformly():
    space = SPACES["trivialaugment"]
    expected: Counter = Counter()
    for name in OPS:
        for k in range(31):
            for m in levels(space, name, k):
                expected[name, m] += 1 / 14 / 31 / len(levels(space, name, k))
    images = drawn(Policy(ops="trivialaugment"))
    assert {len(image) for image in images} == {1}
    assert_frequencies(Counter(image[0] for image in images), expected, N)


def test_autoaugment_draws_its_policies_as_torchvision_does():
    space, policies = SPACES["autoaugment"], AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    expected: Counter = Counter()
    for pair in policies:
        slots = []
        for name, p, k in pair:
            happening = levels(space, name, k or 0)
            slots.append(
                [((name, m), p / len(happening)) for m in happening] + [(("Identity", 0.0), 1 - p)]
            )
        for first, p in slots[0]:
            for second, q in slots[1]:
                expected[first, second] += p * q / len(policies)
    observed = Counter(map(tuple, drawn(Policy(ops="autoaugment"))))
    assert_frequencies(observed, {pair: p for pair, p in expected.items() if p > 1e-9}, N)


def test_crop_offsets_are_uniform_and_independent():
    offsets = draw(N, Policy(crop_padding=4), seed=0, epoch=0).offsets
    counts = torch.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    assert len(counts) == 81
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_have_their_probability(probability):
    assert draw(N, Policy(flip=probability), 0, 0).mirrored.float().mean().item() == pytest.approx(
        probability, abs=0.01
    )


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_erasing_has_its_probability(probability):
    boxes = draw(N, Policy(erasing=probability), 0, 0).boxes
    assert (boxes[:, 2] > 0).float().mean().item() == pytest.approx(probability, abs=0.01)
    assert (boxes[boxes[:, 2] == 0] == 0).all()


def measures(boxes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    top, left, height, width = boxes.unbind(1)
    return top, left, height, width, height * width, height / width, top + height


def test_erased_boxes_have_torchvisions_sizes_and_places():
    torch.manual_seed(0)
    blank = torch.zeros(3, 32, 32)
    theirs = torch.tensor(
        [RandomErasing.get_params(blank, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(4000)]
    )
    ours = draw(N, Policy(erasing=1.0), seed=1, epoch=0).boxes
    top, left, height, width = ours.unbind(1)
    assert (
        (ours[:, :2] >= 0).all()
        and (ours[:, :2] + ours[:, 2:] <= 32).all()
        and (ours[:, 2:] < 32).all()
    )
    for name, ours_of, theirs_of in zip(
        ("top", "left", "height", "width", "area", "aspect", "bottom"),
        measures(ours),
        measures(theirs),
        strict=True,
    ):
        assert ks_2samp(ours_of, theirs_of, method="asymp").pvalue > 1e-3, name
    for corner, side in ((top, height), (left, width)):
        assert chisquare(torch.bincount(corner[side == 10], minlength=23)).pvalue > 1e-3


def test_cutout_is_centred_anywhere():
    holes = draw(N, Policy(cutout=8), 0, 0).holes
    assert (holes[:, 2:] == 8).all()
    centres = holes[:, :2] + 4
    assert centres.min() == 0 and centres.max() == 31
    assert (
        chisquare(torch.bincount(centres[:, 0] * 32 + centres[:, 1], minlength=1024)).pvalue > 1e-3
    )


def test_draws_of_an_image_depend_on_nothing_but_seed_and_epoch():
    policy = Policy(cutout=8)
    first, again = draw(50, policy, 3, 4), draw(50, policy, 3, 4)
    for name in vars(first):
        assert torch.equal(getattr(first, name), getattr(again, name))
    for other in (draw(50, policy, 4, 4), draw(50, policy, 3, 5)):
        assert not any(
            torch.equal(getattr(first, name), getattr(other, name)) for name in vars(first)
        )


# The geometry


def test_a_crop_is_a_window_of_the_black_padded_image(pictures):
    offsets = torch.tensor([[0, 0], [8, 8], [4, 4], [0, 8], [3, 5], [8, 1]] * 2)
    result = crop(pictures, offsets, padding=4)
    for image, (top, left), out in zip(pictures, offsets.tolist(), result, strict=True):
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = image
        assert torch.equal(padded[:, top : top + 32, left : left + 32], out)


def test_a_flip_mirrors_the_chosen_images_only(pictures):
    mirrored = torch.arange(12) % 3 == 0
    for image, chosen, out in zip(pictures, mirrored, flip(pictures, mirrored), strict=True):
        assert out.tolist() == [
            [row[::-1] if chosen else row for row in channel] for channel in image.tolist()
        ]


def test_an_erased_box_is_black_and_the_rest_stays(pictures):
    boxes = torch.tensor([[2, 5, 7, 9]] * 11 + [[0, 0, 0, 0]])
    expected = pictures.clone()
    expected[:11, :, 2:9, 5:14] = 0
    assert torch.equal(erase(pictures, boxes), expected)


def test_cutout_is_a_square_of_mean_colour_clipped_at_the_border(pictures):
    assert tuple(round(255 * m) for m in CIFAR10_MEAN) == CUTOUT_FILL
    policy = Policy(crop_padding=0, flip=0.0, ops="none", erasing=0.0, cutout=16)
    draws = draw(len(pictures), policy, seed=0, epoch=0)
    expected = pictures.clone()
    for image, (top, left, *_) in zip(expected, draws.holes.tolist(), strict=True):
        rows, columns = (slice(max(corner, 0), min(corner + 16, 32)) for corner in (top, left))
        image[:, rows, columns] = torch.tensor(CUTOUT_FILL, dtype=torch.uint8).view(3, 1, 1)
    assert (draws.holes[:, :2] < 0).any() and (draws.holes[:, :2] > 16).any()  # some are clipped
    assert torch.equal(augment(pictures, policy, draws), expected)


# A whole epoch


def test_the_pipeline_is_torchvisions_in_the_published_order(pictures):
    images = pictures[:6].repeat(20, 1, 1, 1)
    policy = Policy(erasing=1.0)
    draws = draw(len(images), policy, seed=5, epoch=0)
    table = operations(policy)
    off = []
    for i, out in enumerate(augment(images, policy, draws)):
        picture = tv.crop(tv.pad(to_pil(images[i]), 4), *draws.offsets[i].tolist(), 32, 32)
        picture = tv.hflip(picture) if draws.mirrored[i] else picture
        for op in draws.ops[i].tolist():
            picture = with_pil(picture, *table[op])
        expected = tv.erase(from_pil(picture).clone(), *draws.boxes[i].tolist(), v=torch.tensor(0))
        off.append((out.int() - expected.int()).abs() > 1)
    # Where one level is taken for another first, Equalize or Solarize may then make much of it.
    assert torch.stack(off).float().mean() < 0.01


@pytest.mark.parametrize("ops", ["none", *SPACES])
def test_an_epoch_is_a_pure_function_of_images_policy_seed_and_epoch(ops, pictures):
    policy = Policy(ops=ops, cutout=6)
    before = pictures.clone()
    once = augment_epoch(pictures, policy, seed=1, epoch=2)
    assert once.shape == pictures.shape and once.dtype == torch.uint8
    assert torch.equal(pictures, before)
    assert torch.equal(augment_epoch(pictures, policy, seed=1, epoch=2), once)
    for chunk in (1, 5, 12):
        assert torch.equal(augment_epoch(pictures, policy, seed=1, epoch=2, chunk=chunk), once)
    assert not torch.equal(augment_epoch(pictures, policy, seed=1, epoch=3), once)
    assert not torch.equal(augment_epoch(pictures, policy, seed=2, epoch=2), once)


def test_a_policy_of_nothing_changes_nothing(pictures):
    nothing = Policy(crop_padding=0, flip=0.0, ops="none", erasing=0.0)
    assert torch.equal(augment_epoch(pictures, nothing, 0, 0), pictures)


def test_images_of_an_epoch_get_different_draws():
    same = (
        torch.arange(3 * 32 * 32)
        .remainder(256)
        .to(torch.uint8)
        .view(1, 3, 32, 32)
        .repeat(64, 1, 1, 1)
    )
    assert len(augment_epoch(same, Policy(), 0, 0).flatten(1).unique(dim=0)) > 60


def test_a_fixed_epoch_of_the_report_policy_keeps_its_draws_and_bytes():
    # On other images a CPU without fused multiply-add may round one pixel in 100,000 the other way
    # (Color); on these the bytes are the same on x86-64 with and without it.
    pixel = torch.arange(128 * 3 * 32 * 32)
    images = (
        (pixel * 7 + pixel // 32 * 3 + pixel // 1024 * 50)
        .remainder(256)
        .to(torch.uint8)
        .view(128, 3, 32, 32)
    )
    drawn_bytes = b"".join(
        tensor.numpy().tobytes() for tensor in vars(draw(128, Policy(), seed=42, epoch=7)).values()
    )
    assert hashlib.sha256(drawn_bytes).hexdigest() == REPORT_DRAWS
    result = augment_epoch(images, Policy(), seed=42, epoch=7)
    assert hashlib.sha256(result.numpy().tobytes()).hexdigest() == REPORT_BYTES


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_padding": -1},
        {"crop_padding": 33},
        {"flip": 1.1},
        {"flip": float("nan")},
        {"ops": "mixup"},
        {"num_ops": 0},
        {"magnitude": 31},
        {"magnitude": -1},
        {"erasing": -0.1},
        {"cutout": 33},
    ],
)
def test_a_policy_out_of_range_is_refused_by_name(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=rf"^policy\.{name}: {value!r} is out of range"):
        Policy(**wrong)
