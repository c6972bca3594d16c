"""Recipes, how their fields are read and checked, and the learning rates."""

import json
import math
from dataclasses import asdict, astuple, replace

import pytest

from cifar_lib.errors import InputError
from cifar_lib.recipes import RECIPES, learning_rate, learning_rates, recipe


def test_report_is_the_published_run():
    config = recipe("report")
    assert astuple(config) == (
        *("report", (3, 4, 3), (66, 132, 264)),
        *(60, 128, 0.1, 10, "published"),
        *(0.9, False, 2e-4, 0.05, 0),
        (4, 0.5, "randaugment", 2, 9, 0.5, 0),
        *((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        *((0.5303, 0.4737, 0.4658), (0.2822, 0.2553, 0.2613)),
        *(42, "fp32", None, 1, None, 0, True),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_from_what_a_run_directory_records(name):
    stored = json.loads(json.dumps(asdict(RECIPES[name])))
    assert recipe("report", **stored) == RECIPES[name] == recipe(name)
    assert recipe(name).watch_test == (name == "report")


def test_text_reads_as_the_type_of_the_field():
    texts = {
        "blocks": "3",
        "channels": "(16, 32, 64)",
        "nesterov": "true",
        "watch_test": "False",
        "train_size": "none",
        "validation_size": "500",
        "learning_rate": "1e-2",
        "mean": "0.1,0.2,0.3",
        "policy.magnitude": "5",
        "policy.ops": "none",
    }
    values = {
        "blocks": (3,),
        "channels": (16, 32, 64),
        "nesterov": True,
        "watch_test": False,
        "train_size": None,
        "validation_size": 500,
        "learning_rate": 0.01,
        "mean": (0.1, 0.2, 0.3),
        "policy": replace(RECIPES["best"].policy, magnitude=5, ops="none"),
    }
    assert recipe("best", **texts) == replace(RECIPES["best"], **values)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("lr", "0.1", "lr: no such setting; got '0.1': see cifar_lib.recipes"),
        ("name", "x", "name: no such setting"),
        ("policy.strength", 1, "policy.strength: no such setting"),
        ("policy", {"strength": 1}, "policy.strength: "),
        ("policy", "strong", "policy: expected a dictionary"),
        ("policy.magnitude", "31", "policy.magnitude: expected less than or equal to 30; got '31'"),
        ("learning_rate", "fast", "learning_rate: expected a valid number, .*; got 'fast'"),
        ("learning_rate", "nan", "learning_rate: expected a finite number; got 'nan'"),
        ("learning_rate", "0", "learning_rate: expected greater than 0; got '0'"),
        ("epochs", "2.5", "epochs: expected a valid integer, .*; got '2.5'"),
        ("epochs", "1" + 9999 * "0", "epochs: .* got '10+"),
        ("batch_size", 10**18, "batch_size: expected less than 1000000; got 10+"),
        ("nesterov", "perhaps", "nesterov: expected a valid boolean, .*; got 'perhaps'"),
        ("blocks", "3,x", r"blocks.1: expected a valid integer, .*; got 'x'"),
        ("blocks", 3, "blocks: expected a valid tuple; got 3"),
        ("channels", "66,8", "channels.1: expected greater than or equal to 16; got '8'"),
        ("mean", "0.1,0.2", "mean.2: Field required"),
        ("test_mean", "0.1,0.2,inf", "test_mean.2: expected a finite number; got 'inf'"),
        ("std", "0.1,0.2,0", "std.2: expected greater than 0; got '0'"),
        ("test_std", "1,1,1,1", "test_std: Tuple should have at most 3 items"),
        ("schedule", "linear", "schedule: expected 'published' or 'cosine'; got 'linear'"),
        ("precision", "nonsense", "precision: expected 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("train_size", "many", "train_size: expected a valid integer, .*; got 'many'"),
        ("seed", -1, "seed: expected greater than or equal to 0; got -1"),
    ],
)
def test_a_field_or_value_that_does_not_fit_is_named_in_one_line(field, value, expected):
    with pytest.raises(InputError, match=f"^{expected}") as error:
        recipe("best", **{field: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


WRONG = {"crop_padding": (-1, 33), "flip": (1.1, float("nan")), "ops": ("mixup",)}
WRONG |= {"num_ops": (0, 101), "magnitude": (-1, 31), "erasing": (-0.1,), "cutout": (33,)}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_a_policy_out_of_range_is_refused_by_name(name, value):
    refused = rf"^policy.{name}: expected .*; got {value!r}: see cifar_lib.recipes$"
    with pytest.raises(InputError, match=refused):
        recipe("best", **{f"policy.{name}": value})


def test_an_unknown_recipe_is_refused_naming_the_known_ones():
    with pytest.raises(InputError, match="report, best, quick; got 'fast'"):
        recipe("fast")


def test_report_has_the_published_sixty_learning_rates():
    formula = [
        e / 10 if e < 10 else 0.5 * (1 + math.cos(math.pi * (e - 5) / 55)) for e in range(60)
    ]
    rates = learning_rates(recipe("report"))
    assert rates == pytest.approx([0.1 * f for f in formula], rel=1e-12)
    assert rates[0] == 0 and max(rates) == rates[10] == pytest.approx(0.0979746, abs=1e-7)
    assert learning_rate(recipe("report"), 12.99) == rates[12]  # constant within an epoch


def test_cosine_rises_over_the_warm_up_and_falls_to_nothing_step_by_step():
    config = recipe("report", schedule="cosine", epochs=10, warmup_epochs=2, learning_rate=0.4)
    rates = [learning_rate(config, e) for e in (0, 0.5, 1, 2, 6)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.4, 0.2])
    assert learning_rate(config, 9.999) < 1e-6
    short = replace(config, epochs=2)  # a warm-up as long as the run takes half of it
    assert [learning_rate(short, e) for e in (0.5, 1, 1.5)] == pytest.approx([0.2, 0.4, 0.2])
