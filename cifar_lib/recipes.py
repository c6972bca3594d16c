"""What is trained and how: the configuration, the recipes, the learning rate."""

import json
import math
import re
import reprlib
from dataclasses import asdict, replace
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from cifar_lib import data
from cifar_lib.augment import Policy, checked
from cifar_lib.data import Normalization
from cifar_lib.errors import InputError
from cifar_lib.hardware import PRECISIONS
from cifar_lib.model import NARROWEST, Mean, Std, check_shape

# Values may come as text from the command line: "3,4,3" or "(3, 4, 3)" becomes a list, and "none"
# becomes None where a field may be None.
Split = BeforeValidator(lambda v: v.strip("()[] ").split(",") if isinstance(v, str) else v)
OrNone = BeforeValidator(lambda v: None if isinstance(v, str) and v.lower() == "none" else v)
# Ranges that several fields share.
Count = Annotated[int, Field(ge=0, lt=10**6)]
Positive = Annotated[int, Field(ge=1, lt=10**6)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[int, Field(ge=NARROWEST)]


@checked
class TrainConfig:
    """What is trained and how. The defaults are the published run's, quirks included."""

    recipe: str = "report"  # the recipe's name, which stays if fields are changed
    # how many blocks, and how many channels, each stage of the network has
    blocks: Annotated[tuple[int, ...], Split] = (3, 4, 3)
    channels: Annotated[tuple[Width, ...], Field(min_length=1), Split] = (66, 132, 264)
    epochs: Positive = 60
    batch_size: Positive = 128  # the last batch of an epoch takes what is left
    learning_rate: Annotated[float, Field(gt=0)] = 0.1  # the peak of the schedule
    warmup_epochs: Count = 10
    # published: the report's, which changes once per epoch; cosine: changes each step, ends near 0
    schedule: Literal["published", "cosine"] = "published"
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 2e-4
    # s in the report's definition: each of the nine wrong classes gets s / 9
    label_smoothing: Annotated[float, Field(ge=0, lt=1 - 1 / len(data.CLASSES))] = 0.05
    # how many epochs at the start see 16x16 images, at a quarter of the cost; the last epoch always
    # sees 32x32 images
    half_size_epochs: Count = 0
    # d in the moving average of the weights: after each step the average becomes
    # d * average + (1 - d) * weights, and the run ends with the average as its weights; 0: none
    ema_decay: Fraction = 0.0
    policy: Policy = Policy()  # the augmentation
    mean: Annotated[Mean, Split] = data.CIFAR10_MEAN  # what training images are normalised with
    std: Annotated[Std, Split] = data.PUBLISHED_STD
    # what images to be predicted are normalised with
    test_mean: Annotated[Mean, Split] = data.PUBLISHED_TEST_MEAN
    test_std: Annotated[Std, Split] = data.PUBLISHED_TEST_STD
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    precision: Literal[PRECISIONS] = "fp32"  # auto: bf16 or fp16, where the hardware is fast at it
    # whether to use torch.compile; None: on a GPU, for runs that are long enough to gain from it
    compile: Annotated[bool | None, OrNone] = None
    # how many training images to take, in the same class mix; None: all
    train_size: Annotated[Positive | None, OrNone] = None
    validation_size: Count = 0  # how many of those are held out, and evaluated each epoch
    watch_test: bool = True  # evaluate the test set each epoch, as the report did

    @model_validator(mode="after")
    def _fields_go_together(self) -> "TrainConfig":
        """Check fields against each other, after pydantic has checked each one alone.

        Raises InputError if they don't go together.
        """
        check_shape(self.blocks, self.channels)
        if self.nesterov and not self.momentum:
            remedy = "set a momentum, or switch nesterov off"
            raise InputError(f"nesterov: expected a momentum above 0, got 0: {remedy}")
        return self

    @property
    def training_normalization(self) -> Normalization:
        """How training images are normalised."""
        return Normalization(self.mean, self.std)

    @property
    def test_normalization(self) -> Normalization:
        """How images are normalised before their classes are predicted."""
        return Normalization(self.test_mean, self.test_std)


REPORT = TrainConfig()
# The schedule, Nesterov momentum, weight decay, smoothing and augmentation are taken from
# davdcharizard/autoresearch-cifar10, whose search chose them by the accuracy on CIFAR-10's test
# images. There, one run of 65 epochs at a learning rate of 0.2 reached
# 96.05 % with a nearly identical network (blocks 3, 3, 3; channels 64, 128, 256). This number
# is the test accuracy of that run's best epoch. The runs of this package are scored after their
# last epoch.
BEST = replace(
    REPORT,
    recipe="best",
    schedule="cosine",
    warmup_epochs=5,
    nesterov=True,
    weight_decay=5e-4,
    label_smoothing=0.09,  # this is 0.1 in PyTorch's definition
    policy=Policy(ops="none", erasing=0.0, cutout=16),
    std=data.CIFAR10_STD,
    test_mean=data.CIFAR10_MEAN,
    test_std=data.CIFAR10_STD,
    precision="auto",
    watch_test=False,
)
# The network of `best` in a fifth of the epochs, for GPUs on which sixty epochs would take hours.
# Like `small`, it sees half-size images in the first half of its epochs.
SHORT = replace(
    BEST, recipe="short", epochs=12, warmup_epochs=2, half_size_epochs=6, watch_test=True
)
# A network with one block per stage, for a CPU: all images in a minute or two. Its values were
# chosen on a validation split, by accuracy per second (results/LOG.md, 2026-11-29). In so
# short a run, all augmentation except mirroring costs accuracy.
SMALL = replace(
    SHORT,
    recipe="small",
    blocks=(1, 1, 1),
    channels=(16, 32, 64),
    epochs=4,
    learning_rate=0.4,
    warmup_epochs=1,
    label_smoothing=0.05,
    half_size_epochs=2,
    policy=Policy(crop_padding=0, ops="none", erasing=0.0),
)
RECIPES = {config.recipe: config for config in (REPORT, BEST, SHORT, SMALL)}


def recipe(name: str, /, **changes: object) -> TrainConfig:
    """Return the recipe called `name`, with some fields changed.

    `policy.<field>` changes a field of the augmentation. A value has the field's type, or is text
    that stands for such a value ("0.1", "true", "3,4,3", "none").

    Raises InputError for an unknown recipe or field, and for a value that doesn't fit.
    """
    if name not in RECIPES:
        raise InputError(f"recipe: expected one of {', '.join(RECIPES)}; got {name!r}")

    # Separate the changes of the augmentation from the others.
    prefixed = {field for field in changes if field.startswith("policy.")}
    policy_changes = {field.removeprefix("policy."): changes.pop(field) for field in prefixed}

    # pydantic checks the values, and makes a Policy from the dict. The first error that it finds is
    # reported, in one line.
    try:
        config = replace(RECIPES[name], **changes)
        return replace(config, policy=asdict(config.policy) | policy_changes)
    except ValidationError as error:
        wrong = error.errors()[0]
        if not wrong["loc"]:  # no single field is wrong: `_fields_go_together` has raised it
            raise wrong["ctx"]["error"] from None
        field = ".".join(map(str, wrong["loc"]))
        reason = wrong["msg"].replace("Input should be", "expected")
        reason = re.sub("expected (greater|less)", r"expected a value \1", reason)
        reason = reason.replace("Unexpected keyword argument", "no such setting")
        got = reprlib.repr(wrong["input"])
        where = "augment" if field.startswith("policy") else "recipes"
        raise InputError(f"{field}: {reason}; got {got}: see cifar_lib/{where}.py") from None


def with_defaults(stored: dict) -> dict:
    """Return a run's config.json, with the fields added that its version didn't have yet.

    They get their defaults: the default of a new field always means what versions without the field
    did. All other fields stay, even those that no version has.
    """
    defaults = json.loads(json.dumps(asdict(REPORT)))  # tuples become lists, as in the file
    complete = defaults | stored
    if isinstance(complete["policy"], dict):  # a damaged file may hold anything here
        complete["policy"] = defaults["policy"] | complete["policy"]
    return complete


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """Return the learning rate at `epoch`.

    Epochs are counted from 0, and a fraction says how far the epoch has come: 2.5 is the middle of
    the third one. Below, e is the epoch, E the number of epochs, w the number of warm-up epochs and
    p the peak. During warm-up, while e < w, the rate is p * e / w under both schedules.

    published: e is rounded down, so the rate changes once per epoch. After warm-up it is
    p * (1 + cos(pi * (e - w/2) / (E - w/2))) / 2. The report's program counts the cosine from the
    middle of the warm-up. With its w = 10 and E = 60, the rate jumps from 0.9 p to 0.98 p, and
    never reaches the peak.

    cosine: the rate changes each step. After warm-up it is
    p * (1 + cos(pi * (e - w) / (E - w))) / 2. A w above E / 2 counts as E / 2.
    """
    peak, warmup, total = config.learning_rate, config.warmup_epochs, config.epochs

    # Find the epoch from which the cosine counts, where it would be at the peak.
    if config.schedule == "published":
        epoch = math.floor(epoch)
        start = warmup / 2
    else:
        start = warmup = min(warmup, total / 2)

    # A straight line up, then half a cosine down.
    if epoch < warmup:
        return peak * epoch / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - start) / (total - start)))


def learning_rates(config: TrainConfig) -> list[float]:
    """Return the learning rate at the start of each epoch."""
    return [learning_rate(config, epoch) for epoch in range(config.epochs)]
