import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import precision_recall_fscore_support
from torch import nn

from cifar_lib import evaluate
from cifar_lib.data import CAT, CLASSES, DOG
from cifar_lib.errors import InputError
from cifar_lib.explain import beside_heat, grad_cam
from cifar_lib.hardware import choose_device, choose_precision, describe
from cifar_lib.model import ResNet

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
PUBLISHED = Path(__file__).parents[1] / "results" / "published"


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 10))


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (123, 3, 32, 32), dtype=torch.uint8, generator=generator)


def logits_for(guesses: list[int], confidences: list[float] | None = None) -> torch.Tensor:
    """Float64 logits whose softmax is `confidences` at `guesses` and the rest spread evenly."""
    confidence = torch.tensor(confidences or [0.9] * len(guesses), dtype=torch.float64)[:, None]
    rest = ((1 - confidence) / 9).repeat(1, 10)
    return rest.scatter_(1, torch.tensor(guesses)[:, None], confidence).log()


@pytest.mark.parametrize(
    ("precision", "training", "error"),
    [("fp32", True, 1e-4), ("fp32", False, 1e-4), ("bf16", True, 0.1)],
)
def test_predict_normalises_evaluates_and_leaves_the_model_in_its_mode(
    linear, images, precision, training, error
):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    expected = linear.eval()((images / 255 - mean) / std)
    linear.train(training)
    logits = evaluate.predict(linear, images, MEAN, STD, precision)  # two batches, no dropout
    assert logits.dtype == torch.float32 and linear.training == training
    torch.testing.assert_close(logits, expected, atol=error, rtol=error / 2)
    assert (logits - expected).abs().max() > 1e-3 or precision == "fp32"
    assert evaluate.predict(linear, images[:0], MEAN, STD).shape == (0, 10)


def test_the_views_are_the_image_and_its_mirror_image(linear, images):
    plain, mirrored = (evaluate.predict(linear, x, MEAN, STD) for x in (images, images.flip(3)))
    assert not torch.allclose(plain, mirrored, atol=0.01)
    got = evaluate.predict(linear, images, MEAN, STD, tta="flip")
    torch.testing.assert_close(got, (plain + mirrored) / 2)


@torch.no_grad()
def test_features_are_what_the_last_layer_sees(images):
    model = ResNet((1, 1), (8, 16)).eval()
    features = evaluate.features(model, images, MEAN, STD)
    assert features.shape == (123, 16) and features.dtype == torch.float32
    logits = evaluate.predict(model, images, MEAN, STD)
    torch.testing.assert_close(model.linear(features), logits, atol=1e-5, rtol=1e-5)


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


def test_most_confident_mistakes_come_most_confident_first():
    guesses = [DOG, DOG, CAT, DOG, 0, DOG]
    logits = logits_for(guesses, confidences=[0.5, 0.9, 0.99, 0.7, 0.95, 0.8])
    labels = torch.tensor([CAT, CAT, CAT, CAT, CAT, 1])
    for chosen, expected in (
        ({}, [4, 1, 5, 3, 0]),
        ({"true": CAT}, [4, 1, 3, 0]),
        ({"predicted": DOG}, [1, 5, 3, 0]),
        ({"true": CAT, "predicted": DOG}, [1, 3, 0]),
        ({"true": DOG}, []),
    ):
        found = evaluate.most_confident_mistakes(logits, labels, **chosen)
        assert found.tolist() == expected


def test_calibration_error_of_a_hand_made_set():
    logits = logits_for([0] * 5, [0.45, 0.45, 0.85, 0.85, 0.85])
    labels = torch.tensor([0, 1, 2, 2, 2])
    error = (2 * 0.05 + 3 * 0.85) / 5  # one of two is right at 0.45, none of three at 0.85
    assert evaluate.calibration_error(logits, labels, bins=10) == pytest.approx(error)


def test_reliability_bins_are_open_below_and_closed_above():
    certain = torch.tensor([[1000.0, 0.0]])  # its softmax is exactly 1
    half, most = torch.tensor([[0.5, 0.5], [0.75, 0.25]], dtype=torch.float64).log().split(1)
    logits = torch.cat([half, most, certain, certain])
    result = evaluate.reliability(logits, torch.tensor([0, 0, 0, 1]), bins=4)
    assert result["edges"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert result["count"].tolist() == [0, 1, 1, 2]
    assert np.isnan(result["accuracy"][0]) and result["accuracy"][1:].tolist() == [1, 1, 0.5]
    assert result["confidence"][3] == 1


def test_summary_goes_into_json_and_agrees_with_its_parts():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 10, generator=generator)
    labels = torch.randint(0, 10, (50,), generator=generator)
    summary = json.loads(json.dumps(evaluate.summarize(logits, labels)))
    matrix = evaluate.confusion_matrix(logits, labels)
    assert summary == {
        "accuracy": pytest.approx(evaluate.accuracy(logits, labels)),
        "n": 50,
        "interval": list(evaluate.wilson_interval(matrix.trace(), 50)),
        "cross_entropy": F.cross_entropy(logits, labels).item(),
        "calibration_error": evaluate.calibration_error(logits, labels),
        "per_class": evaluate.per_class(matrix),
        "confusion_matrix": matrix.tolist(),
    }
    assert evaluate.wilson_interval(9556, 10_000) == pytest.approx((0.95138, 0.95947), abs=1e-5)


