import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import precision_recall_fscore_support
from torch import nn

from cifar_lib.data import CAT, CLASSES, DOG
from cifar_lib.errors import InputError
from cifar_lib.evaluate import (
    TTA,
    accuracy,
    average_views,
    calibration_error,
    confusion_matrix,
    fit_temperature,
    mcnemar,
    most_confident_mistakes,
    most_confused_pairs,
    nearest,
    per_class,
    predict,
    predict_views,
    reliability,
    selective_accuracy,
    summarize,
    wilson_interval,
)
from cifar_lib.hardware import choose_device, choose_precision, computing, describe
from cifar_lib.stand_in import generate_stand_in

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "results" / "published"


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 10))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(
        0, 256, (23, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def normalized(images: torch.Tensor) -> torch.Tensor:
    return (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def logits_for(guesses: list[int], confidences: list[float] | None = None) -> torch.Tensor:
    """Float64 logits whose softmax is `confidences` at `guesses` and the rest spread evenly."""
    confidence = torch.tensor(confidences or [0.9] * len(guesses), dtype=torch.float64)[:, None]
    probabilities = (
        ((1 - confidence) / 9).repeat(1, 10).scatter_(1, torch.tensor(guesses)[:, None], confidence)
    )
    return probabilities.log()


def test_predict_normalises_and_takes_ragged_batches(linear, images):
    expected = linear.eval()(normalized(images))
    for batch_size in (1, 10, 23, 100):
        logits = predict(linear, images, MEAN, STD, batch_size=batch_size)
        assert logits.shape == (23, 10) and logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert predict(linear, images[:0], MEAN, STD).shape == (0, 10)


def test_predict_evaluates_and_leaves_the_model_in_its_mode(linear, images):
    linear.train()
    first, second = (predict(linear, images, MEAN, STD) for _ in range(2))
    assert torch.equal(first, second)  # dropout was off
    assert linear.training
    linear.eval()
    predict(linear, images, MEAN, STD)
    assert not linear.training


def test_predict_in_bf16_is_close_and_gives_float32(linear, images):
    exact = predict(linear, images, MEAN, STD)
    rough = predict(linear, images, MEAN, STD, precision="bf16")
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.05)


def test_flip_averages_the_image_and_its_mirror(linear, images):
    plain, mirrored = (predict(linear, batch, MEAN, STD) for batch in (images, images.flip(3)))
    assert not torch.allclose(plain, mirrored, atol=0.01)
    torch.testing.assert_close(
        predict(linear, images, MEAN, STD, tta="flip"), (plain + mirrored) / 2
    )


def test_flip_shift_weights_the_centre_half_and_two_corners_a_quarter_each(linear, images):
    def view(dy: int, dx: int, mirrored: bool) -> torch.Tensor:
        rows, columns = ([abs(i + d) if i + d < 32 else 30 for i in range(32)] for d in (dy, dx))
        moved = images[:, :, rows][..., columns]
        return predict(linear, moved.flip(3) if mirrored else moved, MEAN, STD)

    weighted = [(1 / 2, 0), (1 / 4, -1), (1 / 4, 1)]
    expected = sum(w * (view(d, d, False) + view(d, d, True)) / 2 for w, d in weighted)
    torch.testing.assert_close(predict(linear, images, MEAN, STD, tta="flip-shift"), expected)


def test_logits_can_be_changed_in_place_and_learnt_from(linear, images):
    logits = predict(linear, images, MEAN, STD)
    logits /= 2.0
    temperature = torch.ones((), requires_grad=True)
    F.cross_entropy(logits / temperature, torch.arange(23) % 10).backward()
    assert temperature.grad.isfinite()


def test_an_unknown_view_is_an_error(linear, images):
    with pytest.raises(ValueError, match="flip-shift"):
        predict(linear, images, MEAN, STD, tta="rotate")


def test_accuracy_is_the_fraction_of_right_images():
    assert accuracy(logits_for([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.75


@pytest.mark.parametrize(("correct", "n"), [(9556, 10_000), (0, 20), (20, 20), (1, 3)])
def test_wilson_interval_is_the_closed_formula(correct, n):
    z, p = 1.959963984540054, correct / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson_interval(correct, n) == pytest.approx((centre - half, centre + half), abs=1e-12)


def test_wilson_interval_covers_the_true_accuracy_and_another_sets_less_often():
    dice = np.random.default_rng(0)
    first, second = dice.binomial(1000, 0.92, (2, 3000))
    low, high = np.array([wilson_interval(int(correct), 1000) for correct in first]).T
    assert np.mean((low <= 0.92) & (high >= 0.92)) == pytest.approx(0.95, abs=0.012)
    other = second / 1000
    assert np.mean((low <= other) & (other <= high)) == pytest.approx(0.83, abs=0.025)


def test_confusion_matrix_has_true_classes_in_rows():
    matrix = confusion_matrix(logits_for([DOG, DOG, CAT]), torch.tensor([CAT, CAT, CAT]))
    assert matrix.shape == (10, 10) and matrix.sum() == 3
    assert matrix[CAT, DOG] == 2 and matrix[CAT, CAT] == 1


def test_per_class_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(2)
    labels, guesses = torch.randint(
        0, 8, (2, 200), generator=generator
    )  # ship and truck occur in neither
    labels[labels == 2] = 3  # bird is predicted, never true
    ours = per_class(confusion_matrix(logits_for(guesses.tolist()), labels))
    theirs = precision_recall_fscore_support(labels, guesses, labels=range(10), zero_division=0)
    assert tuple(ours) == CLASSES
    for key, expected in zip(("precision", "recall", "f1", "images"), theirs, strict=True):
        assert [row[key] for row in ours.values()] == pytest.approx(expected.tolist())


def test_most_confused_pairs_of_the_published_matrix_are_dog_and_cat():
    rows = list(csv.reader((PUBLISHED / "confusion_matrix.csv").open()))[1:]
    matrix = np.array([row[1:] for row in rows], dtype=np.int64)
    assert matrix.trace() == 9556
    assert most_confused_pairs(matrix, k=3) == [
        ("dog", "cat", 55),
        ("cat", "dog", 45),
        ("cat", "bird", 20),
    ]


def test_most_confused_pairs_leave_out_hits_and_what_never_happened():
    matrix = np.diag([50] * 10)
    matrix[CAT, DOG] = 3
    assert most_confused_pairs(matrix) == [("cat", "dog", 3)]


def test_most_confident_mistakes_come_most_confident_first():
    guesses = [DOG, DOG, CAT, DOG, 0, DOG]
    confidences = [0.5, 0.9, 0.99, 0.7, 0.95, 0.8]
    labels = torch.tensor([CAT, CAT, CAT, CAT, CAT, 1])
    logits = logits_for(guesses, confidences)
    assert most_confident_mistakes(logits, labels).tolist() == [4, 1, 5, 3, 0]
    assert most_confident_mistakes(logits, labels, true=CAT).tolist() == [4, 1, 3, 0]
    assert most_confident_mistakes(logits, labels, predicted=DOG).tolist() == [1, 5, 3, 0]
    assert most_confident_mistakes(logits, labels, true=CAT, predicted=DOG).tolist() == [1, 3, 0]
    assert most_confident_mistakes(logits, labels, true=DOG).tolist() == []


def test_calibration_error_of_a_hand_made_set():
    # bin (0.4, 0.5]: two images at 0.45, one right: gap 0.05; bin (0.8, 0.9]: three at 0.85, all
    # wrong: gap 0.85
    logits = logits_for([0] * 5, [0.45, 0.45, 0.85, 0.85, 0.85])
    labels = torch.tensor([0, 1, 2, 2, 2])
    assert calibration_error(logits, labels, bins=10) == pytest.approx((2 * 0.05 + 3 * 0.85) / 5)


def test_confidence_of_exactly_one_belongs_to_the_last_bin():
    logits = torch.zeros(4, 10)
    logits[:, 3] = 1000.0  # softmax is exactly 1
    result = reliability(logits, torch.tensor([3, 3, 3, 0]), bins=5)
    assert result["count"].tolist() == [0, 0, 0, 0, 4]
    assert result["accuracy"][-1] == 0.75 and result["confidence"][-1] == 1.0
    assert np.isnan(result["accuracy"][:-1]).all()
    assert calibration_error(logits, torch.tensor([3, 3, 3, 0]), bins=5) == 0.25


def test_reliability_bins_are_open_below_and_closed_above():
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.75, 0.25]], dtype=torch.float64))
    result = reliability(logits, torch.tensor([0, 0]), bins=4)
    assert result["edges"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert result["count"].tolist() == [0, 1, 1, 0]


def test_summary_goes_into_json_and_agrees_with_its_parts():
    generator = torch.Generator().manual_seed(3)
    logits, labels = (
        torch.randn(50, 10, generator=generator),
        torch.randint(0, 10, (50,), generator=generator),
    )
    summary = json.loads(json.dumps(summarize(logits, labels)))
    assert summary["n"] == 50
    assert summary["accuracy"] == pytest.approx(accuracy(logits, labels))
    assert summary["interval"][0] < summary["accuracy"] < summary["interval"][1]
    assert summary["cross_entropy"] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert (
        np.array(summary["confusion_matrix"]).sum(1).tolist()
        == labels.bincount(minlength=10).tolist()
    )
    assert summary["calibration_error"] == calibration_error(logits, labels)


def test_the_cpu_is_always_there():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(
    "name", ["toaster", "", "meta", "cuda:99", "cuda:-1", "hpu", "privateuseone"]
)
def test_a_device_that_is_not_here_is_refused_in_one_line(name):
    with pytest.raises(InputError, match="^device: .*--device auto") as error:
        choose_device(name)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_cuda_asked_for_and_absent_is_refused():
    with pytest.raises(InputError, match="'cuda'"):
        choose_device("cuda")


def test_precision_is_taken_as_named_or_chosen():
    cpu = torch.device("cpu")
    assert [choose_precision(name, cpu) for name in ("fp32", "bf16", "fp16")] == [
        "fp32",
        "bf16",
        "fp16",
    ]
    with pytest.raises(InputError, match="fp8"):
        choose_precision("fp8", cpu)


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
def test_precision_is_what_the_hardware_is_good_for(
    monkeypatch, tmp_path, device, flags, capability, chosen
):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr("cifar_lib.hardware.CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    assert choose_precision("auto", torch.device(device)) == chosen


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_autocast_computes_in_the_precision(precision, dtype):
    with computing(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_large_tensors_ask_for_huge_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("needs Linux with transparent huge pages")
    code = "import torch, cifar_lib; x = torch.ones(2**24); print(open('/proc/self/smaps').read())"
    smaps = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert any("hg" in line.split() for line in smaps.splitlines() if line.startswith("VmFlags"))


def test_description_of_the_machine_goes_into_json():
    described = json.loads(json.dumps(describe(torch.device("cpu"))))
    assert described["gpu"] is None and described["cpu_cores"] >= 1 and described["memory_gb"] > 0
    assert described["torch"] == torch.__version__


def test_the_temperature_undoes_a_network_that_is_too_sure():
    torch.manual_seed(0)
    logits = torch.randn(20_000, 10) * 2
    labels = torch.distributions.Categorical(logits=logits).sample()  # calibrated as they are
    for factor in (0.5, 1.0, 3.0):
        assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.03)


def test_selective_accuracy_answers_the_surest_first():
    logits = torch.eye(10)[:4] * torch.tensor([[4.0], [1.0], [3.0], [2.0]])  # surest: 0, 2, 3, 1
    labels = torch.tensor([0, 1, 9, 3])
    right, share = selective_accuracy(logits, labels)
    assert right.tolist() == [1, 1 / 2, 2 / 3, 3 / 4] and share.tolist() == [0.25, 0.5, 0.75, 1]


def test_nearest_goes_by_direction_not_by_length():
    others = torch.tensor([[1.0, 0.0], [0.0, 5.0], [10.0, 1.0]])
    similarity, position = nearest(torch.tensor([[2.0, 0.0], [0.0, 0.1]]), others, 2)
    assert position.tolist() == [[0, 2], [1, 2]]
    assert similarity[:, 0].tolist() == [1, 1] and similarity[0, 1].item() == pytest.approx(
        10 / 101**0.5
    )


def test_mcnemar_counts_the_images_on_which_two_classifiers_differ():
    reference = np.array([True] * 50 + [False] * 50)
    right = np.array([True] * 40 + [False] * 10 + [True] * 30 + [False] * 20)
    gained, lost, p = mcnemar(right, reference)
    assert (gained, lost) == (30, 10)
    # two-sided exact binomial: 2 P(X <= 10 | 40, 1/2)
    assert p == pytest.approx(2 * sum(math.comb(40, k) for k in range(11)) / 2**40)
    assert mcnemar(torch.tensor(right), torch.tensor(right)) == (0, 0, 1.0)


def test_views_are_those_that_a_way_of_tta_averages():
    images, network = (
        generate_stand_in(20, 0)[0].images,
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)),
    )
    views = predict_views(network, images, MEAN, STD)
    assert views.shape == (6, 20, 10)
    for tta, weights in TTA.items():
        assert sum(weights) == 1
        torch.testing.assert_close(
            average_views(views, tta), predict(network, images, MEAN, STD, tta=tta)
        )
    assert predict_views(network, images[:0], MEAN, STD, count=2).shape == (2, 0, 10)
