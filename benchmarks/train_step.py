"""Training, in images per second, with augmentation included: the published loop, and ours.

    python -m benchmarks.train_step [--device cuda] [--json]

The published loop runs torchvision's transforms in two worker processes, computes in fp32 with
contiguous tensors, and reads the loss after every step. Ours has the same network, loss, optimizer
and distribution of images. It computes in the precision that is fast on the device. Each kind of
step is measured: plain, compiled, and with Winograd convolutions where they can be used. The one
that `fit` would take for 60 epochs is compared with the published loop.
"""

import statistics
import time
from dataclasses import replace

import torch

from benchmarks.baseline_loop import PublishedLoop
from benchmarks.bench import (
    FLOP_PER_IMAGE,
    hardware,
    matrix_rate,
    parse,
    peak_memory,
    ratio,
    record,
    reset_peak_memory,
    synchronize,
    training_images,
)
from cifar_lib import hardware as hardware_module
from cifar_lib.data import ImageSet
from cifar_lib.fit import resolve
from cifar_lib.hardware import prepare
from cifar_lib.recipes import TrainConfig, recipe
from cifar_lib.train import State, Step, train_one_epoch

WINOGRAD = hardware_module.cifar_winograd


class Ours:
    """Our training; each call trains for one epoch and returns images per second.

    With `winograd` the convolutions are those of extras/winograd, which must be installed then.
    """

    def __init__(self, train: ImageSet, config: TrainConfig, device: torch.device, winograd: bool):
        self.train, self.device, self.epoch = train.to(device), device, 0
        self.step = Step(State(config, device))
        self.convolutions = WINOGRAD if winograd else None

    def __call__(self) -> float:
        # Several of these take turns in one process, so each chooses its convolutions anew.
        hardware_module.cifar_winograd = self.convolutions
        synchronize(self.device)
        start = time.perf_counter()
        train_one_epoch(self.step, self.train, self.epoch)
        synchronize(self.device)
        self.epoch += 1
        return len(self.train) / (time.perf_counter() - start)


def main() -> None:
    """Measure all loops, and record the medians and the ratio."""
    arguments, device = parse(__doc__, rounds=5)

    # How many images an epoch has, for the published loop and for ours: whole batches.
    sizes = {"cpu": (512, 512), "cuda": (12_800, 49_920)}
    n = (256, 256) if arguments.dry_run else sizes.get(device.type, (2560, 2560))
    train = training_images(max(n))

    # The kinds of step, each as (whether to compile it, whether to use Winograd), and the kind that
    # `fit` would choose here.
    config = resolve(recipe("report", precision="auto"), device, 50_000)
    prepare(device, config.precision)
    chosen = "compiled" if config.compile else "plain"
    kinds = {"plain": (False, False), "compiled": (True, False)}
    if device.type == "cpu" and config.precision == "fp32" and WINOGRAD is not None:
        chosen = "winograd"
        kinds["winograd"] = (False, True)

    # Every loop, by its name.
    loops = {"published": PublishedLoop(train[slice(n[0])], device)}
    for kind, (compiled, winograd) in kinds.items():
        own = replace(config, compile=compiled)
        loops[kind] = Ours(train[slice(n[1])], own, device, winograd)

    # All loops take turns, so that whatever else the machine does slows all of them down.
    rates: dict[str, list[float]] = {name: [] for name in loops}
    memory = dict.fromkeys(loops, 0.0)  # GB
    peak = 0.0  # operations per second of a large matrix product
    for _ in range(arguments.rounds + 1):
        peak = max(peak, matrix_rate(device, config.precision))
        for name, loop in loops.items():
            reset_peak_memory(device)
            rates[name].append(loop())
            memory[name] = max(memory[name], peak_memory(device))

    # The first round warms up, and doesn't count.
    measured = {name: values[1:] for name, values in rates.items()}
    rows = [
        {
            "loop": name,
            "precision": "fp32" if name == "published" else config.precision,
            "images_per_second": statistics.median(values),
            "ratio": ratio(measured["published"], values),
            # It counts the multiplications of direct convolutions. Winograd's are fewer, so with
            # them the share may exceed 1.
            "share_of_matrix_rate": statistics.median(values) * FLOP_PER_IMAGE / peak,
            "peak_memory_gb": memory[name],
        }
        for name, values in measured.items()
    ]
    result = {
        "hardware": hardware(device),
        "rounds": arguments.rounds,
        "images": {"published": n[0], "ours": n[1]},
    }
    result |= {"matrix_gflops": peak / 1e9, "ours": chosen, "rows": rows, "rates": measured}
    record(
        "train_step", {**result, "ratio": ratio(measured["published"], measured[chosen])}, arguments
    )


if __name__ == "__main__":
    main()
