"""Recipes, how their fields are read and checked, and the learning rates."""

import json
import math
from dataclasses import asdict, astuple, replace

import pytest

from cifar_lib.data import Normalization
from cifar_lib.errors import InputError
from cifar_lib.recipes import RECIPES, learning_rate, learning_rates, recipe, with_defaults

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
TEST_MEAN, TEST_STD = (0.5303, 0.4737, 0.4658), (0.2822, 0.2553, 0.2613)


def test_report_is_the_published_run():
    config = recipe("report")
    assert astuple(config) == (
        *("report", (3, 4, 3), (66, 132, 264)),
        *(60, 128, 0.1, 10, "published"),
        *(0.9, False, 2e-4, 0.05, 0, 0),
        (4, 0.5, False, "randaugment", 1, 2, 9, 0.5, 0),
        *(MEAN, STD, TEST_MEAN, TEST_STD),
        *(42, "fp32", None, None, 0, True),
    )
    assert config.training_normalization == Normalization(MEAN, STD)
    assert config.test_normalization == Normalization(TEST_MEAN, TEST_STD)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_from_what_a_run_directory_records(name):
    stored = json.loads(json.dumps(asdict(RECIPES[name])))
    assert recipe("report", **stored) == RECIPES[name] == recipe(name)
    assert recipe(name).watch_test == (name != "best")
    if name != "report":  # training and predicting alike
        assert recipe(name).training_normalization == recipe(name).test_normalization


def test_a_stored_configuration_of_an_earlier_version_gets_the_defaults_that_it_lacks():
    stored = json.loads(json.dumps(asdict(RECIPES["best"])))
    earlier = stored | {"policy": dict(stored["policy"]), "ranks": 1, "data": "CIFAR-10"}
    del earlier["ema_decay"], earlier["policy"]["ops_probability"]
    assert with_defaults(earlier) == stored | {"ranks": 1, "data": "CIFAR-10"}
    assert with_defaults({"policy": 1})["policy"] == 1  # which then differs from any other run's


