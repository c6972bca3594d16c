"""A run: from a recipe and CIFAR-10 to a run directory with weights, history and metrics."""

import contextlib
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from cifar_lib import ranks
from cifar_lib.checkpoint import RunDirectory
from cifar_lib.data import ImageSet, stratified_split
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, fit_temperature, predict, summarize
from cifar_lib.hardware import choose_device, choose_precision, describe, prepare
from cifar_lib.model import save_model
from cifar_lib.recipes import REPORT, TrainConfig, learning_rate
from cifar_lib.shift import rebase_batch_norm
from cifar_lib.train import State, Step, epoch_plan, smooth_cross_entropy, train_one_epoch

MANY_STEPS = 2000  # from here on minutes of compiling pay for themselves on a GPU
REBASED_ON = 5000  # training images, at most, whose statistics the weights are written with
ROUNDING = ("cpu", "gpu", "torch", "threads", "winograd")  # what the last digits depend on


def fit(
    config: TrainConfig,
    run_path: str | Path,
    train: ImageSet,
    test: ImageSet,
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> dict:
    """Train into a run directory, or go on with it, and evaluate; returns its metrics.json.

    A finished run is not trained again. Within `ranks.joined` all processes train this run, and the
    first one writes. Raises InputError for another run's directory, or without labels.
    """
    if train.labels is None or test.labels is None:
        raise InputError("fit: expected labels, got images without: give CIFAR-10's")
    target = choose_device(device)
    part, validation = split(train.to(target), config)
    config = resolve(config, target, len(part))
    state = State(config, target)  # what can't be built must not claim the directory
    identity = asdict(config) | {"data": train.source, "images": len(train)}
    first = ranks.rank() == 0
    log = log if first else lambda _: None
    with RunDirectory(run_path) if first else contextlib.nullcontext() as run:
        found = [None, None]
        if first:
            _claim(run, identity)
            metrics = run.read_json("metrics.json")
            found = [metrics, None if metrics else run.load()]
        if config.ranks > 1:
            dist.broadcast_object_list(found)
        metrics, saved = found
        if metrics is not None:
            return metrics
        prepare(target, config.precision)
        if saved is not None:
            state.load(saved)
            log(f"going on from epoch {state.epoch} of {config.epochs} in {run_path}")
        if first:
            _note_environment(run, target, log)
        step = Step(state, config, log)
        watched = {"validation": validation, "test": test.to(target) if config.watch_test else None}
        _train_epochs(step, run, part, watched)
        return _finish(run, step, part, validation, test, train.source) if first else {}


def split(train: ImageSet, config: TrainConfig) -> tuple[ImageSet, ImageSet | None]:
    """The part of the training images that is trained on, and the validation part, if any."""
    size = config.train_size or len(train)
    if size > len(train):
        raise InputError(f"train_size: expected at most {len(train)} images, got {size}")
    if size < len(train):
        _, chosen = stratified_split(train.labels, size, config.seed)
        train = train[chosen]
    if not config.validation_size:
        return train, None
    kept, held_out = stratified_split(train.labels, config.validation_size, config.seed)
    return train[kept], train[held_out]


def resolve(config: TrainConfig, device: torch.device, images: int) -> TrainConfig:
    """`config` with all decided that it leaves open, or InputError; `images`: of an epoch."""
    count = ranks.count()
    if config.ranks not in (1, count):
        raise InputError(f"ranks: set by torchrun ({count}), got {config.ranks}: leave it")
    compiled = config.compile
    if compiled is None:
        steps = config.epochs * math.ceil(images / config.batch_size)
        compiled = device.type == "cuda" and steps >= MANY_STEPS and count == 1
    if compiled and count > 1:
        raise InputError("compile: expected false on several ranks, got true")
    batch = min(config.batch_size, images)
    last = images % batch or batch
    smallest = 16 if config.half_size_epochs else 32  # pixels, halved by each stage but the first
    side = math.ceil(smallest / 2 ** (len(config.blocks) - 1))
    # The ranks take equal shares, and batch normalisation needs two values.
    if batch % count or last % count or last // count * side**2 < 2:
        what = f"batch_size: batches of {batch} out of {images} images end with {last}"
        fit_for = f"{count} ranks and {len(config.blocks)} stages"
        raise InputError(f"{what}, which doesn't do for {fit_for}: use another batch size")
    precision = choose_precision(config.precision, device)
    return replace(config, precision=precision, compile=compiled, ranks=count)


def _claim(run: RunDirectory, ours: dict[str, object]) -> None:
    """Write what this run is, or check that it is this one; a missing field is the default."""
    ours = json.loads(json.dumps(ours))  # tuples become lists, as they are in the file
    stored = run.read_json("config.json")
    if stored is None:
        run.write_json("config.json", ours)
        return
    theirs = json.loads(json.dumps(asdict(REPORT))) | stored
    names = [name for name in ours | theirs if theirs.get(name) != ours.get(name)]
    if names:
        differing = [f"{name} ({theirs.get(name)!r}, now {ours.get(name)!r})" for name in names]
        what = f"run directory: {run.path} holds another run; these differ: {', '.join(differing)}"
        raise InputError(f"{what}: choose another directory, or the same settings to go on")


def _note_environment(run: RunDirectory, device: torch.device, log: Callable) -> None:
    """Write environment.json, and say what differs from the last start."""
    now, before = describe(device), run.read_json("environment.json") or {}
    known = [name for name in ROUNDING if name in before]
    changes = [f"{k} {now[k]} (before: {before[k]})" for k in known if before[k] != now[k]]
    if changes:
        log(f"the last digits may differ from those of one sitting: {', '.join(changes)}")
    run.write_json("environment.json", now)


def _train_epochs(step: Step, run: RunDirectory | None, train: ImageSet, watched: dict) -> None:
    """The epochs that are left, each ending with a line, a row and a checkpoint.

    Drawing the next epoch's random numbers and writing the last one's checkpoint go on beside the
    training. `run`: None where another rank writes.
    """
    state, config, n = step.state, step.config, len(train)
    with (
        ThreadPoolExecutor(max_workers=1) as beside,
        tqdm(total=config.epochs * n, initial=state.epoch * n, unit="img", leave=False) as bar,
    ):
        written: Future = beside.submit(lambda: None)
        planned = beside.submit(epoch_plan, config, n, state.epoch)
        while state.epoch < config.epochs:
            began = time.perf_counter()
            plan = planned.result()
            planned = beside.submit(epoch_plan, config, n, state.epoch + 1)
            bar.set_description(f"epoch {state.epoch + 1}/{config.epochs}")
            loss, right = train_one_epoch(step, train, plan, bar)
            rate = n / (time.perf_counter() - began)
            row = {"epoch": state.epoch, "learning_rate": learning_rate(config, state.epoch)}
            row |= {"train_loss": loss, "train_accuracy": right}
            state.epoch += 1
            if run is None:
                continue
            for name, images in watched.items():
                row[f"{name}_loss"], row[f"{name}_accuracy"] = _watch(step, images)
            state.history.append(row)
            seconds = time.perf_counter() - began
            timing = {"epoch": row["epoch"], "seconds": seconds, "images_per_second": rate}
            written.result()  # raises what went wrong with the last one
            written = beside.submit(_write, run, state.content(), state.history[:], timing)
            step.log(_line(row, rate, config.epochs))
        written.result()


def _write(run: RunDirectory, content: dict, history: list[dict], timing: dict) -> None:
    run.save(content)
    run.write_rows("history.csv", history)
    run.write_rows("timing.csv", [timing], below=True)


def _watch(step: Step, images: ImageSet | None) -> tuple[float | None, float | None]:
    """Loss and accuracy on a set that is evaluated each epoch; None where it isn't."""
    if images is None:
        return None, None
    config, labels = step.config, images.labels.cpu()
    how = config.test_mean, config.test_std, config.precision
    logits = predict(step.state.model, images.images, *how)
    loss = smooth_cross_entropy(logits, labels, config.label_smoothing)
    return loss.item(), accuracy(logits, labels)


def _line(row: dict, images_per_second: float, epochs: int) -> str:
    parts = [f"epoch {row['epoch'] + 1}/{epochs}  lr {row['learning_rate']:.4f}"]
    for name in ("train", "validation", "test"):
        loss, right = row[f"{name}_loss"], row[f"{name}_accuracy"]
        if loss is not None:
            parts.append(f"{name} loss {loss:.4f} acc {right:.2%}")
    return "  ".join([*parts, f"{images_per_second:.0f} img/s"])


def _finish(
    run: RunDirectory,
    step: Step,
    train: ImageSet,
    validation: ImageSet | None,
    test: ImageSet,
    source: str,
) -> dict:
    """Evaluate and keep the final weights, with all that is needed to use them; returns
    metrics.json."""
    state, config = step.state, step.config
    how = config.test_mean, config.test_std, config.precision
    run.write_rows("history.csv", state.history)  # a kill may have left it a row short
    info = {"recipe": config.recipe, "seed": config.seed, "data": source, "epochs": config.epochs}
    info |= {"mean": config.test_mean, "std": config.test_std}
    info |= {"train_mean": config.mean, "train_std": config.std}
    if validation is not None:  # other images than those of training, on which it is too sure
        held_out = predict(state.model, validation.images, *how)
        info["temperature"] = round(fit_temperature(held_out, validation.labels), 4)
    score = summarize(predict(state.model, test.images, *how), test.labels)
    model = rebase_batch_norm(state.model, train.images[:REBASED_ON], *how)
    save_model(run.path / "model.safetensors", model, info)
    run.write_json("metrics.json", {**info, "train_images": len(train), "test": score})
    return run.read_json("metrics.json")
