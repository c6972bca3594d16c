"""Shifts of known kinds, adapting to them, and what the ablation makes of its measurements."""

import copy
import pickle
from collections.abc import Iterator
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from cifar_lib import data, shift
from cifar_lib.data import ImageSet, Normalization
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict
from cifar_lib.hardware import choose_precision
from cifar_lib.model import SHIPPED, ResNet, load_model
from notebooks.course import corruptions
from notebooks.course.stand_in import generate_stand_in
from scripts import ablation
from tests.conftest import untrained_network

NORMALIZATION = Normalization(data.CIFAR10_MEAN, data.CIFAR10_STD)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """260: two batches of statistics, which count alike, so both must have 130."""
    generated = generate_stand_in(260, 0, seed=5)[0].images
    return corruptions.match_statistics(generated, NORMALIZATION.mean, NORMALIZATION.std)


@pytest.fixture(scope="module")
def model() -> Iterator[ResNet]:
    """No test here changes it."""
    network = untrained_network(0.5)
    before = copy.deepcopy(network.state_dict())
    yield network
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.fixture(scope="module")
def first_inputs(model, images) -> torch.Tensor:
    """What comes into the first batch-norm layer."""
    return model.conv1(NORMALIZATION(images)).detach()


# Shifts.


@pytest.mark.parametrize("family", corruptions.FAMILIES)
def test_a_shift_is_deterministic_and_grows_with_its_severity(family, images):
    images = images[:50]
    results = [corruptions.shifted(images, family, severity) for severity in corruptions.SEVERITIES]
    assert all(r.shape == images.shape and r.dtype == torch.uint8 for r in results)
    assert torch.equal(results[2], corruptions.shifted(images, family, 3))
    changes = [(r.float() - images.float()).abs().mean().item() for r in results]
    assert changes[0] > 0.05 and changes == sorted(changes)
    amounts = corruptions.FAMILIES[family][1]
    signs = {np.sign(after - before) for before, after in pairwise(amounts)}
    assert len(amounts) == len(corruptions.SEVERITIES) and signs in ({1.0}, {-1.0})
    if family == "noise":  # its deviation, where nothing is cut off
        moved = (results[4].float() - images.float())[(images > 90) & (images < 165)]
        assert moved.std().item() == pytest.approx(0.10 * 255, rel=0.02)


def test_the_first_severity_of_statistics_and_generated_files_are_as_the_published_custom_set(
    images, tmp_path
):
    path = tmp_path / "test.pkl"
    generated = corruptions.generate_test_file(path, ImageSet(images, torch.arange(260) % 10))
    assert pickle.loads(path.read_bytes())[b"data"].shape == (260, 32, 32, 3)
    for made in (generated.images, corruptions.shifted(images, "statistics", 1)):
        mean, std = data.channel_statistics(made)
        # Cutting values off instead of rounding would darken by half a value, 0.002.
        np.testing.assert_allclose(mean, data.KAGGLE_MEAN, atol=5e-4)
        np.testing.assert_allclose(std, data.KAGGLE_STD, atol=5e-4)


# Adapting.


def test_normalize_undoes_gain_and_offset_and_none_nothing(model, images):
    moved = corruptions.match_statistics(images, [0.5, 0.45, 0.4], [0.2, 0.2, 0.2])
    assert shift.adapt("none", model, moved, NORMALIZATION) == (model, NORMALIZATION)
    network, normalization = shift.adapt("normalize", model, moved, NORMALIZATION)
    assert network is model
    reference = predict(model, images, NORMALIZATION)
    left = (predict(model, moved, normalization) - reference).abs().mean()
    assert left < 0.2 * (predict(model, moved, NORMALIZATION) - reference).abs().mean()


def test_batchnorm_mixes_the_images_statistics_with_the_training_ones(model, images, first_inputs):
    adapted, normalization = shift.adapt("batchnorm", model, images, NORMALIZATION)
    assert normalization == NORMALIZATION and shift.PRIOR == 16
    assert not any(module.training for module in adapted.modules())
    weight = len(images) / (16 + len(images))
    own = {"running_mean": first_inputs.mean((0, 2, 3)), "running_var": first_inputs.var((0, 2, 3))}
    for name, value in own.items():
        wanted = weight * value + (1 - weight) * getattr(model.bn1, name)
        torch.testing.assert_close(getattr(adapted.bn1, name), wanted, rtol=1e-4, atol=1e-3)


