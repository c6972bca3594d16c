"""From images to logits, from logits to numbers, and to where the network looks."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import precision_recall_fscore_support
from torch import nn

from cifar_lib import evaluate
from cifar_lib.data import CAT, CLASSES, DOG, Normalization
from cifar_lib.explain import grad_cam, picture_with_heat
from cifar_lib.model import ResNet

NORMALIZATION = Normalization((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """So many that they are predicted in two batches."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (410, 3, 32, 32), dtype=torch.uint8, generator=generator)


def logits_for(guesses: list[int], confidences: list[float] | None = None) -> torch.Tensor:
    """Float64 logits whose softmax is `confidences` at `guesses` and the rest spread evenly."""
    confidence = torch.tensor(confidences or [0.9] * len(guesses), dtype=torch.float64)[:, None]
    rest = ((1 - confidence) / 9).repeat(1, 10)
    return rest.scatter_(1, torch.tensor(guesses)[:, None], confidence).log()


# From images to logits.


@torch.no_grad()
@pytest.mark.parametrize(
    ("precision", "training", "error"), [("fp32", False, 1e-4), ("bf16", True, 0.1)]
)
def test_predict_normalises_averages_views_and_leaves_the_model_in_its_mode(
    images, precision, training, error
):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 10)).eval()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (NORMALIZATION.mean, NORMALIZATION.std))
    inputs = (images / 255 - mean) / std
    wanted = torch.stack([model(inputs), model(inputs.flip(3))])  # the image and its mirror image
    assert not torch.allclose(wanted[0], wanted[1], atol=0.5)

    model.train(training)
    views = evaluate.predict_views(model, images, NORMALIZATION, precision)
    assert views.dtype == torch.float32 and model.training == training
    torch.testing.assert_close(views, wanted, atol=error, rtol=error / 2)
    assert (views - wanted).abs().max() > 1e-3 or precision == "fp32"
    for tta, expected in (("none", views[0]), ("flip", views.mean(0))):
        logits = evaluate.predict(model, images, NORMALIZATION, precision, tta)
        torch.testing.assert_close(logits, expected)
    assert torch.equal(evaluate.predict(model, images, NORMALIZATION, precision), views[0])
    assert evaluate.predict(model, images[:0], NORMALIZATION).shape == (0, 10)


@torch.no_grad()
def test_features_are_what_the_last_layer_sees(images):
    model = ResNet((1, 1), (8, 16)).eval()
    features = evaluate.features(model, images[:20], NORMALIZATION)
    assert features.shape == (20, 16) and features.dtype == torch.float32
    logits = evaluate.predict(model, images[:20], NORMALIZATION)
    torch.testing.assert_close(model.linear(features), logits, atol=1e-5, rtol=1e-5)


# From logits to numbers.


def test_confusion_matrix_and_per_class_agree_with_scikit_learn():
    generator = torch.Generator().manual_seed(2)
    # Ship and truck occur in neither; bird is predicted, never true.
    labels, guesses = torch.randint(0, 8, (2, 200), generator=generator)
    labels[labels == 2] = 3
    matrix = evaluate.confusion_matrix(logits_for(guesses.tolist()), labels)
    assert matrix[CAT, DOG] == ((labels == CAT) & (guesses == DOG)).sum()  # rows are true classes
    ours = evaluate.per_class(matrix)
    theirs = precision_recall_fscore_support(labels, guesses, labels=range(10), zero_division=0)
    assert tuple(ours) == CLASSES
    names = ("precision", "recall", "f1", "images")
    for row, expected in zip(ours.values(), np.transpose(theirs), strict=True):
        assert row == pytest.approx(dict(zip(names, expected, strict=True)))


def test_mistakes_come_most_confident_first():
    logits = logits_for([DOG, DOG, CAT, DOG, 0, DOG], confidences=[0.5, 0.9, 0.99, 0.7, 0.95, 0.8])
    labels = torch.tensor([CAT, CAT, CAT, CAT, CAT, 1])
    for chosen, expected in (
        ({}, [4, 1, 5, 3, 0]),
        ({"true": CAT}, [4, 1, 3, 0]),
        ({"predicted": DOG}, [1, 5, 3, 0]),
        ({"true": CAT, "predicted": DOG}, [1, 3, 0]),
        ({"true": 0}, []),
        ({"predicted": 0}, [4]),
    ):
        assert evaluate.most_confident_mistakes(logits, labels, **chosen).tolist() == expected


