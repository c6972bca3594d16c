"""A run: from a recipe and CIFAR-10 to a run directory with weights, history and metrics."""

import contextlib
import csv
import hashlib
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cifar_lib import ranks
from cifar_lib.checkpoint import RunDirectory
from cifar_lib.data import ImageSet, check_labels, stratified_split
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict, summarize
from cifar_lib.hardware import choose_device, choose_precision, describe, prepare
from cifar_lib.model import PRETRAINED, SHIPPED, ResNet, load_model, save_model
from cifar_lib.recipes import TrainConfig, learning_rate, recipe
from cifar_lib.shift import rebase_batch_norm
from cifar_lib.train import State, Step, epoch_plan, smooth_cross_entropy, train_one_epoch

MANY_STEPS = 2000  # from here on minutes of compiling pay for themselves on a GPU
REBASED_ON = 5000  # training images, at most, whose statistics the weights are written with


def fit(
    config: TrainConfig,
    run_path: str | Path,
    train: ImageSet,
    test: ImageSet,
    device: str = "auto",
    log: Callable[[str], None] = print,
    start: str | Path | None = None,
) -> dict:
    """Train into a run directory, going on from its checkpoint if it has one, and evaluate; returns
    its metrics.json.

    `start`: a file of weights to begin with, or `pretrained`; None: random ones. A finished run is
    not trained again. Where `ranks.join` met other processes, all of them train this run and the
    first one writes. Raises InputError where the directory holds another configuration or data, or
    labels are missing.
    """
    check_labels(train)
    check_labels(test)
    target = choose_device(device)
    part, validation = split(train.to(target), config)
    config = resolve(config, target, len(part))
    weights, digest = _starting_weights(start, config)
    state = State.new(config, target, weights)  # what can't be built must not claim the directory
    first = ranks.rank() == 0
    log = log if first else lambda _: None
    with contextlib.ExitStack() as stack:
        run, saved, finished = None, None, None
        if first:
            run = stack.enter_context(RunDirectory(run_path))
            _claim(run, config, {"data": train.source, "images": len(train), "start": digest})
            finished = run.read_json("metrics.json")
            if finished is None:
                run.write_json("environment.json", describe(target))
                saved = run.load()
        saved, finished = ranks.from_first((saved, finished))
        if finished is not None:
            if "test" not in finished:
                raise InputError(f"{run_path}/metrics.json has no test: restore or delete it")
            return finished
        note = prepare(target, config.precision)
        if note:
            log(note)
        if saved is not None:
            try:
                state.load(saved)
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise InputError(
                    f"run directory: the checkpoint in {run_path} is not of this run "
                    f"({type(error).__name__}): restore it, or choose another directory"
                ) from error
            log(f"going on from epoch {state.epoch} of {config.epochs} in {run_path}")
        step = Step(state, config, log)
        _train_epochs(step, run, part, validation, test.to(target), log)
        return _finish(run, config, state, part, test, train.source) if first else {}


def split(train: ImageSet, config: TrainConfig) -> tuple[ImageSet, ImageSet | None]:
    """The part of the training images that is trained on, and the validation part, if any."""
    if config.train_size is not None and config.train_size != len(train):
        if config.train_size > len(train):
            raise InputError(
                f"train_size: expected at most {len(train)} images, got {config.train_size}"
            )
        _, chosen = stratified_split(train.labels, config.train_size, config.seed)
        train = train[chosen]
    if not config.validation_size:
        return train, None
    kept, held_out = stratified_split(train.labels, config.validation_size, config.seed)
    return train[kept], train[held_out]


def resolve(config: TrainConfig, device: torch.device, images: int) -> TrainConfig:
    """`config` with everything decided that it leaves open, for `images` images an epoch."""
    if config.ranks not in (1, ranks.count()):
        raise InputError(f"ranks: set by torchrun ({ranks.count()}), got {config.ranks}: leave it")
    precision = choose_precision(config.precision, device)
    config = replace(config, precision=precision, ranks=ranks.count())
    if config.compile is None:
        steps = config.epochs * math.ceil(images / config.batch_size)
        worth = device.type == "cuda" and steps >= MANY_STEPS
        config = replace(config, compile=worth and config.ranks == 1)
    if config.compile and config.ranks > 1:
        raise InputError("compile: expected false on several ranks, got true")
    smallest = images % config.batch_size or min(config.batch_size, images)
    if smallest < config.ranks:
        raise InputError(
            f"batch_size: batches of {config.batch_size} out of {images} images end with "
            f"{smallest}, too few for {config.ranks} ranks: use another batch size or fewer ranks"
        )
    return config


def _starting_weights(
    file: str | Path | None, config: TrainConfig
) -> tuple[dict[str, Tensor] | None, str | None]:
    """What a file of weights holds, and its sha256."""
    if file is None:
        return None, None
    model, _ = load_model(file)
    theirs, ours = (model.blocks, model.channels), (config.blocks, config.channels)
    if theirs != ours:
        raise InputError(
            f"start: expected weights of blocks and channels {ours}, got {theirs}: give others, or "
            "set blocks and channels to theirs"
        )
    path = SHIPPED if str(file) == PRETRAINED else Path(file)
    return model.state_dict(), hashlib.sha256(path.read_bytes()).hexdigest()