def test_text_reads_as_the_type_of_the_field():
    read = {
        "blocks": ("3", (3,)),
        "channels": ("(16)", (16,)),
        "nesterov": ("true", True),
        "watch_test": ("False", False),
        "train_size": ("none", None),
        "compile": ("None", None),
        "validation_size": ("500", 500),
        "learning_rate": ("1e-2", 0.01),
        "mean": ("0.1,0.2,0.3", (0.1, 0.2, 0.3)),
    }
    texts = {field: text for field, (text, _) in read.items()}
    config = recipe("best", **texts, **{"policy.magnitude": "5", "policy.flip": "0"})
    expected = {field: value for field, (_, value) in read.items()}
    expected["policy"] = replace(RECIPES["best"].policy, magnitude=5, flip=0)
    assert config == replace(RECIPES["best"], **expected)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("lr", "0.1", "lr: no such setting; got '0.1': see cifar_lib/recipes\.py$"),
        ("name", "x", "name: no such setting"),
        ("policy.strength", 1, "policy.strength: no such setting"),
        ("policy", {"strength": 1}, "policy.strength: "),
        ("policy", "strong", "policy: expected a dictionary"),
        ("learning_rate", "nan", "learning_rate: expected a finite number; got 'nan'"),
        ("learning_rate", "0", "learning_rate: expected a value greater than 0; got '0'"),
        ("momentum", "1", "momentum: expected a value less than 1; got '1'"),
        ("momentum", 0, "nesterov: expected a momentum above 0, got 0: set a momentum, or switch"),
        (
            "weight_decay",
            -1e-4,
            "weight_decay: expected a value greater than or equal to 0; got -0.0001",
        ),
        ("label_smoothing", 0.9, "label_smoothing: expected a value less than 0.9; got 0.9"),
        ("epochs", "2.5", "epochs: expected a valid integer, .*; got '2.5'"),
        ("epochs", "1" + 9999 * "0", "epochs: .* got '10+"),
        ("epochs", 0, "epochs: expected a value greater than or equal to 1; got 0"),
        ("warmup_epochs", -1, "warmup_epochs: expected a value greater than or equal to 0; got -1"),
        ("batch_size", 10**6, "batch_size: expected a value less than 1000000; got 10+"),
        (
            "half_size_epochs",
            10**6,
            "half_size_epochs: expected a value less than 1000000; got 10+",
        ),
        ("nesterov", "perhaps", "nesterov: expected a valid boolean, .*; got 'perhaps'"),
        ("ema_decay", 1, "ema_decay: expected a value less than 1; got 1"),
        (
            "policy.ops_probability",
            2,
            "policy.ops_probability: expected a value less than or equal to 1",
        ),
        ("policy.alternating_flip", "maybe", "policy.alternating_flip: expected a valid boolean"),
        ("blocks", 3, "blocks: expected a valid tuple; got 3"),
        ("blocks", "3,3", "blocks and channels: expected a whole number of each"),
        ("channels", "66,15", "channels.1: expected a value greater than or equal to 16; got '15'"),
        ("test_mean", "0.1,0.2,inf", "test_mean.2: expected a finite number; got 'inf'"),
        ("std", "0.1,0.2,0", "std.2: expected a value greater than or equal to 0.001; got '0'"),
        ("std", "0.1,0.2", "std: Tuple should have at least 3 items"),
        ("test_std", "1,1,1,1", "test_std: Tuple should have at most 3 items"),
        ("schedule", "linear", "schedule: expected 'published' or 'cosine'; got 'linear'"),
        ("precision", "nonsense", "precision: expected 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("train_size", 0, "train_size: expected a value greater than or equal to 1; got 0"),
        ("seed", -1, "seed: expected a value greater than or equal to 0; got -1"),
        ("seed", 2**32, "seed: expected a value less than 4294967296; got 4294967296"),
        (
            "policy.crop_padding",
            -1,
            "policy.crop_padding: .*; got -1: see cifar_lib/augment\.py$",
        ),
        (
            "policy.crop_padding",
            33,
            "policy.crop_padding: expected a value less than or equal to 32",
        ),
        ("policy.flip", 1.1, "policy.flip: expected a value less than or equal to 1; got 1.1"),
        ("policy.flip", math.nan, "policy.flip: expected a finite number; got nan"),
        ("policy.ops", "mixup", "policy.ops: expected 'none', 'randaugment', .*; got 'mixup'"),
        ("policy.num_ops", 0, "policy.num_ops: expected a value greater than or equal to 1; got 0"),
        (
            "policy.num_ops",
            101,
            "policy.num_ops: expected a value less than or equal to 100; got 101",
        ),
        (
            "policy.magnitude",
            "31",
            "policy.magnitude: expected a value less than or equal to 30; got '31'",
        ),
        (
            "policy.magnitude",
            -1,
            "policy.magnitude: expected a value greater than or equal to 0; got -1",
        ),
        (
            "policy.erasing",
            -0.1,
            "policy.erasing: expected a value greater than or equal to 0; got -0.1",
        ),
        ("policy.cutout", 33, "policy.cutout: expected a value less than or equal to 32; got 33"),
    ],
)
def test_a_field_or_value_that_does_not_fit_is_named_in_one_line(field, value, expected):
    with pytest.raises(InputError, match=f"^{expected}") as error:
        recipe("best", **{field: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_the_ends_of_each_range_are_taken():
    ends = {"momentum": 0, "nesterov": False, "weight_decay": 0, "label_smoothing": 0, "epochs": 1}
    ends |= {"warmup_epochs": 0, "batch_size": 999_999, "seed": 2**32 - 1, "train_size": 1}
    policies = (
        {"crop_padding": 0, "flip": 0, "num_ops": 1, "magnitude": 0, "erasing": 0, "cutout": 0},
        {
            "crop_padding": 32,
            "flip": 1,
            "num_ops": 100,
            "magnitude": 30,
            "erasing": 1,
            "cutout": 32,
        },
    )
    for policy in policies:
        assert asdict(recipe("best", **ends, policy=policy).policy).items() >= policy.items()


def test_an_unknown_recipe_is_refused_naming_the_known_ones():
    with pytest.raises(
        InputError, match="^recipe: expected .* report, best, short, small; got 'fast'"
    ):
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
    single = replace(config, epochs=1)  # so does half of the only epoch
    assert [learning_rate(single, e) for e in (0.25, 0.5, 0.75)] == pytest.approx([0.2, 0.4, 0.2])
    assert learning_rate(single, 0.9999) < 1e-6
