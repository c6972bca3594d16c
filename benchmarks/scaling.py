"""How training time grows with the number of images, of epochs, and with the network's width.

    python -m benchmarks.scaling [--device cuda] [--json]

Each row multiplies one of them and fits time = constant x factor^exponent: 1 is proportional. A
layer's multiply-adds grow with the square of the width.
"""

import time
from dataclasses import replace

import numpy as np
import torch

from benchmarks.bench import hardware, parse, record, synchronize, training_images
from cifar_lib.data import ImageSet
from cifar_lib.hardware import choose_precision
from cifar_lib.recipes import TrainConfig, recipe
from cifar_lib.train import State, Step, train_one_epoch


def seconds(train: ImageSet, config: TrainConfig, device: torch.device, rounds: int) -> float:
    """The least of `rounds` times for `config.epochs` epochs, after an epoch to warm up."""
    state = State(config, device)
    step, times = Step(state, config), []

    def epochs(n: int) -> None:
        for epoch in range(n):
            train_one_epoch(step, train, epoch)
        synchronize(device)

    epochs(1)
    for _ in range(rounds):
        start = time.perf_counter()
        epochs(config.epochs)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    arguments, device = parse(__doc__, rounds=2)
    images, batch, width = {"cuda": (12_800, 128, 66)}.get(device.type, (64, 32, 16))
    factors = (1, 2) if arguments.dry_run else (1, 2, 4)
    train = training_images(images * max(factors)).to(device)
    precision = choose_precision("auto", device)
    base = recipe(
        "report",
        epochs=1,
        batch_size=batch,
        precision=precision,
        channels=(width, 2 * width, 4 * width),
    )
    base = replace(base, compile=device.type == "cuda")
    rows = []
    for what in ("images", "epochs", "width"):
        times = []
        for factor in factors:
            config = replace(base, epochs=factor) if what == "epochs" else base
            if what == "width":  # the report's channels are the largest
                first = width * factor // (max(factors) if device.type == "cuda" else 1)
                config = replace(base, channels=(first, 2 * first, 4 * first))
            n = images * factor if what == "images" else images
            times.append(seconds(train[slice(n)], config, device, arguments.rounds))
        exponent = float(np.polyfit(np.log(factors), np.log(times), 1)[0])
        rows.append(
            {
                "what": what,
                **{f"x{f}_s": t for f, t in zip(factors, times, strict=True)},
                "exponent": exponent,
            }
        )
    start = {
        "images": images,
        "batch_size": batch,
        "blocks": base.blocks,
        "compile": base.compile,
        "precision": precision,
    }
    record("scaling", {"hardware": hardware(device), **start, "rows": rows}, arguments)


if __name__ == "__main__":
    main()
