"""What is trained and how: the configuration, the recipes, the learning rate."""

import math
import reprlib
from dataclasses import asdict, replace
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from cifar_lib import data
from cifar_lib.augment import Policy, checked
from cifar_lib.data import Normalization
from cifar_lib.errors import InputError
from cifar_lib.hardware import PRECISIONS
from cifar_lib.model import check_shape

# How text reads: "3,4,3" or "(3, 4, 3)", and "none" where a field may be None.
Split = BeforeValidator(lambda v: v.strip("()[] ").split(",") if isinstance(v, str) else v)
OrNone = BeforeValidator(lambda v: None if isinstance(v, str) and v.lower() == "none" else v)
# The ranges of more than one field.
Count = Annotated[int, Field(ge=0, lt=10**6)]
Positive = Annotated[int, Field(ge=1, lt=10**6)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Mean = Annotated[tuple[float, float, float], Split]
Std = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=3, max_length=3), Split]
# Below 16, oneDNN's 1x1 convolutions write past their memory (uxlfoundation/oneDNN#6035).
Width = Annotated[int, Field(ge=16)]


@checked
class TrainConfig:
    """What is trained and how. The defaults are the published run, quirks included."""

    recipe: str = "report"
    blocks: Annotated[tuple[int, ...], Split] = (3, 4, 3)
    channels: Annotated[tuple[Width, ...], Field(min_length=1), Split] = (66, 132, 264)
    epochs: Positive = 60
    batch_size: Positive = 128  # the last batch of an epoch takes what is left
    learning_rate: Annotated[float, Field(gt=0)] = 0.1  # the peak
    warmup_epochs: Count = 10
    # published: the report's, by epoch; cosine: by step, down to 0
    schedule: Literal["published", "cosine"] = "published"
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 2e-4
    # the report's s: s / 9 on each wrong class
    label_smoothing: Annotated[float, Field(ge=0, lt=1 - 1 / len(data.CLASSES))] = 0.05
    half_size_epochs: Count = 0  # first epochs, never the last, at 16x16: a quarter of the cost
    policy: Policy = Policy()
    mean: Mean = data.CIFAR10_MEAN  # by which training images are normalised
    std: Std = data.PUBLISHED_STD
    test_mean: Mean = data.PUBLISHED_TEST_MEAN  # and those that are predicted
    test_std: Std = data.PUBLISHED_TEST_STD
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    precision: Literal[PRECISIONS] = "fp32"  # auto: half, where the hardware is good for it
    # torch.compile; None: on a GPU, for runs that are worth it
    compile: Annotated[bool | None, OrNone] = None
    train_size: Annotated[Positive | None, OrNone] = None  # a stratified part; None: all images
    validation_size: Count = 0  # of these, held out and evaluated each epoch
    watch_test: bool = True  # evaluate the test set each epoch, as the report did

    @model_validator(mode="after")
    def _fields_go_together(self) -> "TrainConfig":
        check_shape(self.blocks, self.channels)
        if self.nesterov and not self.momentum:
            raise InputError("nesterov: expected a momentum above 0, got 0: set both or neither")
        return self

    @property
    def normalization(self) -> Normalization:
        """How training images are normalised."""
        return Normalization(self.mean, self.std)

    @property
    def test_normalization(self) -> Normalization:
        """How images are normalised to predict them."""
        return Normalization(self.test_mean, self.test_std)


REPORT = TrainConfig()
# Values that brought a nearly identical network (blocks 3, 3, 3; 64, 128, 256 channels) to 96.05 %
# in 65 epochs, at rate 0.2: davdcharizard/autoresearch-cifar10, one run.
BEST = replace(
    REPORT,
    recipe="best",
    schedule="cosine",
    warmup_epochs=5,
    nesterov=True,
    weight_decay=5e-4,
    label_smoothing=0.09,  # 0.1 in PyTorch's definition
    policy=Policy(ops="none", erasing=0.0, cutout=16),
    std=data.CIFAR10_STD,
    test_mean=data.CIFAR10_MEAN,
    test_std=data.CIFAR10_STD,
    precision="auto",
    watch_test=False,
)
QUICK = replace(
    BEST,
    recipe="quick",
    epochs=4,
    batch_size=32,
    learning_rate=0.05,
    warmup_epochs=1,
    label_smoothing=0.05,
    half_size_epochs=3,
    policy=Policy(ops="none", erasing=0.0),
    train_size=1200,
    validation_size=200,
)
RECIPES = {config.recipe: config for config in (REPORT, BEST, QUICK)}


def recipe(name: str, /, **changes: object) -> TrainConfig:
    """Return the recipe of that name with some fields changed.

    `policy.<field>` reaches into the augmentation. Values may be of the field's type, or text that
    reads as one ("0.1", "true", "3,4,3", "none").

    Raises InputError for an unknown recipe or field, and for a value that doesn't fit.
    """
    if name not in RECIPES:
        raise InputError(f"recipe: expected one of {', '.join(RECIPES)}; got {name!r}")
    inner = {field for field in changes if field.startswith("policy.")}
    policy = {field.removeprefix("policy."): changes.pop(field) for field in inner}
    try:
        config = replace(RECIPES[name], **changes)
        return replace(config, policy=asdict(config.policy) | policy)
    except ValidationError as error:
        wrong = error.errors()[0]
        if not wrong["loc"]:  # fields that don't go together
            raise wrong["ctx"]["error"] from None
        field = ".".join(map(str, wrong["loc"]))
        reason = wrong["msg"].replace("Input should be", "expected")
        reason = reason.replace("Unexpected keyword argument", "no such setting")
        got = reprlib.repr(wrong["input"])
        raise InputError(f"{field}: {reason}; got {got}: see {TrainConfig.__module__}") from None


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """Return the learning rate at `epoch`, counted from 0; its fraction is the part that is done.

    Below, p is the peak, E the number of epochs and w that of warm-up.

    published: by whole epochs e: p e / w for e < w, then p (1 + cos(pi (e - w/2) / (E - w/2))) / 2.
    The report's program starts its cosine at half the warm-up, so the rate jumps from 0.9 p to
    0.98 p, and the peak is never reached.

    cosine: step by step, linear over the warm-up (at most half the epochs), then
    p (1 + cos(pi (epoch - w) / (E - w))) / 2.
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
    """Return the learning rate at the start of each epoch."""
    return [learning_rate(config, epoch) for epoch in range(config.epochs)]