def test_rebasing_keeps_the_function_and_leaves_batchnorm_only_the_shift(
    model, images, first_inputs
):
    """These images have other statistics than the network's; once it is rebased on them, they are
    no shift."""
    rebased = shift.rebase_batch_norm(model, images, NORMALIZATION)
    reference = predict(model, images, NORMALIZATION)
    same = predict(rebased, images, NORMALIZATION)
    torch.testing.assert_close(same, reference, atol=1e-4, rtol=1e-4)
    wanted = first_inputs.mean((0, 2, 3))
    torch.testing.assert_close(rebased.bn1.running_mean, wanted, rtol=1e-4, atol=1e-4)
    change = {}
    for network in (model, rebased):
        adapted, _ = shift.adapt("batchnorm", network, images, NORMALIZATION)
        change[network] = (predict(adapted, images, NORMALIZATION) - reference).abs().mean()
    assert change[rebased] < 0.02 * change[model]


def test_images_without_statistics_of_their_own_are_refused(model, images):
    flat = images.clone()
    flat[:, 1] = 7
    with pytest.raises(InputError, match="shift: a channel of these images is constant"):
        corruptions.match_statistics(flat, data.KAGGLE_MEAN, data.KAGGLE_STD)
    with pytest.raises(InputError, match="images: a colour channel .* be normalised: use"):
        shift.adapt("normalize", model, flat, NORMALIZATION)


# Whether to adapt.


def logits_of(labels: torch.Tensor, scale: float = 5) -> torch.Tensor:
    """Logits (N, 10) of a network that says `labels`, the surer the larger `scale` is."""
    return scale * torch.nn.functional.one_hot(labels, 10).float()


def uneven(first: int, other: int) -> torch.Tensor:
    """Labels of 300 images: `first` of class 0, and `other` of each other class."""
    return torch.arange(10).repeat_interleave(torch.tensor([first] + 9 * [other]))


TEN, TWO, ONE = (torch.arange(300) % n for n in (10, 2, 1))


@pytest.mark.parametrize(
    ("adapted", "unadapted", "method", "reason"),
    [
        # Equal classes: the unadapted network isn't asked. Thirty images are as equal by chance.
        (logits_of(TEN), None, shift.BALANCED, "are balanced"),
        (logits_of(TEN[:30].clamp(min=2)), None, shift.BALANCED, "are balanced"),
        # Unbalanced, and adapting makes the network doubt.
        (logits_of(TWO, 2), logits_of(ONE), "none", "lowers"),
        # So it does where the unadapted network's classes are alike, and just balanced.
        (logits_of(uneven(75, 25), 2), logits_of(uneven(39, 29)), "none", "lowers"),
        # Unbalanced as well, but it is the shift that makes the unadapted network doubt.
        (logits_of(TWO), logits_of(ONE, 2), shift.BALANCED, "hardly lowers"),
        # A shift makes one class of all images, and the network is sure of it.
        (logits_of(TWO, 2), logits_of(ONE + 7), shift.BALANCED, "very different"),
    ],
)
def test_unbalanced_classes_leave_batch_norm_alone(
    model, monkeypatch, adapted, unadapted, method, reason
):
    answers = {False: adapted, True: unadapted}
    monkeypatch.setattr(shift, "predict", lambda network, *_: answers[network is model])
    images = generate_stand_in(len(adapted), 0, seed=5)[0].images
    found = shift.predict_adapted(model, images, NORMALIZATION)
    assert found.method == method and reason in found.why and "\n" not in found.why
    assert found.logits is answers[method == "none"]


def test_balanced_files_are_predicted_as_without_looking(model, images, monkeypatch):
    # This network's answers are unbalanced on any data.
    monkeypatch.setattr(shift, "SHIFT_MARGIN", 1)
    network, normalization = shift.adapt(shift.BALANCED, model, images, NORMALIZATION)
    wanted = predict(network, images, normalization, tta="flip")
    found = shift.predict_adapted(model, images, NORMALIZATION, tta="flip")
    assert torch.equal(found.logits, wanted) and found.method == shift.BALANCED


def test_imbalance_is_the_part_that_would_have_to_change_class():
    ships = shift.class_counts(logits_of(torch.full((7,), 8)))
    assert ships.tolist() == [0] * 8 + [7, 0]
    for counts, part in ((ships, 0.9), (torch.full((10,), 5), 0), ([8] * 5 + [0] * 5, 0.5)):
        assert shift.imbalance(torch.as_tensor(counts)) == pytest.approx(part)
    # What chance gives on average: images whose classes are equally likely.
    drawn = torch.randint(10, (500, 200), generator=torch.Generator().manual_seed(0))
    mean = np.mean([shift.imbalance(labels.bincount(minlength=10)) for labels in drawn])
    assert shift.CHANCE_IMBALANCE / np.sqrt(200) == pytest.approx(mean, rel=0.05)
    assert shift.allowed_imbalance(200) == pytest.approx(mean + 0.05, rel=0.03)


