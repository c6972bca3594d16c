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

MANY_STEPS = 2000  # with as many, compiling for minutes pays off on a GPU
REBASED_ON = 5000  # at most so many training images give the batch-norm statistics that are saved
ROUNDING = ("cpu", "gpu", "torch", "threads", "winograd")  # what a result's last digits depend on
AfterEpoch = Callable[[nn.Module, list[dict]], None]
RETIRED = {"ranks": 1}  # settings that were removed, with the value that today's code has for them


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
    """Train into a run directory, or go on with what is there; then evaluate.

    Returns the run's metrics, as metrics.json has them. A finished run isn't trained again.

    log: called with each line of progress.
    after_epoch: called after each epoch with the network and the history up to this epoch. If the
    epoch's images had half size, it is a network that halves its images first.
    channel_multiple: train with channels padded to a multiple of this, which gives the same network
    (`padding`); None: what is fast on the device.

    Raises InputError if the directory holds another run, if images have no labels, and for a
    configuration that can't be trained on these images or this device.
    """
    if train.labels is None or test.labels is None:
        raise InputError("fit: expected labelled images, got some without labels: use CIFAR-10's")
    device = choose_device(device)
    part, validation = split(train.to(device), config)
    config = resolve(config, device, len(part))
    if channel_multiple is None:
        channel_multiple = channel_multiple_for(device)
    # The state comes before the directory is claimed: if it can't be made, that stays free.
    state = State(config, device, channel_multiple)

    with RunDirectory(run_path) as run:
        # Claim the directory for this run. If the run is finished, its metrics are all.
        _claim(run, asdict(config) | {"data": train.source, "images": len(train)})
        metrics = run.read_json("metrics.json")
        if metrics is not None:
            return metrics

        # Go on where the last checkpoint was written, or begin.
        prepare(device, config.precision)  # torch's switches and the system's memory, for speed
        saved = run.load()
        if saved is not None:
            state.load(saved)
            log(f"going on from epoch {len(state.history)} of {config.epochs} in {run_path}")
        _note_environment(run, device, log)

        # Train the epochs that are left, and evaluate these sets after each.
        step = Step(state, config, log)
        watched = {"validation": validation, "test": test.to(device) if config.watch_test else None}
        _train_epochs(step, run, part, watched, log, after_epoch)
        run.write_rows("history.csv", state.history)  # a kill right after a checkpoint lost a row

        # Evaluate.
        network = state.network()
        info = _describe_weights(network, config, train.source, validation)
        score = summarize(_predict(network, config, test), test.labels)

        # Save a network that computes the same, so that the score is its own; but its batch norms
        # have the statistics of unaugmented images, which `shift.adapt` needs.
        unaugmented = part.images[:REBASED_ON]
        model = rebase_batch_norm(network, unaugmented, config.test_normalization, config.precision)
        save_model(run.path / "model.safetensors", model, info)
        record = {**info.as_record(), "train_images": len(part), "test": score}
        run.write_json("metrics.json", record)
        return run.read_json("metrics.json")  # as the next call will, lists instead of tuples


def split(train: ImageSet, config: TrainConfig) -> tuple[ImageSet, ImageSet | None]:
    """Return the training images that are trained on, and the validation part or None.

    Raises InputError if there are fewer images than the configuration asks for.
    """
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


def resolve(config: TrainConfig, device: torch.device, n: int) -> TrainConfig:
    """Return `config` with everything decided that it leaves open, for epochs of n images.

    Raises InputError if the precision is unknown, or a batch is too small to be normalised.
    """
    # In training, batch norm needs at least two values per channel: images times side^2. The worst
    # case is the last batch in the last stage, whose side is 16 or 32, halved by each stage after
    # the first.
    batch = min(config.batch_size, n)
    last_batch = n % batch or batch
    side = math.ceil((16 if config.half_size_epochs else 32) / 2 ** (len(config.blocks) - 1))
    if last_batch * side**2 < 2:
        what = f"batch_size: batches of {batch} out of {n} images end with {last_batch}"
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

    A field that the file lacks counts as its default: versions without it behaved so.
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
        raise InputError(f"{what}: choose another directory, or the same settings to go on")


def _note_environment(run: RunDirectory, device: torch.device, log: Callable) -> None:
    """Write environment.json, and say which of ROUNDING differ from the last start."""
    now, before = describe(device), run.read_json("environment.json") or {}
    known = [name for name in ROUNDING if name in before]
    changes = [f"{k} {now[k]} (before: {before[k]})" for k in known if before[k] != now[k]]
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
    the random numbers of the epoch after it (after the last one, too, for nothing).
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

            # Evaluate the network that the run would end with now, on images of the size that the
            # epoch trained on: a network that has only seen small ones knows little about large
            # ones. The learning rate in the row is the one at the epoch's start.
            network = at_size(state.network(), has_half_size(config, epoch))
            row = {"epoch": epoch, "learning_rate": learning_rate(config, epoch)}
            row |= {"train_loss": loss, "train_accuracy": train_accuracy}
            for name, images in watched.items():
                row[f"{name}_loss"], row[f"{name}_accuracy"] = _watch(network, config, images)
            state.history.append(row)
            seconds = time.perf_counter() - began
            timing = {"epoch": epoch, "seconds": seconds, "images_per_second": images_per_second}

            # Write, once the checkpoint before is on disk; what went wrong there is raised here.
            # The thread gets copies, as training goes on changing the state.
            written.result()
            written = background.submit(_write, run, state.content(), state.history[:], timing)
            log(_line(row, images_per_second, config.epochs))
            if after_epoch is not None:
                after_epoch(network, state.history[:])
        written.result()


def _write(run: RunDirectory, content: dict, history: list[dict], timing: dict) -> None:
    run.save(content)
    run.write_rows("history.csv", history)
    run.write_rows("timing.csv", [timing], append=True)


def _watch(
    network: nn.Module, config: TrainConfig, images: ImageSet | None
) -> tuple[float | None, float | None]:
    """Loss and accuracy on a set that is evaluated each epoch; (None, None) without images."""
    if images is None:
        return None, None
    logits, labels = _predict(network, config, images), images.labels.cpu()
    loss = smooth_cross_entropy(logits, labels, config.label_smoothing)
    return loss.item(), accuracy(logits, labels)


def _predict(network: nn.Module, config: TrainConfig, images: ImageSet) -> torch.Tensor:
    """Logits float32 (N, 10) on the CPU, by the test normalisation and the run's precision."""
    return predict(network, images.images, config.test_normalization, config.precision)


def _line(row: dict, images_per_second: float, epochs: int) -> str:
    """The log line of an epoch."""
    parts = [f"epoch {row['epoch'] + 1}/{epochs}  lr {row['learning_rate']:.4f}"]
    for name in ("train", "validation", "test"):
        loss, fraction = row[f"{name}_loss"], row[f"{name}_accuracy"]
        if loss is not None:
            parts.append(f"{name} loss {loss:.4f} acc {fraction:.2%}")
    return "  ".join([*parts, f"{images_per_second:.0f} img/s"])


def _describe_weights(
    network: nn.Module, config: TrainConfig, source: str, validation: ImageSet | None
) -> WeightsInfo:
    """All that is needed to use the weights.

    With a validation part this includes the temperature that calibrates the probabilities. It has
    to be fitted on images that weren't trained on: of training images a network is too confident.
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
