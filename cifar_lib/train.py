"""The training loop, written out, and its recipes."""

import csv
import dataclasses
import math
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from cifar_lib.augment import Policy, augment, draw, random_stream
from cifar_lib.checkpoint import RunDirectory
from cifar_lib.data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    CLASSES,
    PUBLISHED_STD,
    PUBLISHED_TEST_MEAN,
    PUBLISHED_TEST_STD,
    ImageSet,
    normalize,
    stratified_split,
)
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict, summarize
from cifar_lib.hardware import autocast, choose_device, choose_precision, describe
from cifar_lib.model import ResNet, save_model

SCHEDULES = ("published", "cosine")
BLOCK = 32  # batches augmented at once: large enough to group images by operation, small enough for the cache
CHECK_EVERY = 50  # steps between two looks at a GPU's running loss, each of which waits for it


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
    schedule: str = "published"  # published: the report's value an epoch; cosine: every step, from warm-up down to 0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 2e-4
    decay_all: bool = True  # False: no weight decay on biases and batch normalisation
    label_smoothing: float = 0.05  # the report's s: s / 9 on each wrong class
    ema_decay: float = 0.0  # per step, of the averaged weights that are evaluated and kept; 0: none
    half_size_epochs: int = 0  # first epochs, never the last, on images averaged down to 16x16: a quarter of the cost
    policy: Policy = field(default_factory=Policy)
    mean: tuple[float, float, float] = CIFAR10_MEAN
    std: tuple[float, float, float] = PUBLISHED_STD
    test_mean: tuple[float, float, float] = PUBLISHED_TEST_MEAN
    test_std: tuple[float, float, float] = PUBLISHED_TEST_STD
    seed: int = 42
    precision: str = "auto"
    train_size: int | None = None  # a stratified part of the training images; None: all
    validation_size: int = 0  # of these, held out and evaluated each epoch
    watch_test: bool = True  # evaluate the test set each epoch, as the report did

    def __post_init__(self):
        checks = {
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "warmup_epochs": self.warmup_epochs >= 0,
            "schedule": self.schedule in SCHEDULES,
            "momentum": 0 <= self.momentum < 1,
            "nesterov": not self.nesterov or self.momentum > 0,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "label_smoothing": 0 <= self.label_smoothing < 1 - 1 / len(CLASSES),
            "ema_decay": 0 <= self.ema_decay < 1,
            "half_size_epochs": self.half_size_epochs >= 0,
            "mean": len(self.mean) == 3 and len(self.test_mean) == 3,
            "std": len(self.std) == 3 and len(self.test_std) == 3 and min(*self.std, *self.test_std) > 0,
            "seed": 0 <= self.seed < 2**63,
            "train_size": self.train_size is None or self.train_size >= 1,
            "validation_size": self.validation_size >= 0,
        }
        for name, good in checks.items():
            if not good:
                raise InputError(
                    f"{name}: {getattr(self, name)!r} is out of range: see TrainConfig in cifar_lib/train.py"
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
        epochs=5,
        batch_size=64,
        learning_rate=0.05,
        schedule="cosine",
        warmup_epochs=1,
        nesterov=True,
        weight_decay=5e-4,
        decay_all=False,
        half_size_epochs=4,
        policy=Policy(ops="none", erasing=0.0),
        std=CIFAR10_STD,
        test_mean=CIFAR10_MEAN,
        test_std=CIFAR10_STD,
        train_size=3600,
        validation_size=400,
        watch_test=False,
    ),
}


def recipe(name: str, **changes: object) -> TrainConfig:
    """The recipe of that name with some fields changed; `policy.<field>` reaches into the augmentation.

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
            return tuple(_parse(name, part, arguments[0]) for part in parts)  # type: ignore[union-attr]
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

    published, with peak p, E epochs, w of warm-up and e = floor(epoch): p e / w for e < w, so the first epoch is at
    0; then p (1 + cos(pi (e - 5) / (E - 5))) / 2. The report's program starts its cosine at half the warm-up: the rate
    jumps from 0.9 p to 0.98 p and the peak is never reached. cosine: linear from 0 over the warm-up (at most half the
    epochs), then p (1 + cos(pi (epoch - w) / (E - w))) / 2.
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


def smooth_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The report's loss, averaged over images: -sum w log p, w = 1 - s on the true class and s / (C - 1) on the others.

    torch spreads its smoothing over all C classes, the true one too, so the same loss has s C / (C - 1) there.
    """
    classes = logits.shape[1]
    return F.cross_entropy(logits, labels, label_smoothing=smoothing * classes / (classes - 1))


