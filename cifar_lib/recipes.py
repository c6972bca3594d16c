"""What is trained and how: TrainConfig, its recipes, and the learning rate."""

import dataclasses
import math
import typing
from dataclasses import dataclass, field, fields, replace

from cifar_lib.augment import Policy
from cifar_lib.data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    CLASSES,
    PUBLISHED_STD,
    PUBLISHED_TEST_MEAN,
    PUBLISHED_TEST_STD,
)
from cifar_lib.errors import InputError

SCHEDULES = ("published", "cosine")


@dataclass(frozen=True)
class TrainConfig:
    """What is trained and how. The defaults are the published run, quirks included."""

    recipe: str = "report"
    blocks: tuple[int, ...] = (3, 4, 3)
    channels: tuple[int, ...] = (66, 132, 264)
    epochs: int = 60
    batch_size: int = 128  # the last batch of an epoch takes what is left
    learning_rate: float = 0.1  # the peak
    warmup_epochs: int = 10
    schedule: str = "published"  # published: the report's, by epoch; cosine: by step, down to 0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 2e-4
    decay_all: bool = True  # False: no weight decay on biases and batch normalisation
    label_smoothing: float = 0.05  # the report's s: s / 9 on each wrong class
    ema_decay: float = 0.0  # per step, of the averaged weights that are evaluated and kept; 0: none
    half_size_epochs: int = 0  # first epochs, never the last, at 16x16: a quarter of the cost
    policy: Policy = field(default_factory=Policy)
    mean: tuple[float, float, float] = CIFAR10_MEAN
    std: tuple[float, float, float] = PUBLISHED_STD
    test_mean: tuple[float, float, float] = PUBLISHED_TEST_MEAN
    test_std: tuple[float, float, float] = PUBLISHED_TEST_STD
    seed: int = 42
    precision: str = "auto"
    compile: bool | None = None  # torch.compile; None: on a GPU, for runs that are worth it
    ranks: int = 1  # processes that share each batch; set by torchrun
    train_size: int | None = None  # a stratified part of the training images; None: all
    validation_size: int = 0  # of these, held out and evaluated each epoch
    watch_test: bool = True  # evaluate the test set each epoch, as the report did

    def __post_init__(self):
        checks = {
            # below 16, oneDNN's 1x1 convolutions with a stride write past their memory
            # (uxlfoundation/oneDNN#6035)
            "channels": min(self.channels, default=0) >= 16,
            "epochs": 1 <= self.epochs < 10**6,
            "batch_size": 1 <= self.batch_size < 10**6,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "warmup_epochs": self.warmup_epochs >= 0,
            "schedule": self.schedule in SCHEDULES,
            "momentum": 0 <= self.momentum < 1,
            "nesterov": not self.nesterov or self.momentum > 0,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "label_smoothing": 0 <= self.label_smoothing < 1 - 1 / len(CLASSES),
            "ema_decay": 0 <= self.ema_decay < 1,
            "half_size_epochs": self.half_size_epochs >= 0,
            "mean": all(
                len(mean) == 3 and all(map(math.isfinite, mean))
                for mean in (self.mean, self.test_mean)
            ),
            "std": all(
                len(std) == 3 and all(0 < value < math.inf for value in std)
                for std in (self.std, self.test_std)
            ),
            "ranks": self.ranks >= 1,
            "seed": 0 <= self.seed < 2**32,
            "train_size": self.train_size is None or self.train_size >= 1,
            "validation_size": self.validation_size >= 0,
        }
        for name, good in checks.items():
            if not good:
                raise InputError(
                    f"{name}: {getattr(self, name)!r} is out of range: see TrainConfig in "
                    "cifar_lib/recipes.py"
                )


