"""Augmentation, images a second: torchvision's transforms on PIL pictures one by one, and ours.

    python benchmarks/augment.py [--device cuda] [--json]

Both crop, flip, RandAugment(2, 9), erase and normalise, each image by its own draws. On a CPU both
have one thread.
"""

import statistics
import time

import torch
from bench import (
    hardware,
    parse,
    peak_memory,
    publish,
    ratio,
    reset_peak_memory,
    synchronize,
    training_images,
)
from published import Pictures

from cifar_lib.augment import Policy, augment, draw
from cifar_lib.data import CIFAR10_MEAN, PUBLISHED_STD, normalize
from cifar_lib.train import BLOCK

BATCH = 128


def ours(images: torch.Tensor, epoch: int) -> None:
    policy = Policy()
    draws = draw(len(images), policy, seed=42, epoch=epoch)
    chunk = BLOCK[images.device.type] * BATCH
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        for batch in augment(images[part], policy, draws[part]).split(BATCH):
            normalize(batch, CIFAR10_MEAN, PUBLISHED_STD)


def main() -> None:
    arguments, device = parse(__doc__, rounds=5)
    if device.type == "cpu":
        torch.set_num_threads(1)
    theirs_n, ours_n = (64, 512) if arguments.dry_run else (2000, 50_000)
    train = training_images(ours_n)
    pictures = Pictures(train[slice(theirs_n)])
    images = train.images.to(device)
    rates: dict[str, list[float]] = {"published": [], "ours": []}
    extra = 0.0
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
    publish(
        "augment",
        {**result, "ratio": ratio(measured["published"], measured["ours"]), "rates": measured},
        arguments,
    )


if __name__ == "__main__":
    main()
