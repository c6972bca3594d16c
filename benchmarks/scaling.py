"""How training time grows with the number of images, the number of epochs, and the network's width.

    python -m benchmarks.scaling [--device cuda] [--json]

Each row multiplies one of them by several factors and fits time = constant * factor^exponent. An
exponent of 1 means that time is proportional to the factor. A layer's multiply-adds grow with the
square of the width.
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
    """Return how long `config.epochs` epochs take: the shortest of `rounds` times.

    One epoch before them warms up.
    """
    state = State(config, device)
    step, times = Step(state), []

    def run_epochs(n: int) -> None:
        for epoch in range(n):
            train_one_epoch(step, train, epoch)
        synchronize(device)

    run_epochs(1)
    for _ in range(rounds):
        start = time.perf_counter()
        run_epochs(config.epochs)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Measure each row, and record the times and exponents."""
    arguments, device = parse(__doc__, rounds=2)

    # Where each row starts: a GPU gets more images, and the report's network.
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

    # Multiply the images, the epochs or the width by each factor, and leave the other two.
    rows = []
    for what in ("images", "epochs", "width"):
        times = []
        for factor in factors:
            config = replace(base, epochs=factor) if what == "epochs" else base
            if what == "width":  # on a GPU the largest factor gives the report's width
                first = width * factor // (max(factors) if device.type == "cuda" else 1)
                config = replace(base, channels=(first, 2 * first, 4 * first))
            n = images * factor if what == "images" else images
            times.append(seconds(train[slice(n)], config, device, arguments.rounds))

        # log time = exponent * log factor + constant: a line, whose slope is the exponent.
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