def test_the_temperature_undoes_a_network_that_is_too_sure():
    torch.manual_seed(0)
    logits = torch.randn(20_000, 10) * 2
    labels = torch.distributions.Categorical(logits=logits).sample()  # calibrated as they are
    for factor in (0.5, 3.0):
        assert evaluate.fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.03)


def test_the_temperature_stays_in_its_range_where_nothing_is_wrong_or_all():
    timid, bold = 0.1 * torch.eye(10), 10 * torch.eye(10)
    right, wrong = torch.arange(10), (torch.arange(10) + 1) % 10
    assert evaluate.fit_temperature(timid, right) == pytest.approx(math.exp(-3), rel=0.01)
    assert evaluate.fit_temperature(bold, wrong) == pytest.approx(math.exp(3), rel=0.01)


def test_mcnemar_counts_the_images_on_which_two_classifiers_differ():
    reference = np.array([True] * 50 + [False] * 50)
    right = np.array([True] * 40 + [False] * 10 + [True] * 30 + [False] * 20)
    gained, lost, p = evaluate.mcnemar(right, reference)
    assert (gained, lost) == (30, 10)
    # two-sided exact binomial: 2 P(X <= 10 | 40, 1/2)
    assert p == pytest.approx(2 * sum(math.comb(40, k) for k in range(11)) / 2**40)
    assert evaluate.mcnemar(torch.tensor(right), torch.tensor(right)) == (0, 0, 1.0)


@pytest.mark.parametrize("name", ["toaster", "", "meta", "cuda:99", "hpu", "privateuseone"])
def test_a_device_that_is_not_here_is_refused_in_one_line(name):
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(InputError, match=r"^device: [^\n]*--device auto[^\n]*$"):
        choose_device(name)


@pytest.mark.parametrize(
    ("device", "flags", "capability", "chosen"),
    [
        ("cpu", "fpu avx2", None, "fp32"),
        ("cpu", "fpu avx512_bf16", None, "bf16"),
        ("cpu", "fpu amx_bf16", None, "bf16"),
        ("mps", "", None, "fp32"),
        ("cuda", "", (7, 5), "fp16"),  # a T4
        ("cuda", "", (8, 0), "bf16"),  # an A100
    ],
)
def test_precision_is_what_the_hardware_is_good_for_or_is_taken_as_named(
    monkeypatch, tmp_path, device, flags, capability, chosen
):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n", encoding="utf-8")
    monkeypatch.setattr("cifar_lib.hardware.CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    assert choose_precision("auto", torch.device(device)) == chosen
    assert choose_precision("fp16", torch.device(device)) == "fp16"
    with pytest.raises(InputError, match="fp8"):
        choose_precision("fp8", torch.device(device))


def test_large_tensors_ask_for_huge_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("needs Linux with transparent huge pages")
    large = torch.ones(2**24)
    areas = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    flags = [line.split() for line in areas if line.startswith("VmFlags")]
    assert any("hg" in each for each in flags) and large[0] == 1


def test_description_of_the_machine_goes_into_json():
    described = json.loads(json.dumps(describe(torch.device("cpu"))))
    assert described["gpu"] is None and described["cpu_cores"] >= 1 and described["memory_gb"] > 0
    assert described["torch"] == torch.__version__


def test_grad_cam_is_where_the_class_is_seen_and_nothing_where_nothing_speaks_for_it(images):
    torch.manual_seed(0)
    model = ResNet((1,), (8,)).eval()
    model.linear.weight.data[3] = -1.0  # features are positive, so nothing speaks for class 3
    model.linear.weight.data[5] = 1.0
    heat = grad_cam(model, images[:2], torch.tensor([3, 5]), MEAN, STD)
    assert heat.shape == (2, 32, 32) and heat[0].max() == 0
    assert heat[1].min() >= 0 and heat[1].max() == pytest.approx(1)
    picture = beside_heat(images[0], heat[0], scale=2)
    assert picture.shape == (64, 128, 3)
    assert np.array_equal(picture[::2, :64:2], images[0].permute(1, 2, 0).numpy())