def test_one_class_is_not_ruined_and_a_strong_shift_is_not_taken_for_a_class_mix(cifar10):
    model, info = load_model(SHIPPED)
    how = info.test_normalization, choose_precision("auto", torch.device("cpu"))
    # Of 300 ships 39 % are right when adapted, 96 % as they come.
    test = cifar10[1]
    ships = test[(test.labels == data.CLASSES.index("ship")).nonzero()[:300, 0]]
    found = shift.predict_adapted(model, ships.images, *how)
    assert found.method == "none" and accuracy(found.logits, ships.labels) >= 0.9
    # Pixelation makes bird and cat of nearly all images, and the unadapted network is sure.
    images = corruptions.shifted(test.images[:400], "pixelate", 5)
    found = shift.predict_adapted(model, images, *how)
    counts = shift.class_counts(found.logits)
    unadapted_counts = shift.class_counts(predict(model, images, *how))
    assert not shift.is_balanced(counts) and shift.agreement(counts, unadapted_counts) < 0
    assert found.method == shift.BALANCED and "very different" in found.why
    assert accuracy(found.logits, test.labels[:400]) > 0.25


# What the ablation makes of its measurements.


def test_channel_distance_of_a_constant_move_is_the_move():
    low = torch.randint(0, 200, (20, 3, 8, 8), dtype=torch.uint8)
    high = low + torch.tensor([0, 10, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    np.testing.assert_allclose(ablation.channel_distance(low, high), [0, 10 / 255, 0.2], atol=1e-12)


def test_frechet_distance_is_the_formula():
    torch.manual_seed(0)
    a, b = torch.randn(300, 5).double(), (torch.randn(300, 5) @ torch.randn(5, 5) + 1).double()
    c1, c2 = (np.cov(features.numpy(), rowvar=False) for features in (a, b))
    means = (a.mean(0) - b.mean(0)).square().sum().item()
    wanted = means + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert ablation.frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)
    assert ablation.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("helped", ["all", "chosen on", "nothing"])
def test_the_default_is_what_wins_on_some_shifts_and_is_confirmed_on_the_others(helped):
    dice = np.random.default_rng(0)
    best, right = ablation.WAYS.index(("batchnorm", "flip")), {}
    every = [f"{family} {severity}" for family, severity in product(corruptions.FAMILIES, (1, 2))]
    for name in (ablation.CLEAN, ablation.CUSTOM, *every):
        right[name] = np.tile(dice.random(200) < 0.6, (len(ablation.WAYS), 1))
        if helped == "all" or (helped == "chosen on" and name.split()[0] in ablation.CHOSEN_ON):
            right[name][best] |= dice.random(200) < 0.5
    verdict = ablation.verdict(right)
    confirmed = helped == "all"
    assert verdict["confirmed"] == confirmed
    assert verdict["beats_none_outside_the_intervals_on_the_custom_set"] == confirmed
    default = {"adapt": "batchnorm", "tta": "flip"} if confirmed else dict(adapt="none", tta="none")
    assert verdict["default"] == default
    table = ablation.accuracy_table({name: right[name] for name in (ablation.CLEAN, "noise 2")})
    assert len(table) == 2 * len(ablation.WAYS)
    row = table.query("family == 'noise' and adapt == 'batchnorm' and tta == 'flip'").iloc[0]
    assert (row.severity, row.accuracy) == (2, right["noise 2"][best].mean())
    assert (row.mcnemar_p < 1e-3) == (helped != "nothing") and row.low < row.accuracy < row.high


def test_the_ablation_scores_what_the_library_predicts(model, images):
    test = ImageSet(images[:60], torch.arange(60) % 10)
    right = ablation.score(test.images, test, model, NORMALIZATION)
    for adaptation, tta in (("none", "flip"), ("batchnorm", "none"), ("normalize", "flip")):
        network, normalization = shift.adapt(adaptation, model, test.images, NORMALIZATION)
        guesses = predict(network, test.images, normalization, tta=tta).argmax(1)
        found = right[ablation.WAYS.index((adaptation, tta))]
        assert np.array_equal(found, (guesses == test.labels).numpy())


def test_the_ablation_resumes_only_with_the_same_weights_and_images(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "FOLDER", tmp_path)
    assert ablation.measured("abc", 3) == ({}, [])
    answers = np.ones((len(ablation.WAYS), 3), bool)
    np.savez(tmp_path / "right.npz", weights="abc", **{ablation.CLEAN: answers})
    # The second row was written before a kill, and its answers are missing.
    table = "family,severity,frechet\nclean,0,0\nnoise,1,2\n"
    (tmp_path / "measures.csv").write_text(table, encoding="utf-8")
    right, measures = ablation.measured("abc", 3)
    assert list(right) == [ablation.CLEAN] and np.array_equal(right[ablation.CLEAN], answers)
    assert measures == [{"family": "clean", "severity": 0, "frechet": 0}]
    for other in (("abd", 3), ("abc", 4)):
        with pytest.raises(InputError, match="expected .* found 3 by abc.*: move the folder"):
            ablation.measured(*other)
