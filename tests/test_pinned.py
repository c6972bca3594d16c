"""Values that a result depends on and that no other test would miss."""

import json
import pickle
from dataclasses import asdict, astuple
from inspect import signature
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_lib import data, shift
from cifar_lib.evaluate import calibration_error, reliability
from cifar_lib.recipes import recipe
from notebooks.course import corruptions

RESULTS = Path(__file__).parent.parent / "results"


def test_best_is_the_recipe_of_the_published_weights():
    assert astuple(recipe("best")) == (
        *("best", (3, 4, 3), (66, 132, 264)),
        *(60, 128, 0.1, 5, "cosine"),
        *(0.9, True, 5e-4, 0.09, 0),
        (4, 0.5, "none", 2, 9, 0.0, 16),
        *((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        *((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        *(42, "auto", None, 1, None, 0, False),
    )


def test_quick_is_best_made_short_without_cutout():
    changes = {"recipe": "quick", "epochs": 4, "batch_size": 32, "learning_rate": 0.05}
    changes |= {"warmup_epochs": 1, "label_smoothing": 0.05, "half_size_epochs": 3}
    changes |= {"train_size": 1200, "validation_size": 200}
    policy = asdict(recipe("best").policy) | {"cutout": 0}
    assert asdict(recipe("quick")) == asdict(recipe("best")) | changes | {"policy": policy}


@pytest.mark.parametrize("run", ["report-seed42", "report-seed0", "best-seed42", "best-seed0"])
def test_a_recorded_run_is_of_the_recipe_that_it_names(run):
    recorded = json.loads((RESULTS / run / "config.json").read_text(encoding="utf-8"))
    ours = json.loads(json.dumps(asdict(recipe(recorded["recipe"]))))
    by_machine = {"seed", "precision", "compile", "ranks"}  # decided for this run
    fields = (ours.keys() & recorded.keys()) - by_machine
    assert {name: recorded[name] for name in fields} == {name: ours[name] for name in fields}
    metrics = json.loads((RESULTS / run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["recipe"] == recorded["recipe"] and metrics["seed"] == recorded["seed"]
    assert metrics["mean"] == ours["test_mean"] and metrics["std"] == ours["test_std"]


def test_the_competitions_statistics_are_in_the_order_red_green_blue():
    assert data.KAGGLE_MEAN == (0.4765, 0.4808, 0.4958)  # bluer than CIFAR-10, which is redder
    assert data.KAGGLE_STD == (0.2303, 0.2267, 0.2268)


def test_the_calibration_error_has_15_bins_and_the_training_statistics_count_for_16_images():
    torch.manual_seed(0)
    logits = torch.randn(500, 10) * 2
    labels = torch.distributions.Categorical(logits=logits).sample()  # calibrated: small gaps
    table = reliability(logits, labels, 15)
    gaps = np.nan_to_num(np.abs(table["accuracy"] - table["confidence"]))
    wanted = np.average(gaps, weights=table["count"])
    assert calibration_error(logits, labels) == pytest.approx(wanted)
    assert calibration_error(logits, labels, 10) != pytest.approx(wanted)
    assert signature(reliability).parameters["bins"].default == 15
    assert shift.PRIOR == 16


@pytest.mark.parametrize("family", corruptions.FAMILIES)
def test_the_severities_of_a_shift_move_strictly_away(family):
    amounts = corruptions.FAMILIES[family][1]
    signs = {np.sign(after - before) for before, after in pairwise(amounts)}
    assert len(amounts) == len(corruptions.SEVERITIES) and signs in ({1.0}, {-1.0})


def test_generated_values_are_rounded_not_cut_off(tmp_path, stand_in):
    images = stand_in[1].images
    mean, std = (0.4765, 0.4808, 0.4958), (0.2303, 0.2267, 0.2268)
    made = corruptions.match_statistics(images, mean, std)
    found_mean, found_std = data.channel_statistics(made)
    # Cutting off would darken every channel by half a value, 0.002.
    np.testing.assert_allclose(found_mean, mean, atol=5e-4)
    np.testing.assert_allclose(found_std, std, atol=5e-4)
    corruptions.generate_test_file(tmp_path / "test.pkl", stand_in[1])
    stored = pickle.loads((tmp_path / "test.pkl").read_bytes())[b"data"]
    assert stored.shape == (len(images), 32, 32, 3)


def test_a_fine_pattern_in_a_large_picture_becomes_its_mean(tmp_path):
    board = (np.indices((320, 320)).sum(0) % 2 * 255).astype(np.uint8)  # a chessboard of pixels
    Image.fromarray(board).convert("RGB").save(tmp_path / "board.png")
    image = data.read_picture(tmp_path / "board.png").float()
    assert (image - 127.5).abs().max() < 8  # without anti-aliasing: 0 or 255
