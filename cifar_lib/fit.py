"""One run: from a recipe and CIFAR-10 to a run directory with weights, history and metrics."""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from cifar_lib.checkpoint import RunDirectory
from cifar_lib.data import ImageSet, stratified_split
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, fit_temperature, predict, summarize
from cifar_lib.hardware import (
    background_thread,
    channel_multiple_for,
    choose_device,
    choose_precision,
    describe,
    prepare,
)
from cifar_lib.model import WeightsInfo, save_model
from cifar_lib.recipes import TrainConfig, learning_rate, with_defaults
from cifar_lib.shift import rebase_batch_norm
from cifar_lib.train import (
    State,
    Step,
    at_size,
    has_half_size,
    plan_epoch,
    smooth_cross_entropy,
    train_one_epoch,
)

MANY_STEPS = 2000  # from this number on, compiling for minutes pays off on a CUDA GPU
REBASED_ON = 5000  # the batch-norm statistics that are saved are of at most this many images
# Entries of environment.json that the last digits of a result depend on.
ROUNDING = ("cpu", "gpu", "torch", "threads", "winograd")
# Settings that were removed, but that an old run's config.json may still have. With this value, the
# run trained as today's code does.
RETIRED = {"ranks": 1}
AfterEpoch = Callable[[nn.Module, list[dict]], None]


def fit(
    config: TrainConfig,
    run_path: str | Path,
    train: ImageSet,
    test: ImageSet,
    device: str = "auto",
    log: Callable[[str], None] = print,
    after_epoch: AfterEpoch | None = None,
    channel_multiple: int | None = None,
) -> dict:
    """Train in a run directory, or resume the run that is there; then evaluate.

    Returns the run's metrics, as metrics.json has them. A finished run isn't trained again.

    log: called with each line of progress.
    after_epoch: called after each epoch with the network and the history up to this epoch. If the
    epoch's images had half size, it gets a network that scales images down to half size first.
    channel_multiple: train with channels padded to a multiple of this, which gives the same network
    (see cifar_lib/padding.py); None: whatever is fast on the device.

    Raises InputError if the directory holds another run, if images have no labels, and for a
    configuration that can't be trained on these images or this device. A run that was begun in
    another precision is another run, also if the device chose the precision.
    """
    if train.labels is None or test.labels is None:
        raise InputError("fit: expected labelled images, got some without labels: use CIFAR-10's")
    device = choose_device(device)
    part, validation = split(train.to(device), config)
    config = resolve(config, device, len(part))
    if channel_multiple is None:
        channel_multiple = channel_multiple_for(device)
    # Make the state first: if that fails, the directory stays unclaimed.
    state = State(config, device, channel_multiple)

    with RunDirectory(run_path) as run:  # locked until the end
        # Claim the directory for this run. A finished run has metrics: return them.
        _claim(run, asdict(config) | {"data": train.source, "images": len(train)})
        metrics = run.read_json("metrics.json")
        if metrics is not None:
            return metrics

        # Resume at the last checkpoint, or begin.
        prepare(device, config.precision)  # make PyTorch and the C library's malloc fast
        saved = run.load()
        if saved is not None:
            state.load(saved)
            log(f"resuming after epoch {len(state.history)} of {config.epochs} in {run_path}")
        _note_environment(run, device, log)

        # Train the epochs that are left, and evaluate these sets after each.
        step = Step(state, log)
        watched = {"validation": validation, "test": test.to(device) if config.watch_test else None}
        _train_epochs(step, run, part, watched, log, after_epoch)
        # Write this again: a run that was killed right after a checkpoint lacks a row there.
        run.write_rows("history.csv", state.history)

        # Evaluate the network, and calibrate it.
        network = state.network()
        info = _describe_weights(network, config, train.source, validation)
        score = summarize(_predict(network, config, test), test.labels)

        # Save a network with the same outputs, so that the score holds for it. The statistics in
        # its batch norms are replaced by those of unaugmented images, which `shift.adapt` needs.
        # Their scales and shifts are changed to compensate.
        unaugmented = part.images[:REBASED_ON]
        model = rebase_batch_norm(network, unaugmented, config.test_normalization, config.precision)
        save_model(run.path / "model.safetensors", model, info)
        record = {**info.as_record(), "train_images": len(part), "test": score}
        run.write_json("metrics.json", record)
        return run.read_json("metrics.json")  # what a later call returns: lists, not tuples