RECIPES = {
    "report": TrainConfig(),
    "best": TrainConfig(
        recipe="best",
        schedule="cosine",
        warmup_epochs=5,
        nesterov=True,
        weight_decay=5e-4,
        decay_all=False,
        ema_decay=0.999,
        policy=Policy(num_ops=1, erasing=0.25),
        std=CIFAR10_STD,
        test_mean=CIFAR10_MEAN,
        test_std=CIFAR10_STD,
        watch_test=False,
    ),
    "quick": TrainConfig(
        recipe="quick",
        epochs=4,
        batch_size=32,
        learning_rate=0.05,
        schedule="cosine",
        warmup_epochs=1,
        nesterov=True,
        weight_decay=5e-4,
        decay_all=False,
        half_size_epochs=3,
        policy=Policy(ops="none", erasing=0.0),
        std=CIFAR10_STD,
        test_mean=CIFAR10_MEAN,
        test_std=CIFAR10_STD,
        train_size=1200,
        validation_size=200,
        watch_test=False,
    ),
}


def recipe(name: str, /, **changes: object) -> TrainConfig:
    """The recipe of that name with some fields changed; `policy.<field>` reaches into the
    augmentation.

    Values may be of the field's type or text that reads as one ("0.1", "true", "3,4,3", "none").
    Raises InputError for an unknown recipe or field, or a value that doesn't fit.
    """
    if name not in RECIPES:
        raise InputError(f"recipe: expected one of {', '.join(RECIPES)}; got {name!r}")
    config = RECIPES[name]
    flat = {k: v for k, v in changes.items() if not k.startswith("policy.")}
    nested = {k.removeprefix("policy."): v for k, v in changes.items() if k.startswith("policy.")}
    if nested:
        flat["policy"] = _replace(config.policy, nested, "policy.")
    return _replace(config, flat)


def _replace(config: typing.Any, changes: dict[str, object], prefix: str = "") -> typing.Any:
    types = typing.get_type_hints(type(config))
    for name in changes:
        if name not in types:
            known = ", ".join(prefix + f.name for f in fields(config))
            raise InputError(f"unknown field {prefix}{name}: expected one of {known}")
    values = {name: _parse(prefix + name, value, types[name]) for name, value in changes.items()}
    return replace(config, **values)


def _parse(name: str, value: object, kind: typing.Any) -> object:
    """`value` as `kind`, from text where it is text, from JSON's lists where `kind` is a tuple."""
    arguments = typing.get_args(kind)
    try:
        if type(None) in arguments:
            missing = value is None or (isinstance(value, str) and value.lower() == "none")
            return None if missing else _parse(name, value, arguments[0])
        if typing.get_origin(kind) is tuple:
            parts = value.strip("()[] ").split(",") if isinstance(value, str) else value
            return tuple(_parse(name, part, arguments[0]) for part in parts)
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False, "1": True, "0": False}[value.strip().lower()]
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            return _replace(kind(), value, name + ".")
        if isinstance(value, str) and kind in (int, float):
            return kind(value)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is kind:
            return value
    except (ValueError, KeyError, TypeError):
        pass
    text = kind.__name__ if isinstance(kind, type) else str(kind)
    raise InputError(f"{name}: expected a value of type {text}; got {value!r}")


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """The learning rate at `epoch` (0-based; the fraction is the part of it that is done).

    published, with peak p, E epochs, w of warm-up and e = floor(epoch): p e / w for e < w, so the
    first epoch is at 0; then p (1 + cos(pi (e - 5) / (E - 5))) / 2. The report's program starts its
    cosine at half the warm-up: the rate jumps from 0.9 p to 0.98 p and the peak is never reached.
    cosine: linear from 0 over the warm-up (at most half the epochs), then p (1 + cos(pi (epoch - w)
    / (E - w))) / 2.
    """
    peak, warmup, total = config.learning_rate, config.warmup_epochs, config.epochs
    if config.schedule == "published":
        epoch = math.floor(epoch)
        start = warmup / 2
    else:
        start = warmup = min(warmup, total / 2)
    if epoch < warmup:
        return peak * epoch / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - start) / max(total - start, 1)))


def learning_rates(config: TrainConfig) -> list[float]:
    """The learning rate at the start of each epoch."""
    return [learning_rate(config, epoch) for epoch in range(config.epochs)]
