"""One run: from a recipe and CIFAR-10 to a run directory with weights, history and metrics."""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from cifar_lib.checkpoint import RunDirectory
from cifar_lib.data import ImageSet, stratified_split
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, fit_temperature, predict, summarize
from cifar_lib.hardware import choose_device, choose_precision, describe, prepare
from cifar_lib.model import WeightsInfo, save_model
from cifar_lib.recipes import REPORT, TrainConfig, learning_rate
from cifar_lib.shift import rebase_batch_norm
from cifar_lib.train import State, Step, plan_epoch, smooth_cross_entropy, train_one_epoch

MANY_STEPS = 2000  # from here on minutes of compiling pay for themselves on a GPU
REBASED_ON = 5000  # training images, at most, whose statistics the weights are written with
ROUNDING = ("cpu", "gpu", "torch", "threads", "winograd")  # what the last digits depend on
RETIRED = {"ranks": 1}  # settings of earlier versions that are gone, and what all runs do now


def fit(
    config: TrainConfig,
    run_path: str | Path,
    train: ImageSet,
    test: ImageSet,
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> dict:
    """Train into a run directory, or go on with what is there; then evaluate.

    Returns the run's metrics, as metrics.json has them. A finished run isn't trained again.

    Raises InputError if the directory holds another run, if images have no labels, and for a
    configuration that can't be trained on these images or this device.
    """
    if train.labels is None or test.labels is None:
        raise InputError("fit: expected labels, got images without: give CIFAR-10's")
    device = choose_device(device)
    part, validation = split(train.to(device), config)
    config = resolve(config, device, len(part))
    state = State(config, device)  # what can't be built must not claim the directory

    with RunDirectory(run_path) as run:
        # Claim the directory for this run. A finished one only says what it came to.
        _claim(run, asdict(config) | {"data": train.source, "images": len(train)})
        metrics = run.read_json("metrics.json")
        if metrics is not None:
            return metrics

        # Go on where the last checkpoint was written, or begin.
        prepare(device, config.precision)
        saved = run.load()
        if saved is not None:
            state.load(saved)
            log(f"going on from epoch {len(state.history)} of {config.epochs} in {run_path}")
        _note_environment(run, device, log)

        # Train the epochs that are left.
        step = Step(state, config, log)
        watched = {"validation": validation, "test": test.to(device) if config.watch_test else None}
        _train_epochs(step, run, part, watched, log)

        # Keep the weights, and say what they score.
        run.write_rows("history.csv", state.history)  # a kill may have left it a row short
        info = _describe_weights(state, config, train.source, validation)
        score = summarize(_predict(state, config, test), test.labels)
        plain = part.images[:REBASED_ON]  # as they are, not augmented
        normalization, precision = config.test_normalization, config.precision
        model = rebase_batch_norm(state.model, plain, normalization, precision)
        save_model(run.path / "model.safetensors", model, info)
        record = {**info.as_record(), "train_images": len(part), "test": score}
        run.write_json("metrics.json", record)
        return run.read_json("metrics.json")


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


def resolve(config: TrainConfig, device: torch.device, images: int) -> TrainConfig:
    """Return `config` with everything decided that it leaves open, for epochs of `images` images.

    Raises InputError if the precision is unknown, or a batch is too small to be normalised.
    """
    # Batch normalisation needs two values per channel, also for an epoch's last images at the
    # smallest size: 16 or 32 pixels, halved by each stage but the first.
    batch = min(config.batch_size, images)
    last = images % batch or batch
    side = math.ceil((16 if config.half_size_epochs else 32) / 2 ** (len(config.blocks) - 1))
    if last * side**2 < 2:
        what = f"batch_size: batches of {batch} out of {images} images end with {last}"
        stages = f"{len(config.blocks)} stages"
        raise InputError(f"{what}, which isn't enough for {stages}: use another batch size")

    compiled = config.compile
    if compiled is None:
        steps = config.epochs * math.ceil(images / config.batch_size)
        compiled = device.type == "cuda" and steps >= MANY_STEPS
    precision = choose_precision(config.precision, device)
    return replace(config, precision=precision, compile=compiled)


def _claim(run: RunDirectory, ours: dict[str, object]) -> None:
    """Write what this run is into config.json, or check that the run there is this one.

    A field that the file lacks has its default value, which is what versions without it did.
    """
    ours = json.loads(json.dumps(ours))  # tuples become lists, as they are in the file
    stored = run.read_json("config.json")
    if stored is None:
        run.write_json("config.json", ours)
        return
    for name, value in RETIRED.items():
        if stored.get(name) == value:
            del stored[name]
    theirs = json.loads(json.dumps(asdict(REPORT))) | stored
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
        log(f"the last digits may differ from those of one sitting: {', '.join(changes)}")
    run.write_json("environment.json", now)


def _train_epochs(
    step: Step,
    run: RunDirectory,
    train: ImageSet,
    watched: dict[str, ImageSet | None],
    log: Callable[[str], None],
) -> None:
    """Train the epochs that are left, each ending with a line, a row and a checkpoint.

    The next epoch's random numbers are drawn, and the last one's checkpoint is written, beside the
    training, in a thread.
    """
    state, config, n = step.state, step.config, len(train)
    begin = len(state.history)
    with (
        ThreadPoolExecutor(max_workers=1) as beside,
        tqdm(total=config.epochs * n, initial=begin * n, unit="img", leave=False) as bar,
    ):
        written: Future = beside.submit(lambda: None)
        planned = beside.submit(plan_epoch, config, n, begin)
        for epoch in range(begin, config.epochs):
            # Train.
            bar.set_description(f"epoch {epoch + 1}/{config.epochs}")
            began = time.perf_counter()
            plan = planned.result()
            planned = beside.submit(plan_epoch, config, n, epoch + 1)
            loss, train_accuracy = train_one_epoch(step, train, epoch, plan, bar)
            rate = n / (time.perf_counter() - began)

            # Watch.
            row = {"epoch": epoch, "learning_rate": learning_rate(config, epoch)}
            row |= {"train_loss": loss, "train_accuracy": train_accuracy}
            for name, images in watched.items():
                row[f"{name}_loss"], row[f"{name}_accuracy"] = _watch(state, config, images)
            state.history.append(row)
            seconds = time.perf_counter() - began
            timing = {"epoch": epoch, "seconds": seconds, "images_per_second": rate}

            # Write, once the last checkpoint is on disk; if that went wrong, it is raised here.
            written.result()
            written = beside.submit(_write, run, state.content(), state.history[:], timing)
            log(_line(row, rate, config.epochs))
        written.result()


def _write(run: RunDirectory, content: dict, history: list[dict], timing: dict) -> None:
    run.save(content)
    run.write_rows("history.csv", history)
    run.write_rows("timing.csv", [timing], below=True)


def _watch(
    state: State, config: TrainConfig, images: ImageSet | None
) -> tuple[float | None, float | None]:
    """Loss and accuracy on a set that is evaluated each epoch; None each, where there is none."""
    if images is None:
        return None, None
    logits, labels = _predict(state, config, images), images.labels.cpu()
    loss = smooth_cross_entropy(logits, labels, config.label_smoothing)
    return loss.item(), accuracy(logits, labels)


def _predict(state: State, config: TrainConfig, images: ImageSet) -> torch.Tensor:
    """Logits (N, 10) of the network as it is now, as the configuration wants images predicted."""
    return predict(state.model, images.images, config.test_normalization, config.precision)


def _line(row: dict, images_per_second: float, epochs: int) -> str:
    """What is said of an epoch."""
    parts = [f"epoch {row['epoch'] + 1}/{epochs}  lr {row['learning_rate']:.4f}"]
    for name in ("train", "validation", "test"):
        loss, fraction = row[f"{name}_loss"], row[f"{name}_accuracy"]
        if loss is not None:
            parts.append(f"{name} loss {loss:.4f} acc {fraction:.2%}")
    return "  ".join([*parts, f"{images_per_second:.0f} img/s"])


def _describe_weights(
    state: State, config: TrainConfig, source: str, validation: ImageSet | None
) -> WeightsInfo:
    """All that is needed to use the weights, with a temperature where there is a validation part.

    It is fitted on images that weren't trained on: on its training images a network is too sure.
    """
    temperature = None
    if validation is not None:
        logits = _predict(state, config, validation)
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