def _claim(run: RunDirectory, config: TrainConfig, data: dict[str, object]) -> None:
    """Write what this run is, or check that it is this one. A field newer than the run counts as
    its default.

    `data`: what it learns from: the images' source and number, and the sha256 of the weights it
    starts with, if any.
    """
    ours = {**asdict(config), **data}
    stored = run.read_json("config.json")
    if stored is None:
        run.write_json("config.json", ours)
        return
    before = {name: stored.pop(name, None) for name in data}
    theirs = {**asdict(recipe("report", **stored)), **before}
    differing = [
        f"{name} ({theirs[name]!r}, now {ours[name]!r})"
        for name in ours
        if theirs[name] != ours[name]
    ]
    if differing:
        raise InputError(
            f"run directory: {run.path} holds another run; these differ: {', '.join(differing)}: "
            "choose another directory, or the same settings to go on"
        )


def _train_epochs(
    step: Step,
    run: RunDirectory | None,
    train: ImageSet,
    validation: ImageSet | None,
    test: ImageSet,
    log: Callable[[str], None],
) -> None:
    """The epochs that are left, each ending with a line, a row and a checkpoint.

    Drawing the next epoch's random numbers and writing the last one's checkpoint go on beside the
    training. `run`: None where another rank writes.
    """
    state, config = step.state, step.config
    n, total = len(train), config.epochs * len(train)
    timing = [] if run is None else _read_timing(run, state.epoch)
    written: Future | None = None
    with (
        ThreadPoolExecutor(max_workers=1) as beside,
        tqdm(total=total, initial=state.epoch * n, unit="img", leave=False) as bar,
    ):
        planned = beside.submit(epoch_plan, config, n, state.epoch)
        while state.epoch < config.epochs:
            began = time.perf_counter()
            plan = planned.result()
            planned = beside.submit(epoch_plan, config, n, state.epoch + 1)
            bar.set_description(f"epoch {state.epoch + 1}/{config.epochs}")
            loss, right = train_one_epoch(step, train, config, plan, bar)
            trained = time.perf_counter() - began
            row = {
                "epoch": state.epoch,
                "learning_rate": learning_rate(config, state.epoch),
                "train_loss": loss,
                "train_accuracy": right,
            }
            state.epoch += 1
            if run is None:
                continue
            row |= _watched("validation", validation, state, config)
            row |= _watched("test", test if config.watch_test else None, state, config)
            state.history.append(row)
            seconds = time.perf_counter() - began
            rate = n / trained
            timing.append({"epoch": row["epoch"], "seconds": seconds, "images_per_second": rate})
            if written is not None:
                written.result()  # raises what went wrong with it
            written = beside.submit(_write_epoch, run, state.content(), list(timing))
            log(_line(row, rate, config.epochs))
        if written is not None:
            written.result()
    if state.history and run is not None:
        # A kill after the last checkpoint may have left it a row short.
        run.write_rows("history.csv", state.history)


def _write_epoch(run: RunDirectory, content: dict, timing: list[dict]) -> None:
    run.save(content)
    run.write_rows("history.csv", content["history"])
    run.write_rows("timing.csv", timing)


def _read_timing(run: RunDirectory, epochs: int) -> list[dict]:
    """The rows of the epochs that the checkpoint holds."""
    path = run.path / "timing.csv"
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            return [row for row in csv.DictReader(file) if int(row["epoch"]) < epochs]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"{path} is damaged: restore it, or delete it to go on without") from error


def _watched(
    name: str, images: ImageSet | None, state: State, config: TrainConfig
) -> dict[str, float | None]:
    """The columns of a set that is evaluated each epoch; empty where it isn't."""
    if images is None:
        return {f"{name}_loss": None, f"{name}_accuracy": None}
    logits, labels = _logits(state.final_model, images, config), images.labels.cpu()
    loss = smooth_cross_entropy(logits, labels, config.label_smoothing).item()
    return {f"{name}_loss": loss, f"{name}_accuracy": accuracy(logits, labels)}


def _logits(model: ResNet, images: ImageSet, config: TrainConfig) -> Tensor:
    return predict(model, images.images, config.test_mean, config.test_std, config.precision)


def _line(row: dict, images_per_second: float, epochs: int) -> str:
    parts = [f"epoch {row['epoch'] + 1}/{epochs}  lr {row['learning_rate']:.4f}"]
    for name in ("train", "validation", "test"):
        loss, right = row[f"{name}_loss"], row[f"{name}_accuracy"]
        if loss is not None:
            parts.append(f"{name} loss {loss:.4f} acc {right:.2%}")
    return "  ".join([*parts, f"{images_per_second:.0f} img/s"])


def _finish(
    run: RunDirectory,
    config: TrainConfig,
    state: State,
    train: ImageSet,
    test: ImageSet,
    source: str,
) -> dict:
    """Evaluate and keep the final weights; returns metrics.json."""
    info = {
        "recipe": config.recipe,
        "seed": config.seed,
        "data": source,
        "epochs": config.epochs,
        "mean": config.test_mean,
        "std": config.test_std,
    }
    logits = _logits(state.final_model, test, config)
    metrics = {**info, "train_images": len(train), "test": summarize(logits, test.labels)}
    images, normalisation = train.images[:REBASED_ON], (config.test_mean, config.test_std)
    model = rebase_batch_norm(state.final_model, images, *normalisation, config.precision)
    save_model(run.path / "model.safetensors", model, info)
    run.write_json("metrics.json", metrics)
    return run.read_json("metrics.json")
