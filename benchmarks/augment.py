"""Augmentation, in images per second: torchvision's transforms on single PIL pictures, and ours.

    python -m benchmarks.augment [--device cuda] [--json]

Both crop, flip, apply RandAugment(2, 9), erase and normalise, with random numbers of its own for
each image. On a CPU both have one thread. Whatever needs more than its plain definition to be fast
there is also timed against a simple version (benchmarks/plain.py).
"""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import plain
from benchmarks.baseline_loop import Pictures
from benchmarks.bench import (
    hardware,
    parse,
    peak_memory,
    ratio,
    record,
    reset_peak_memory,
    synchronize,
    training_images,
)
from cifar_lib import augment as steps
from cifar_lib import operations
from cifar_lib.augment import Policy, augment, draw, op_table
from cifar_lib.data import CIFAR10_MEAN, PUBLISHED_STD, Normalization, rescale
from cifar_lib.train import BATCHES_TOGETHER

BATCH = 128


def ours(images: torch.Tensor, epoch: int) -> None:
    """Augment and normalise images, uint8 (n, 3, 32, 32), as an epoch of training does."""
    policy, normalization = Policy(), Normalization(CIFAR10_MEAN, PUBLISHED_STD)
    draws = draw(len(images), policy, seed=42, epoch=epoch)
    chunk = BATCHES_TOGETHER[images.device.type] * BATCH
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        for batch in augment(images[part], policy, draws[part]).split(BATCH):
            normalization(batch)


def gains(images: torch.Tensor, rounds: int) -> dict[str, float]:
    """Return how many times as fast as its simple version each function is, the median over rounds.

    images: uint8 (n, 3, 32, 32), on the CPU.
    """
    policy = Policy()
    draws, table = draw(len(images), policy, seed=42, epoch=0), op_table(policy)
    # An operation is called with the images that have drawn it, so about one in 14.
    group = images[: len(images) // 14]
    scale_and_offset = Normalization(CIFAR10_MEAN, PUBLISHED_STD).scale_and_offset(images.device)

    # Our version, the simple one, and what both are called with.
    pairs = {
        "crop": (steps.crop, plain.crop, (images, draws.offsets, policy.crop_padding)),
        "flip": (steps.flip, plain.flip, (images, draws.mirrored)),
        "apply_ops": (steps.apply_ops, plain.apply_ops, (images, table, draws.ops)),
        "erase": (steps.erase, plain.erase, (images, draws.boxes)),
        "move": (operations.move, plain.move, ("Rotate", group, 9.0)),
        "solarize": (operations.solarize, plain.solarize, (group, 178.5)),
        "equalize": (operations.equalize, plain.equalize, (group, 0.0)),
        "to_uint8": (operations.to_uint8, plain.to_uint8, (group.float(),)),
        "rescale": (rescale, plain.rescale, (images[:BATCH], *scale_and_offset)),
    }
    found = {}
    for name, (own, simple, given) in pairs.items():
        # The first round warms up.
        times = [(seconds(own, given), seconds(simple, given)) for _ in range(rounds + 1)][1:]
        found[name] = statistics.median(longer / shorter for shorter, longer in times)
    return found


def seconds(step: Callable, arguments: tuple) -> float:
    """Return how long the fastest of three calls takes."""
    fastest = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        step(*arguments)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def main() -> None:
    """Measure both, and record the medians and their ratio."""
    arguments, device = parse(__doc__, rounds=5)
    if device.type == "cpu":
        torch.set_num_threads(1)

    # The published transforms are slow, so they get fewer images.
    theirs_n, ours_n = (64, 512) if arguments.dry_run else (2000, 50_000)
    train = training_images(ours_n)
    pictures = Pictures(train[slice(theirs_n)])
    images = train.images.to(device)

    # Both take turns, so that whatever else the machine does slows both down.
    rates: dict[str, list[float]] = {"published": [], "ours": []}
    extra = 0.0  # GB
    for epoch in range(arguments.rounds + 1):
        start = time.perf_counter()
        for i in range(theirs_n):
            pictures[i]
        rates["published"].append(theirs_n / (time.perf_counter() - start))

        reset_peak_memory(device)
        before = peak_memory(device)
        start = time.perf_counter()
        ours(images, epoch)
        synchronize(device)
        rates["ours"].append(ours_n / (time.perf_counter() - start))
        extra = max(extra, peak_memory(device) - before)

    # The first round warms up, and doesn't count.
    measured = {name: values[1:] for name, values in rates.items()}
    rows = [
        {"loop": name, "images_per_second": statistics.median(values)}
        for name, values in measured.items()
    ]
    result = {
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
    }
    result |= {
        "images": {"published": theirs_n, "ours": ours_n},
        "extra_memory_gb": extra,
        "rows": rows,
    }
    if device.type == "cpu":
        result["gains_over_plain"] = gains(
            images[: BATCHES_TOGETHER["cpu"] * BATCH], arguments.rounds
        )
    record(
        "augment",
        {**result, "ratio": ratio(measured["published"], measured["ours"]), "rates": measured},
        arguments,
    )


if __name__ == "__main__":
    main()
