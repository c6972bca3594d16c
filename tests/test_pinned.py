"""Values that a result depends on and that no other test would miss."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from cifar_lib import data
from cifar_lib.recipes import recipe, with_defaults

RESULTS = Path(__file__).parent.parent / "results"


def test_a_run_of_best_decides_by_itself_what_the_machine_is_good_for():
    best = recipe("best")
    assert (best.seed, best.precision, best.compile) == (42, "auto", None)


def test_short_is_best_in_a_fifth_of_the_epochs():
    changes = {"recipe": "short", "epochs": 12, "warmup_epochs": 2, "half_size_epochs": 6}
    changes |= {"watch_test": True}
    assert asdict(recipe("short")) == asdict(recipe("best")) | changes


def test_small_is_short_with_a_smaller_network_that_only_mirrors_its_images():
    changes = {"recipe": "small", "blocks": (1, 1, 1), "channels": (16, 32, 64), "epochs": 4}
    changes |= {"learning_rate": 0.4, "warmup_epochs": 1, "label_smoothing": 0.05}
    changes |= {"half_size_epochs": 2}
    policy = asdict(recipe("best").policy) | {"crop_padding": 0, "cutout": 0}
    assert asdict(recipe("small")) == asdict(recipe("short")) | changes | {"policy": policy}


@pytest.mark.parametrize(
    "run", ["report-seed42", "report-seed0", "best-seed42", "best-seed0", "short-seed42"]
)
def test_a_recorded_run_is_of_the_recipe_that_it_names(run):
    recorded = json.loads((RESULTS / run / "config.json").read_text(encoding="utf-8"))
    recorded = with_defaults(recorded)
    ours = json.loads(json.dumps(asdict(recipe(recorded["recipe"]))))
    fields = ours.keys() - {"seed", "precision", "compile"}  # decided for this run
    assert {name: recorded[name] for name in fields} == {name: ours[name] for name in fields}
    metrics = json.loads((RESULTS / run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["recipe"] == recorded["recipe"] and metrics["seed"] == recorded["seed"]
    assert metrics["mean"] == ours["test_mean"] and metrics["std"] == ours["test_std"]


def test_the_competitions_statistics_are_in_the_order_red_green_blue():
    assert data.KAGGLE_MEAN == (0.4765, 0.4808, 0.4958)  # bluer than CIFAR-10, which is redder
    assert data.KAGGLE_STD == (0.2303, 0.2267, 0.2268)