def test_reliability_bins_are_open_below_and_closed_above():
    certain = torch.tensor([[1000.0, 0.0]])  # its softmax is exactly 1
    half, most = torch.tensor([[0.5, 0.5], [0.75, 0.25]], dtype=torch.float64).log().split(1)
    logits = torch.cat([half, most, certain, certain])
    result = evaluate.reliability(logits, torch.tensor([0, 0, 0, 1]), bins=4)
    assert result["edges"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert result["count"].tolist() == [0, 1, 1, 2]
    assert np.isnan(result["accuracy"][0]) and result["accuracy"][1:].tolist() == [1, 1, 0.5]
    assert result["confidence"][3] == 1


def test_the_calibration_error_of_a_hand_made_set_in_15_bins_and_in_10():
    logits, labels = logits_for([0] * 4, [0.62, 0.68, 0.85, 0.85]), torch.tensor([0, 1, 2, 2])
    apart, together = (0.38 + 0.68 + 2 * 0.85) / 4, (2 * 0.15 + 2 * 0.85) / 4
    assert evaluate.calibration_error(logits, labels) == pytest.approx(apart)
    assert evaluate.calibration_error(logits, labels, bins=10) == pytest.approx(together)
    assert len(evaluate.reliability(logits, labels)["count"]) == 15


def test_the_summary_goes_into_json_and_agrees_with_its_parts():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 10, generator=generator)
    labels = torch.randint(0, 10, (50,), generator=generator)
    matrix = evaluate.confusion_matrix(logits, labels)
    assert json.loads(json.dumps(evaluate.summarize(logits, labels))) == {
        "accuracy": pytest.approx(evaluate.accuracy(logits, labels)),
        "n": 50,
        "interval": list(evaluate.wilson_interval(matrix.trace(), 50)),
        "cross_entropy": F.cross_entropy(logits, labels).item(),
        "calibration_error": evaluate.calibration_error(logits, labels),
        "per_class": evaluate.per_class(matrix),
        "confusion_matrix": matrix.tolist(),
    }
    assert evaluate.wilson_interval(9556, 10_000) == pytest.approx((0.95138, 0.95947), abs=1e-5)


def test_the_temperature_undoes_too_much_or_too_little_confidence_within_its_range():
    torch.manual_seed(0)
    logits = torch.randn(20_000, 10) * 2
    labels = torch.distributions.Categorical(logits=logits).sample()  # calibrated as they are
    for factor in (0.5, 3.0):
        assert evaluate.fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.03)
    correct, wrong = torch.arange(10), (torch.arange(10) + 1) % 10
    for logits, labels, limit in ((0.1, correct, -3), (10, wrong, 3)):
        found = evaluate.fit_temperature(logits * torch.eye(10), labels)
        assert found == pytest.approx(math.exp(limit), rel=0.01)


def test_mcnemar_counts_the_images_on_which_two_classifiers_differ():
    reference = np.array([True] * 50 + [False] * 50)
    is_correct = np.array([True] * 40 + [False] * 10 + [True] * 30 + [False] * 20)
    p = 2 * sum(math.comb(40, k) for k in range(11)) / 2**40  # 2 P(X <= 10 | 40, 1/2)
    assert evaluate.mcnemar(is_correct, reference) == (30, 10, pytest.approx(p))
    assert evaluate.mcnemar(*[torch.tensor(reference)] * 2) == (0, 0, 1.0)


# Where the network looks.


@torch.no_grad()
def test_grad_cam_of_a_network_that_averages_is_the_class_activation_map(images):
    """There the gradient of a logit is the last layer's weight, over the places (Zhou 2015)."""
    torch.manual_seed(0)
    model = ResNet((1, 1), (8, 16)).eval()
    model.linear.weight[3] = -1  # activations aren't negative, so nothing speaks for class 3
    activations = []
    model.stages[-1].register_forward_hook(lambda *arguments: activations.append(arguments[2]))
    heat = grad_cam(model, images[:3], torch.tensor([3, 5, 7]), NORMALIZATION)
    assert heat.shape == (3, 32, 32) and not heat.requires_grad and heat[0].max() == 0
    assert len(model.stages[-1]._forward_hooks) == 1  # the one above: Grad-CAM leaves none

    weights = model.linear.weight[[5, 7], :, None, None]
    small = (weights * activations[0][1:]).sum(1, keepdim=True).relu()  # (2, 1, 16, 16)
    wanted = F.interpolate(small, size=(32, 32), mode="bilinear")[:, 0]
    wanted /= wanted.amax((1, 2), keepdim=True)
    torch.testing.assert_close(heat[1:], wanted)
    assert (wanted == 0).any() and wanted.std() > 0.1


def test_a_picture_stands_beside_itself_under_its_heat(images):
    heat = torch.zeros(32, 32)
    heat[5, 6] = 1  # inferno's ends: black, and a bright yellow
    picture = picture_with_heat(images[0], heat, scale=2)
    assert picture.shape == (64, 128, 3) and np.array_equal(picture[1::2, 1::2], picture[::2, ::2])
    plain, heated = np.hsplit(picture[::2, ::2].astype(int), 2)
    assert np.array_equal(plain, images[0].permute(1, 2, 0).numpy())
    colours = np.full((32, 32, 3), (0, 0, 4))
    colours[5, 6] = 252, 255, 164
    assert np.abs(heated - (0.45 * plain + 0.55 * colours)).max() <= 1