def epoch_batches(train: ImageSet, config: TrainConfig, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented, normalised float32 images (b, 3, 32, 32) and labels (b,), in the order of (seed, epoch)."""
    order = torch.randperm(len(train), generator=random_stream(config.seed, epoch, purpose=1))
    draws = draw(len(train), config.policy, config.seed, epoch)
    half_size = epoch < min(config.half_size_epochs, config.epochs - 1)
    for block in order.split(BLOCK * config.batch_size):
        part = train[block]
        images = augment(part.images, config.policy, draws[block])
        batches = zip(images.split(config.batch_size), part.labels.split(config.batch_size), strict=True)
        for batch, labels in batches:
            inputs = normalize(batch, config.mean, config.std)
            yield F.avg_pool2d(inputs, 2) if half_size else inputs, labels


@dataclass
class State:
    """What a checkpoint holds: all that changes while training."""

    model: ResNet
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    epoch: int = 0  # epochs done
    history: list[dict] = field(default_factory=list)

    @classmethod
    def new(cls, config: TrainConfig, device: torch.device, precision: str) -> "State":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = ResNet(config.blocks, config.channels, len(CLASSES))
        model = model.to(device, memory_format=torch.channels_last)
        decayed = [p for p in model.parameters() if config.decay_all or p.ndim > 1]
        exempt = [p for p in model.parameters() if not config.decay_all and p.ndim <= 1]
        groups = [{"params": decayed}, *([{"params": exempt, "weight_decay": 0.0}] if exempt else [])]
        optimizer = torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=device.type in ("cuda", "cpu"),
        )
        average = get_ema_multi_avg_fn(config.ema_decay)
        ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True) if config.ema_decay else None
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        return cls(model, optimizer, scaler, ema)

    def save(self, run: RunDirectory) -> None:
        parts = {name: getattr(self, name) for name in ("model", "optimizer", "scaler", "ema")}
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        run.save({**states, "epoch": self.epoch, "history": self.history})

    def load(self, run: RunDirectory) -> bool:
        """Go on from the run's newest whole checkpoint; False where there is none."""
        saved = run.load()
        if saved is None:
            return False
        for name in ("model", "optimizer", "scaler", "ema"):
            if name in saved:
                getattr(self, name).load_state_dict(saved[name])
        self.epoch, self.history = saved["epoch"], saved["history"]
        return True

    @property
    def final_model(self) -> nn.Module:
        """The weights that are evaluated and kept: the averaged ones where there are some."""
        return self.ema.module if self.ema is not None else self.model


def train_one_epoch(
    state: State, train: ImageSet, config: TrainConfig, precision: str, bar: tqdm
) -> tuple[float, float]:
    """One pass over `train`; returns the mean loss and the accuracy over its augmented images.

    Raises InputError, before the step that would spread it (on a GPU: within 50 steps), when the loss is not finite.
    """
    device = train.images.device
    steps = math.ceil(len(train) / config.batch_size)
    totals = torch.zeros(2, device=device)  # sum over images of the loss, and how many are right
    seen = 0
    state.model.train()
    for step, (images, labels) in enumerate(epoch_batches(train, config, state.epoch)):
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, state.epoch + step / steps)
        with autocast(device, precision):
            logits = state.model(images)
            loss = smooth_cross_entropy(logits, labels, config.label_smoothing)
        totals += torch.stack([loss.detach() * len(labels), (logits.detach().argmax(1) == labels).sum()])
        seen += len(labels)
        if device.type == "cpu" or step % CHECK_EVERY == 0 or step == steps - 1:
            _check_finite(totals, state.epoch, step)
            mean_loss, mean_accuracy = (totals / seen).tolist()
            bar.set_postfix(loss=f"{mean_loss:.3f}", accuracy=f"{mean_accuracy:.1%}", refresh=False)
        state.optimizer.zero_grad()
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.ema is not None:
            state.ema.update_parameters(state.model)
        bar.update(len(labels))
    mean_loss, mean_accuracy = (totals / seen).tolist()
    return mean_loss, mean_accuracy


def _check_finite(totals: Tensor, epoch: int, step: int) -> None:
    if not math.isfinite(totals[0].item()):
        raise InputError(
            f"training diverged: the loss is not finite at epoch {epoch}, step {step}; the last checkpoint stays: "
            "lower the learning rate (--set learning_rate=...) in a new run directory"
        )


