"""The training that notebook 3 shows: choosing a recipe for this machine, and watching the run."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from cifar_lib import evaluate
from cifar_lib.data import ImageSet
from cifar_lib.files import write_atomically
from cifar_lib.fit import resolve
from cifar_lib.model import count_parameters
from cifar_lib.recipes import TrainConfig, recipe
from cifar_lib.train import State, Step, has_half_size, train_one_epoch
from notebooks.course import plots

CANDIDATES = ("report", "short", "small")  # what AUTO chooses from, the longest training first
AUTO = "auto"  # asks for the recipe that suits this machine
LONGEST = 12 * 60  # seconds that a training may take if nobody asked for it by name
STEPS = 16  # training steps that are timed, after the same number to warm up
PREDICTION_SPEEDUP = 3  # about how many times as fast as training prediction is, per image
TEST_IMAGES = 10_000


@dataclass(frozen=True)
class Choice:
    """The training that is chosen for this machine, and about how long it takes."""

    config: TrainConfig
    seconds: float
    why: str  # in a few words

    def summary(self, device: torch.device, images: int) -> str:
        """Return two lines: what will be trained, and how to train another recipe."""
        config = self.config
        size = f"{count_parameters(config.blocks, config.channels):,} parameters"
        epochs = f"{config.epochs} epoch{'s' if config.epochs > 1 else ''}"
        work = f"{epochs} of {config.train_size or images:,} images"
        others = " or ".join(name for name in CANDIDATES if name != config.recipe)
        return (
            f"{device_name(device)}: recipe {config.recipe} ({self.why}), {size}, {work}, "
            f"about {duration(self.seconds)}.\nSet CIFAR_RECIPE to train {others} instead."
        )


def choose(
    device: torch.device,
    train: ImageSet,
    asked: str = AUTO,
    is_begun: Callable[[TrainConfig], bool] = lambda config: False,
    seconds_needed: Callable[[TrainConfig, torch.device, ImageSet], float] | None = None,
) -> Choice:
    """Choose the recipe that notebook 3 trains on this device.

    asked: a recipe's name, or AUTO for the longest recipe that suits the kind of device and that
    takes at most LONGEST seconds, estimated from the speed of this machine.
    is_begun: returns whether a configuration has a run directory. A recipe whose run has begun is
    chosen, however long it takes, so that a second call doesn't choose another one.
    seconds_needed: estimates the time. It is `estimate_seconds`, unless a test replaces it.
    """
    seconds_needed = seconds_needed or estimate_seconds
    if asked != AUTO:
        config = recipe(asked)
        return Choice(config, seconds_needed(config, device, train), "asked for")

    names = CANDIDATES[CANDIDATES.index(longest_for(device)) :]
    for name in names:
        if is_begun(recipe(name)):
            config = recipe(name)
            return Choice(config, seconds_needed(config, device, train), "begun before")

    # Take the first recipe that is short enough, or else the last one.
    why = "the one that suits this device"
    for name in names:
        config = recipe(name)
        seconds = seconds_needed(config, device, train)
        if seconds <= LONGEST:
            break
        if name != names[-1]:
            why = f"{name} would take about {duration(seconds)}"
    return Choice(config, seconds, why)


def longest_for(device: torch.device) -> str:
    """Return the longest recipe that is worth trying on this kind of device.

    Sixty epochs are tried on CUDA GPUs of compute capability 8.0 (the A100's) or more.
    """
    if device.type == "cpu":
        return "small"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "report"
    return "short"


def estimate_seconds(config: TrainConfig, device: torch.device, train: ImageSet) -> float:
    """Return about how long a run takes, estimated from a few steps on this machine."""
    n = min(config.train_size or len(train), len(train))
    sizes = [has_half_size(config, epoch) for epoch in range(config.epochs)]
    rates = {size: images_per_second(config, device, train, size) for size in set(sizes)}
    seconds = sum(n / rates[size] for size in sizes)
    predicted = TEST_IMAGES * (config.epochs if config.watch_test else 1)
    return seconds + predicted / (PREDICTION_SPEEDUP * rates[False])


def images_per_second(
    config: TrainConfig, device: torch.device, train: ImageSet, half_size: bool
) -> float:
    """Return the speed of training with augmentation, measured on a new, uncompiled network."""
    config = resolve(replace(config, compile=False), device, len(train))
    # Epoch 0 is measured. It can see half-size images only if it isn't the last epoch.
    half_size_epochs = 1 if half_size else 0
    config = replace(config, epochs=max(config.epochs, 2), half_size_epochs=half_size_epochs)
    step = Step(State(config, device))
    some = train[: STEPS * config.batch_size].to(device)
    train_one_epoch(step, some, epoch=0)  # the first steps are slow: memory, kernels, caches

    # An epoch ends by reading its loss, which waits until a GPU has done all of its work.
    begin = time.perf_counter()
    train_one_epoch(step, some, epoch=0)
    return len(some) / (time.perf_counter() - begin)


def device_name(device: torch.device) -> str:
    """Return the device's usual name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return {"cpu": "CPU", "mps": "Apple GPU"}.get(device.type, device.type)


def duration(seconds: float) -> str:
    """Return seconds as text with a sensible unit."""
    if seconds < 90:
        return f"{max(round(seconds / 5) * 5, 5)} seconds"
    if seconds < 90 * 60:
        return f"{math.ceil(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"


class Watch:
    """A callback for `fit` that classifies a few images after each epoch, and draws the run so far.

    The predicted probabilities are kept in `watched.json` in the run's directory, so that a resumed
    or finished run is drawn from its first epoch. Epochs that were trained without a watch have no
    probabilities.
    """

    def __init__(
        self, run: Path, epochs: int, images: ImageSet, show: Callable[[Figure], None], **how
    ):
        """Watch the run in this directory, of `epochs` epochs.

        images: a few labelled test images.
        show: called with a figure after each epoch.
        how: the other arguments of `evaluate.predict`, such as `normalization`.
        """
        self.path, self.epochs, self.images = run / "watched.json", epochs, images
        self.show, self.how = show, how

    def __call__(self, model: nn.Module, history: list[dict]) -> None:
        """Classify the images after the last epoch of `history`, and draw."""
        logits = evaluate.predict(model, self.images.images, **self.how)
        before = self._answers()[: len(history) - 1]
        unknown = torch.full_like(logits, math.nan).tolist()
        missing = [unknown] * (len(history) - 1 - len(before))
        answers = [*before, *missing, logits.softmax(1).tolist()]
        write_atomically(self.path, json.dumps(answers).encode())
        self.show(self.figure(pd.DataFrame(history)))

    def figure(self, history: pd.DataFrame) -> Figure:
        """Draw the accuracy by epoch, and beside it the images with the network's answers.

        history: the rows of history.csv so far.
        """
        answers = np.array(self._answers())  # (epochs so far, n, 10)
        return plots.live_run(history, self.epochs, self.images, answers)

    def _answers(self) -> list:
        """Return the probabilities after each epoch so far, as nested lists (epochs, n, 10)."""
        if not self.path.exists():
            return []
        return json.loads(self.path.read_text(encoding="utf-8"))
