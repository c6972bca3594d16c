import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import sqrtm
from session import SHIFT

from cifar_lib.data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    KAGGLE_MEAN,
    KAGGLE_STD,
    ImageSet,
    channel_statistics,
)
from cifar_lib.errors import InputError
from cifar_lib.evaluate import features, predict
from cifar_lib.model import ResNet
from cifar_lib.shift import (
    ADAPTATIONS,
    FAMILIES,
    PRIOR,
    SEVERITIES,
    adapt,
    channel_distance,
    frechet_distance,
    match_statistics,
    rebase_batch_norm,
    shifted,
)
from cifar_lib.stand_in import generate_stand_in

HEADER = "| accuracy, % | none | normalize | batchnorm | both | both, mirror image: the default |"
MEAN, STD = CIFAR10_MEAN, CIFAR10_STD


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    pictures = generate_stand_in(200, 0, seed=5)[0].images
    return match_statistics(pictures, MEAN, STD)


@pytest.fixture(scope="module")
def model() -> ResNet:
    """A network whose batch-norm statistics are those of nothing in particular."""
    torch.manual_seed(0)
    network = ResNet((1, 1), (16, 32)).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return network


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shift_is_deterministic_and_grows_with_its_severity(family, images):
    results = [shifted(images, family, severity) for severity in SEVERITIES]
    assert all(r.shape == images.shape and r.dtype == torch.uint8 for r in results)
    assert torch.equal(results[2], shifted(images, family, 3))
    changes = [(r.float() - images.float()).abs().mean().item() for r in results]
    assert changes[0] > 0.05 and changes == sorted(changes)


def test_the_seed_changes_the_noise_and_nothing_else(images):
    assert not torch.equal(shifted(images, "noise", 1, seed=0), shifted(images, "noise", 1, seed=1))
    moved = shifted(images, "noise", 5).float() - images.float()
    inside = (images > 90) & (images < 165)  # where nothing is cut off
    assert moved[inside].std().item() == pytest.approx(0.10 * 255, rel=0.02)


def test_the_first_severity_of_statistics_is_the_published_runs_custom_set(images):
    mean, std = channel_statistics(shifted(images, "statistics", 1))
    np.testing.assert_allclose(mean, KAGGLE_MEAN, atol=2e-3)
    np.testing.assert_allclose(std, KAGGLE_STD, atol=2e-3)


def test_a_constant_channel_has_no_statistics_to_match(images):
    flat = images.clone()
    flat[:, 1] = 7
    with pytest.raises(InputError, match="shift: a channel of these images is constant"):
        match_statistics(flat, KAGGLE_MEAN, KAGGLE_STD)


@pytest.mark.parametrize("severity", [0, 6, -1, 2.5, None])
def test_a_severity_out_of_range_is_refused(images, severity):
    with pytest.raises(InputError, match="severity: expected a whole number from 1 to 5, got"):
        shifted(images, "blur", severity)


def test_an_unknown_shift_is_refused_with_the_known_ones(images):
    with pytest.raises(
        InputError, match="shift: expected one of statistics, brightness.*; got 'fog'"
    ):
        shifted(images, "fog", 1)


# Measures


