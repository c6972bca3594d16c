"""The training loop: from a recipe and CIFAR-10 to a run directory with weights, history and
metrics."""

import contextlib
import csv
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cifar_lib import ranks
from cifar_lib.augment import Draws, augment, draw, random_stream
from cifar_lib.checkpoint import RunDirectory
from cifar_lib.data import ImageSet, stratified_split, with_labels
from cifar_lib.errors import InputError
from cifar_lib.evaluate import accuracy, predict, summarize
from cifar_lib.hardware import choose_device, choose_precision, describe
from cifar_lib.model import PRETRAINED, SHIPPED, ResNet, load_model, save_model
from cifar_lib.recipes import TrainConfig, learning_rate, recipe
from cifar_lib.shift import rebase_batch_norm
from cifar_lib.step import State, Step, choose_step, smooth_cross_entropy

# Batches augmented at once: enough to group images by operation; on a CPU few enough for the cache.
BLOCK = {"cpu": 32, "cuda": 128, "mps": 128}
REBASED_ON = 5000  # training images, at most, that give the batch-norm statistics which the weights are written with
CHECK_EVERY = 50  # steps between two looks at a GPU's running loss, each of which waits for it


def epoch_plan(config: TrainConfig, n: int, epoch: int) -> tuple[Tensor, Draws]:
    """The order of the n images in an epoch, int64 (n,), and the draws of their augmentation."""
    order = torch.randperm(n, generator=random_stream(config.seed, epoch, purpose=1))
    return order, draw(n, config.policy, config.seed, epoch)