def split(train: ImageSet, config: TrainConfig) -> tuple[ImageSet, ImageSet | None]:
    """Return the images to train on, and the validation part or None.

    Raises InputError if there are fewer images than the configuration asks for.
    """
    size = config.train_size or len(train)
    if size > len(train):
        raise InputError(f"train_size: expected at most {len(train)} images, got {size}")
    if size < len(train):
        # The second part of the split has `size` images.
        _, chosen = stratified_split(train.labels, size, config.seed)
        train = train[chosen]
    if not config.validation_size:
        return train, None
    kept, held_out = stratified_split(train.labels, config.validation_size, config.seed)
    return train[kept], train[held_out]


def resolve(config: TrainConfig, device: torch.device, n: int) -> TrainConfig:
    """Return `config` with its precision and `compile` decided, for epochs of n images.

    Raises InputError if the precision is unknown, or a batch is too small to be normalised.
    """
    # In training, batch norm needs at least two values per channel: images times side^2. The worst
    # case is the last batch in the last stage. Images have side 16 or 32, and each stage after the
    # first halves it.
    batch = min(config.batch_size, n)
    last_batch_size = n % batch or batch  # a full batch, if they divide the images evenly
    side = math.ceil((16 if config.half_size_epochs else 32) / 2 ** (len(config.blocks) - 1))
    if last_batch_size * side**2 < 2:
        what = f"batch_size: batches of {batch} out of {n} images end with {last_batch_size}"
        stages = f"{len(config.blocks)} stages"
        raise InputError(f"{what}, which isn't enough for {stages}: use another batch size")

    compiled = config.compile
    if compiled is None:
        steps = config.epochs * math.ceil(n / config.batch_size)
        compiled = device.type == "cuda" and steps >= MANY_STEPS
    precision = choose_precision(config.precision, device)
    return replace(config, precision=precision, compile=compiled)


def _claim(run: RunDirectory, ours: dict[str, object]) -> None:
    """Write what this run is into config.json, or check that the run there is this one.

    A field that the file lacks has its default, because versions without the field behaved that
    way. Raises InputError if the run there is another one.
    """
    ours = json.loads(json.dumps(ours))  # tuples become lists, as they are in the file
    stored = run.read_json("config.json")
    if stored is None:
        run.write_json("config.json", ours)
        return
    for name, value in RETIRED.items():
        if stored.get(name) == value:
            del stored[name]
    theirs = with_defaults(stored)
    names = [name for name in ours | theirs if theirs.get(name) != ours.get(name)]
    if names:
        differing = [f"{name} ({theirs.get(name)!r}, now {ours.get(name)!r})" for name in names]
        what = f"run directory: {run.path} holds another run; these differ: {', '.join(differing)}"
        raise InputError(f"{what}: choose another directory, or the same settings to resume it")


def _note_environment(run: RunDirectory, device: torch.device, log: Callable[[str], None]) -> None:
    """Write environment.json, and say which of ROUNDING differ from the last start."""
    now, before = describe(device), run.read_json("environment.json") or {}
    known = [name for name in ROUNDING if name in before]
    changed = [name for name in known if before[name] != now[name]]
    changes = [f"{name} {now[name]} (before: {before[name]})" for name in changed]
    if changes:
        log(f"the last digits may differ from those of an uninterrupted run: {', '.join(changes)}")
    run.write_json("environment.json", now)