def test_channel_distance_of_a_constant_move_is_the_move():
    low = torch.randint(0, 200, (20, 3, 8, 8), dtype=torch.uint8)
    high = low + torch.tensor([0, 10, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    np.testing.assert_allclose(channel_distance(low, high), [0, 10 / 255, 0.2], atol=1e-12)


def test_frechet_distance_is_the_formula():
    torch.manual_seed(0)
    a, b = torch.randn(300, 5), torch.randn(300, 5) @ torch.randn(5, 5) + 1
    (m1, c1), (m2, c2) = (
        (x.double().mean(0).numpy(), np.cov(x.double().numpy(), rowvar=False)) for x in (a, b)
    )
    wanted = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@torch.no_grad()
def test_features_are_what_the_last_layer_sees(model, images):
    rows = features(model, images, MEAN, STD)
    assert rows.shape == (200, 32) and rows.dtype == torch.float32
    torch.testing.assert_close(
        model.linear(rows), predict(model, images, MEAN, STD), atol=1e-5, rtol=1e-5
    )


# Adaptation


def test_normalize_undoes_gain_and_offset(model, images):
    moved = match_statistics(images, [0.5, 0.45, 0.4], [0.2, 0.2, 0.2])
    logits = {}
    for method in ("none", "normalize"):
        network, mean, std = adapt(method, model, moved, MEAN, STD)
        logits[method] = predict(network, moved, mean, std)
    reference = predict(model, images, MEAN, STD)
    error = {name: (values - reference).abs().mean().item() for name, values in logits.items()}
    assert error["normalize"] < 0.2 * error["none"]


def test_none_changes_nothing(model, images):
    assert adapt("none", model, images, MEAN, STD) == (model, MEAN, STD)


def test_batchnorm_mixes_the_images_statistics_with_the_training_ones(model, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted, mean, std = adapt("batchnorm", model, images, MEAN, STD)
    assert (mean, std) == (MEAN, STD) and not adapted.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name  # the network itself stays
    inputs = model.conv1(
        (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    )
    weight = len(images) / (PRIOR + len(images))
    own = {"running_mean": inputs.mean((0, 2, 3)), "running_var": inputs.var((0, 2, 3))}
    for name, value in own.items():
        wanted = weight * value + (1 - weight) * before[f"bn1.{name}"]
        torch.testing.assert_close(
            getattr(adapted.bn1, name), wanted.detach(), rtol=1e-4, atol=1e-4
        )


def test_batches_of_nearly_equal_size_count_alike(model, images):
    """260 images are batches of 130 and 130, not of 250 and 10, whose statistics would count as
    much."""
    twice = torch.cat([images, images[:60]])
    adapted, *_ = adapt("batchnorm", model, twice, MEAN, STD)
    inputs = model.conv1(
        (twice / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    )
    weight = 260 / (PRIOR + 260)
    wanted = weight * inputs.mean((0, 2, 3)) + (1 - weight) * model.bn1.running_mean
    torch.testing.assert_close(adapted.bn1.running_mean, wanted.detach(), rtol=1e-4, atol=1e-4)


def test_rebasing_keeps_the_function_and_takes_what_is_no_shift_from_batchnorm(model, images):
    """The images have other statistics than the network was left with; they are no shift for a
    rebased one."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rebased = rebase_batch_norm(model, images, MEAN, STD)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    reference = predict(model, images, MEAN, STD)
    torch.testing.assert_close(predict(rebased, images, MEAN, STD), reference, atol=1e-4, rtol=1e-4)
    inputs = model.conv1(
        (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    )
    torch.testing.assert_close(
        rebased.bn1.running_mean, inputs.mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-4
    )
    error = {}
    for name, network in (("as trained", model), ("rebased", rebased)):
        adapted, mean, std = adapt("batchnorm", network, images, MEAN, STD)
        error[name] = (predict(adapted, images, mean, std) - reference).abs().mean().item()
    assert error["rebased"] < 0.02 * error["as trained"]


@pytest.mark.parametrize("method", ["batchnorm", "normalize+batchnorm"])
def test_one_image_has_no_batch_statistics(model, images, method):
    with pytest.raises(InputError, match="adapt: batchnorm .* give at least 2"):
        adapt(method, model, images[:1], MEAN, STD)


def test_an_unknown_adaptation_and_a_constant_channel_are_refused(model, images):
    with pytest.raises(
        InputError, match=f"adapt: expected one of {', '.join(ADAPTATIONS)}".replace("+", "\\+")
    ):
        adapt("magic", model, images, MEAN, STD)
    flat = images.clone()
    flat[:, 1] = 7
    with pytest.raises(InputError, match="a channel of these images is constant"):
        adapt("normalize", model, flat, MEAN, STD)


# What the ablation makes of its measurements


def ablation():
    path = Path(__file__).parent.parent / "results" / "ablation.py"
    spec = importlib.util.spec_from_file_location("ablation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("helped", ["all", "chosen on", "nothing"])
def test_the_default_is_what_wins_on_some_shifts_and_is_confirmed_on_the_others(helped):
    script = ablation()
    dice = np.random.default_rng(0)
    right = {}
    for shift in (script.CLEAN, *(f"{f} {s}" for f in FAMILIES for s in SEVERITIES), script.CUSTOM):
        family = shift.split()[0]
        base = dice.random(200) < 0.6
        better = base | (dice.random(200) < 0.3)
        helps = helped == "all" or (helped == "chosen on" and family in script.CHOSEN_ON)
        right[shift] = np.array(
            [better if helps and way == ("batchnorm", "flip") else base for way in script.WAYS]
        )
    verdict = script.verdict(right)
    assert (
        verdict["confirmed"]
        == verdict["beats_none_outside_the_intervals_on_the_custom_set"]
        == (helped == "all")
    )
    best = {"adapt": "batchnorm", "tta": "flip"}
    assert verdict["default"] == (best if helped == "all" else {"adapt": "none", "tta": "none"})
    table = script.accuracy_table(right)
    assert len(table) == len(right) * len(script.WAYS)
    row = table.query(
        "family == 'noise' and severity == 2 and adapt == 'batchnorm' and tta == 'flip'"
    ).iloc[0]
    assert row.accuracy == right["noise 2"][script.WAYS.index(("batchnorm", "flip"))].mean()
    assert (row.mcnemar_p < 1e-3) == (helped != "nothing") and row.low < row.accuracy < row.high
    pictures = script.draw(table)
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())


def test_the_ablation_scores_what_the_library_predicts(model, images):
    script = ablation()
    test = ImageSet(images, torch.arange(len(images)) % 10, "generated")
    right = script.score(images, test, model, {"mean": MEAN, "std": STD})
    for way in (("none", "flip-shift"), ("batchnorm", "flip")):
        network, mean, std = adapt(way[0], model, images, MEAN, STD)
        logits = predict(network, images, mean, std, tta=way[1])
        assert np.array_equal(
            right[script.WAYS.index(way)], (logits.argmax(1) == test.labels).numpy()
        )


def test_the_ablation_goes_on_only_with_the_same_weights_and_images(tmp_path, monkeypatch):
    script = ablation()
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    assert script.measured("abc", 3) == ({}, [])
    answers = np.ones((len(script.WAYS), 3), bool)
    np.savez(tmp_path / "right.npz", weights="abc", **{script.CLEAN: answers})
    (tmp_path / "measures.csv").write_text("family,severity,frechet\nclean,0,0\n")
    with open(tmp_path / "measures.csv", "a") as file:
        file.write("noise,1,2\n")  # written before a kill, whose answers are missing
    right, measures = script.measured("abc", 3)
    assert list(right) == [script.CLEAN] and np.array_equal(right[script.CLEAN], answers)
    assert measures == [{"family": "clean", "severity": 0, "frechet": 0}]
    for weights, images in (("abd", 3), ("abc", 4)):
        with pytest.raises(
            InputError,
            match=r"expected measurements of .* found 3 by abc.*: move the folder",
        ):
            script.measured(weights, images)


def test_the_documented_table_is_what_was_measured():
    rows = pd.read_csv(SHIFT / "accuracy.csv")
    rows["way"] = rows["adapt"] + " + " + rows["tta"]
    named = {
        "unshifted": "clean",
        "synthetic copy of the custom set, n = 10,000": "custom",
        "darkness, mean of five": "brightness",
    }
    named |= {
        "channel statistics, mean of five": "statistics",
        "pixelation, mean of five": "pixelate",
    }
    ways = [*(f"{name} + none" for name in ADAPTATIONS), "normalize+batchnorm + flip"]
    means = 100 * rows.groupby(["family", "way"]).accuracy.mean()
    lines = (SHIFT.parents[1] / "docs" / "shift.md").read_text().splitlines()
    table = [line.strip("| ").split(" | ") for line in lines[lines.index(HEADER) + 2 :]][
        : 2 + len(FAMILIES)
    ]
    for name, *said in table:
        family = named.get(name, name.removesuffix(", mean of five").lower())
        assert said == [f"{means[family, way]:.1f}" for way in ways], name