def epoch_batches(
    train: ImageSet, config: TrainConfig, plan: tuple[Tensor, Draws], rank: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented uint8 images (b, 3, 32, 32) and labels (b,), batch by batch: those of each batch
    that `rank` takes."""
    order, draws = plan
    device = train.images.device
    for block in order.split(BLOCK[device.type] * config.batch_size):
        shares = [batch[rank :: config.ranks] for batch in block.split(config.batch_size)]
        chosen = torch.cat(shares)
        part = train[chosen]
        images = augment(part.images, config.policy, draws[chosen])
        sizes = [len(share) for share in shares]
        yield from zip(images.split(sizes), part.labels.split(sizes), strict=True)


def train_one_epoch(
    step: Step, train: ImageSet, config: TrainConfig, plan: tuple[Tensor, Draws], bar: tqdm
) -> tuple[float, float]:
    """One pass over `train`; returns the mean loss and the accuracy over its augmented images, on
    all ranks.

    Raises InputError when the loss is not finite: before the step that would spread it; on CUDA up
    to 50 steps later, none of which changes the weights, or (in fp16) is kept.
    """
    state = step.state
    steps = math.ceil(len(train) / config.batch_size)
    half_size = state.epoch < min(config.half_size_epochs, config.epochs - 1)
    rank = ranks.rank()
    step.totals.zero_()
    state.model.train()
    for i, (images, labels) in enumerate(epoch_batches(train, config, plan, rank)):
        whole = min(config.batch_size, len(train) - i * config.batch_size)
        rate = learning_rate(config, state.epoch + i / steps)
        step(images, labels, rate, half_size, share=len(labels) * config.ranks / whole)
        if step.device.type != "cuda" or i % CHECK_EVERY == 0 or i == steps - 1:
            loss, right = step.check()
            seen = len(range(rank, i * config.batch_size + whole, config.ranks))
            bar.set_postfix(
                loss=f"{loss / seen:.3f}", accuracy=f"{right / seen:.1%}", refresh=False
            )
        bar.update(whole)
    if config.ranks > 1:
        ranks.add(step.totals)
        ranks.average(state.model.buffers())  # each rank's batch statistics are of its own images
        ranks.average(state.ema.buffers() if state.ema is not None else [])
    loss, right = step.check()
    return loss / len(train), right / len(train)


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
    train, test = with_labels(train), with_labels(test)
    target = choose_device(device)
    config = replace(
        config, precision=choose_precision(config.precision, target), ranks=ranks.count()
    )
    train_part, validation = split(train.to(target), config)
    config = replace(config, step=choose_step(config, target, len(train_part)))
    _check_shares(config, len(train_part))
    test = test.to(target)
    weights, digest = (None, None) if start is None else _weights(start, config)
    state = State.new(config, target, weights)  # what can't be built must not claim the directory
    log = log if ranks.rank() == 0 else _silent
    with contextlib.ExitStack() as stack:
        run = RunDirectory(run_path)
        saved, finished = ranks.from_first(
            lambda: _open(stack.enter_context(run), config, train, digest, target)
        )
        if finished is not None:
            return finished
        if saved is not None:
            state.load(saved)
            log(f"going on from epoch {state.epoch} of {config.epochs} in {run.path}")
        _train_epochs(state, run, config, train_part, validation, test, log)
        info = {"recipe": config.recipe, "seed": config.seed, "data": train.source}
        info |= {"epochs": config.epochs, "mean": config.test_mean, "std": config.test_std}
        logits = _logits(state.final_model, test, config)
        metrics = {**info, "train_images": len(train_part), "test": summarize(logits, test.labels)}
        if ranks.rank() == 0:
            images, normalisation = (
                train_part.images[:REBASED_ON],
                (config.test_mean, config.test_std),
            )
            model = rebase_batch_norm(state.final_model, images, *normalisation, config.precision)
            save_model(run.path / "model.safetensors", model, info)
            run.write_json("metrics.json", metrics)
        return metrics


def _weights(file: str | Path, config: TrainConfig) -> tuple[dict[str, Tensor], str]:
    """What a file of weights holds, and its sha256."""
    model, _ = load_model(file)
    if (model.blocks, model.channels) != (config.blocks, config.channels):
        raise InputError(
            f"start: expected weights of blocks {config.blocks} and channels {config.channels}, got {model.blocks} "
            f"and {model.channels}: give others, or set blocks and channels to theirs"
        )
    path = SHIPPED if str(file) == PRETRAINED else Path(file)
    return model.state_dict(), hashlib.sha256(path.read_bytes()).hexdigest()


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


def _silent(_: str) -> None:
    pass


def _check_shares(config: TrainConfig, images: int) -> None:
    smallest = images % config.batch_size or min(config.batch_size, images)
    if smallest < config.ranks:
        raise InputError(
            f"batch_size: batches of {config.batch_size} out of {images} images end with {smallest}, too few for "
            f"{config.ranks} ranks: use another batch size or fewer ranks"
        )


def _open(
    run: RunDirectory, config: TrainConfig, train: ImageSet, start: str | None, device: torch.device
) -> tuple[dict | None, dict | None]:
    """Claim the directory; returns its checkpoint and, if it is finished, its metrics."""
    _claim(run, config, {"data": train.source, "images": len(train), "start": start})
    finished = run.read_json("metrics.json")
    if finished is not None:
        return None, finished
    run.write_json("environment.json", describe(device))
    return run.load(), None


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
    if not isinstance(stored, dict):
        raise InputError(
            f"{run.path / 'config.json'} is no configuration: restore it, or choose another run directory"
        )
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
    state: State,
    run: RunDirectory,
    config: TrainConfig,
    train: ImageSet,
    validation: ImageSet | None,
    test: ImageSet,
    log: Callable[[str], None],
) -> None:
    """The epochs that are left, each ending with a line, a row and a checkpoint.

    Drawing the next epoch's random numbers and writing the last one's checkpoint go on beside the
    training.
    """
    step = Step(state, config, log)
    timing = _read_timing(run, state.epoch)
    written: Future | None = None
    with (
        ThreadPoolExecutor(max_workers=1) as beside,
        tqdm(
            total=config.epochs * len(train),
            initial=state.epoch * len(train),
            unit="img",
            leave=False,
        ) as bar,
    ):
        planned = beside.submit(epoch_plan, config, len(train), state.epoch)
        while state.epoch < config.epochs:
            start = time.perf_counter()
            plan = planned.result()
            planned = beside.submit(epoch_plan, config, len(train), state.epoch + 1)
            bar.set_description(f"epoch {state.epoch + 1}/{config.epochs}")
            loss, train_accuracy = train_one_epoch(step, train, config, plan, bar)
            trained = time.perf_counter() - start
            row = {"epoch": state.epoch, "learning_rate": learning_rate(config, state.epoch)}
            row |= {"train_loss": loss, "train_accuracy": train_accuracy}
            row |= _watched("validation", validation, state, config)
            row |= _watched("test", test if config.watch_test else None, state, config)
            state.history.append(row)
            state.epoch += 1
            seconds = time.perf_counter() - start
            timing.append(
                {
                    "epoch": row["epoch"],
                    "seconds": seconds,
                    "images_per_second": len(train) / trained,
                }
            )
            if ranks.rank() == 0:
                if written is not None:
                    written.result()  # raises what went wrong with it
                written = beside.submit(_write_epoch, run, state.content(), list(timing))
            log(_line(row, timing[-1], config.epochs))
        if written is not None:
            written.result()
    if state.history and ranks.rank() == 0:
        run.write_rows(
            "history.csv", state.history
        )  # a kill after the last checkpoint may have left it a row short


def _write_epoch(run: RunDirectory, content: dict, timing: list[dict]) -> None:
    run.save(content)
    run.write_rows("history.csv", content["history"])
    run.write_rows("timing.csv", timing)


def _read_timing(run: RunDirectory, epochs: int) -> list[dict]:
    """The rows of the epochs that the checkpoint holds."""
    path = run.path / "timing.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["epoch"]) < epochs]


def _logits(model: ResNet, images: ImageSet, config: TrainConfig) -> Tensor:
    """All logits, on every rank, each rank computing a share."""
    share = images.images[ranks.rank() :: config.ranks]
    logits = predict(model, share, config.test_mean, config.test_std, config.precision)
    return ranks.interleave(logits, len(images))


def _watched(
    name: str, images: ImageSet | None, state: State, config: TrainConfig
) -> dict[str, float | None]:
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