def _train_epochs(
    step: Step,
    run: RunDirectory,
    train: ImageSet,
    watched: dict[str, ImageSet | None],
    log: Callable[[str], None],
    after_epoch: AfterEpoch | None,
) -> None:
    """Train the epochs that are left; each ends with a log line, a history row and a checkpoint.

    While one trains, a background thread writes the checkpoint of the epoch before it, and draws
    the random numbers of the epoch after it. Those drawn during the last epoch go unused.
    """
    state, config, n = step.state, step.config, len(train)
    begin = len(state.history)
    with (
        background_thread() as background,
        tqdm(total=config.epochs * n, initial=begin * n, unit="img", leave=False) as bar,
    ):
        written: Future = background.submit(lambda: None)  # nothing to wait for yet
        planned = background.submit(plan_epoch, config, n, begin)
        for epoch in range(begin, config.epochs):
            # Train.
            bar.set_description(f"epoch {epoch + 1}/{config.epochs}")
            began = time.perf_counter()
            plan = planned.result()
            planned = background.submit(plan_epoch, config, n, epoch + 1)
            loss, train_accuracy = train_one_epoch(step, train, epoch, plan, bar)
            images_per_second = n / (time.perf_counter() - began)

            # Evaluate the network as the run would save it now, on images of the size that the
            # epoch trained on: a network that has seen only small ones knows little about large
            # ones. The learning rate in the row is the one at the epoch's start.
            network = at_size(state.network(), has_half_size(config, epoch))
            row = {"epoch": epoch, "learning_rate": learning_rate(config, epoch)}
            row |= {"train_loss": loss, "train_accuracy": train_accuracy}
            for name, images in watched.items():
                row[f"{name}_loss"], row[f"{name}_accuracy"] = _measure(network, config, images)
            state.history.append(row)
            seconds = time.perf_counter() - began
            timing = {"epoch": epoch, "seconds": seconds, "images_per_second": images_per_second}

            # Wait for the previous checkpoint; an exception in its thread is raised here. Then
            # write this one. The thread gets copies, because training keeps changing the state.
            written.result()
            written = background.submit(_write, run, state.content(), state.history[:], timing)
            log(_log_line(row, images_per_second, config.epochs))
            if after_epoch is not None:
                after_epoch(network, state.history[:])
        written.result()


def _write(run: RunDirectory, content: dict, history: list[dict], timing: dict) -> None:
    """Write an epoch's files; the checkpoint first, because the history is also in it."""
    run.save(content)
    run.write_rows("history.csv", history)
    run.write_rows("timing.csv", [timing], append=True)


def _measure(
    network: nn.Module, config: TrainConfig, images: ImageSet | None
) -> tuple[float | None, float | None]:
    """Return the smoothed loss and the accuracy on a set, or (None, None) without images."""
    if images is None:
        return None, None
    logits, labels = _predict(network, config, images), images.labels.cpu()
    loss = smooth_cross_entropy(logits, labels, config.label_smoothing)
    return loss.item(), accuracy(logits, labels)


def _predict(network: nn.Module, config: TrainConfig, images: ImageSet) -> torch.Tensor:
    """Return logits float32 (N, 10) on the CPU, in the run's precision.

    Images are normalised as in testing. In the published run that differs from training (recipes).
    """
    return predict(network, images.images, config.test_normalization, config.precision)


def _log_line(row: dict, images_per_second: float, epochs: int) -> str:
    """Return an epoch's losses, accuracies and speed in one line."""
    parts = [f"epoch {row['epoch'] + 1}/{epochs}  lr {row['learning_rate']:.4f}"]
    for name in ("train", "validation", "test"):
        loss, fraction = row[f"{name}_loss"], row[f"{name}_accuracy"]
        if loss is not None:
            parts.append(f"{name} loss {loss:.4f} acc {fraction:.2%}")
    return "  ".join([*parts, f"{images_per_second:.0f} img/s"])


def _describe_weights(
    network: nn.Module, config: TrainConfig, source: str, validation: ImageSet | None
) -> WeightsInfo:
    """Return all that is needed to use the weights.

    With a validation part this includes the temperature, the number that logits are divided by so
    that the probabilities are calibrated. It has to be fitted on other images than those trained
    on, about which the network is too confident.
    """
    temperature = None
    if validation is not None:
        logits = _predict(network, config, validation)
        temperature = round(fit_temperature(logits, validation.labels), 4)
    return WeightsInfo(
        recipe=config.recipe,
        seed=config.seed,
        data=source,
        epochs=config.epochs,
        mean=config.test_mean,
        std=config.test_std,
        train_mean=config.mean,
        train_std=config.std,
        temperature=temperature,
    )