def fit(
    config: TrainConfig,
    run_path: str | Path,
    train: ImageSet,
    test: ImageSet,
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> dict:
    """Train into a run directory, going on from its checkpoint if it has one, and evaluate; returns its metrics.json.

    A finished run is not trained again. Raises InputError where the directory holds another configuration or data.
    """
    target = choose_device(device)
    config = replace(config, precision=choose_precision(config.precision, target))
    train_part, validation = split(train.to(target), config)
    test = test.to(target)
    state = State.new(config, target, config.precision)  # what can't be built must not claim the directory
    with RunDirectory(run_path) as run:
        _claim(run, config, train.source, len(train))
        finished = run.read_json("metrics.json")
        if finished is not None:
            return finished
        run.write_json("environment.json", describe(target))
        if state.load(run):
            log(f"going on from epoch {state.epoch} of {config.epochs} in {run.path}")
        _train_epochs(state, run, config, train_part, validation, test, log)
        info = {"recipe": config.recipe, "seed": config.seed, "data": train.source}
        info |= {"epochs": config.epochs, "mean": config.test_mean, "std": config.test_std}
        save_model(run.path / "model.safetensors", state.final_model, info)
        logits, labels = _logits(state.final_model, test, config), test.labels
        metrics = {**info, "train_images": len(train_part), "test": summarize(logits, labels)}
        run.write_json("metrics.json", metrics)
        return metrics


def split(train: ImageSet, config: TrainConfig) -> tuple[ImageSet, ImageSet | None]:
    """The part of the training images that is trained on, and the validation part, if any."""
    if config.train_size is not None and config.train_size != len(train):
        if config.train_size > len(train):
            raise InputError(f"train_size: expected at most {len(train)} images, got {config.train_size}")
        _, chosen = stratified_split(train.labels, config.train_size, config.seed)
        train = train[chosen]
    if not config.validation_size:
        return train, None
    kept, held_out = stratified_split(train.labels, config.validation_size, config.seed)
    return train[kept], train[held_out]


def _claim(run: RunDirectory, config: TrainConfig, source: str, images: int) -> None:
    """Write what this run is, or check that it is this one. A field newer than the run counts as its default."""
    ours = {**asdict(config), "data": source, "images": images}
    stored = run.read_json("config.json")
    if stored is None:
        run.write_json("config.json", ours)
        return
    data = {name: stored.pop(name, None) for name in ("data", "images")}
    theirs = {**asdict(_replace(TrainConfig(), stored)), **data}
    differing = [f"{name} ({theirs[name]!r}, now {ours[name]!r})" for name in ours if theirs[name] != ours[name]]
    if differing:
        raise InputError(
            f"run directory: {run.path} holds another run; these differ: {', '.join(differing)}: "
            "choose another directory, or the same settings to go on"
        )


def _train_epochs(
    state: State,
    run: RunDirectory,
    config: TrainConfig,
    train: ImageSet,
    validation: ImageSet | None,
    test: ImageSet,
    log: Callable[[str], None],
) -> None:
    """The epochs that are left, each ending with a line, a row and a checkpoint."""
    timing = _read_timing(run, state.epoch)
    with tqdm(total=config.epochs * len(train), initial=state.epoch * len(train), unit="img", leave=False) as bar:
        while state.epoch < config.epochs:
            start = time.perf_counter()
            bar.set_description(f"epoch {state.epoch + 1}/{config.epochs}")
            loss, train_accuracy = train_one_epoch(state, train, config, config.precision, bar)
            trained = time.perf_counter() - start
            row = {"epoch": state.epoch, "learning_rate": learning_rate(config, state.epoch)}
            row |= {"train_loss": loss, "train_accuracy": train_accuracy}
            row |= _watched("validation", validation, state, config)
            row |= _watched("test", test if config.watch_test else None, state, config)
            state.history.append(row)
            state.epoch += 1
            state.save(run)
            run.write_rows("history.csv", state.history)
            seconds = time.perf_counter() - start
            timing.append({"epoch": row["epoch"], "seconds": seconds, "images_per_second": len(train) / trained})
            run.write_rows("timing.csv", timing)
            log(_line(row, timing[-1], config.epochs))
    if state.history:
        run.write_rows("history.csv", state.history)  # a kill after the last checkpoint may have left it a row short


def _read_timing(run: RunDirectory, epochs: int) -> list[dict]:
    """The rows of the epochs that the checkpoint holds."""
    path = run.path / "timing.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["epoch"]) < epochs]


def _logits(model: nn.Module, images: ImageSet, config: TrainConfig) -> Tensor:
    return predict(model, images.images, config.test_mean, config.test_std, config.precision)


def _watched(name: str, images: ImageSet | None, state: State, config: TrainConfig) -> dict[str, float | None]:
    """The columns of a set that is evaluated each epoch; empty where it isn't."""
    if images is None:
        return {f"{name}_loss": None, f"{name}_accuracy": None}
    logits, labels = _logits(state.final_model, images, config), images.labels.cpu()
    loss = smooth_cross_entropy(logits, labels, config.label_smoothing).item()
    return {f"{name}_loss": loss, f"{name}_accuracy": accuracy(logits, labels)}


def _line(row: dict, timing: dict, epochs: int) -> str:
    parts = [f"epoch {row['epoch'] + 1}/{epochs}  lr {row['learning_rate']:.4f}"]
    for name in ("train", "validation", "test"):
        if row[f"{name}_loss"] is not None:
            parts.append(f"{name} loss {row[f'{name}_loss']:.4f} acc {row[f'{name}_accuracy']:.2%}")
    return "  ".join([*parts, f"{timing['images_per_second']:.0f} img/s"])
