"""What the benchmarks share: their options, what they measure of the machine, and their records."""

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import torch

from cifar_lib.data import ImageSet, find_cifar10, load_cifar10
from cifar_lib.errors import InputError
from cifar_lib.files import write_atomically
from cifar_lib.hardware import DTYPES, choose_device, describe
from notebooks.course.stand_in import generate_stand_in

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "benchmarks"
# The floating-point operations that training takes per image. The network makes 769.05 million
# multiply-adds, of two operations each. Going backward takes twice as many as going forward: so
# both together take three times as many.
FLOP_PER_IMAGE = 3 * 2 * 769.05e6


def parse(description: str, rounds: int, **more: dict) -> tuple[argparse.Namespace, torch.device]:
    """Read the options that all benchmarks have. Return them, and the device that they choose.

    more: further options by their names, each as the keywords of `add_argument`.

    Ends the program with exit code 2 and one line if an option is wrong.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--rounds", type=int, default=rounds, help="after one to warm up")
    parser.add_argument("--json", action="store_true", help="print the object that is written")
    parser.add_argument(
        "--dry-run", action="store_true", help="one round on few images, and nothing is written"
    )
    for name, how in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **how)
    arguments = parser.parse_args()
    try:
        if arguments.rounds < 1:
            raise InputError(f"--rounds: expected at least 1, got {arguments.rounds}")
        arguments.rounds = 1 if arguments.dry_run else arguments.rounds
        return arguments, choose_device(arguments.device)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


def training_images(n: int) -> ImageSet:
    """Return the first n training images of CIFAR-10 if it is found, else n generated ones.

    How fast a program is doesn't depend on what the images show.
    """
    return load_cifar10()[0][slice(n)] if find_cifar10() else generate_stand_in(n, 1)[0]


def hardware(device: torch.device) -> dict:
    """Return the description of the device that `record` expects, for JSON."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {**describe(device), "cpu_instructions": capability}


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA GPU has done all that it was told to do; then the clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, precision: str) -> float:
    """Return the operations per second of a large matrix product, the fastest of six."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=DTYPES[precision])
    best = 0.0
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the system can do that: on CUDA GPUs and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory(device: torch.device) -> float:
    """Return the most memory since the last reset, in GB.

    On a CUDA GPU it is what PyTorch has allocated there, else what this process has in RAM.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        kibibytes = int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # the peak of resident memory
        return kibibytes * 1024 / 1e9
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # Windows has no such module

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # on macOS in bytes


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Return how many times as large our rate is as theirs, the median over rounds."""
    pairs = zip(theirs, ours, strict=True)
    return statistics.median(own / other for other, own in pairs)


def record(name: str, result: dict, arguments: argparse.Namespace) -> None:
    """Write the result of the benchmark `name` to a file named by the hardware, and print it.

    `result` has the table in `rows` and the machine in `hardware`. A dry run writes no file.
    """
    machine = result["hardware"]
    cpu = f"{machine['cpu']} {machine['cpu_cores']} cores {machine['cpu_instructions']}"
    label = machine["gpu"] or cpu

    # Write it, under a name of small letters, digits and hyphens.
    slug = re.sub("[^a-z0-9]+", "-", label.lower()).strip("-")
    path = RESULTS / f"{name}-{slug}.json"
    if not arguments.dry_run:
        write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())

    # Print it, as JSON or for people.
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{name} on {label}, torch {machine['torch']}{' (dry run)' if arguments.dry_run else ''}")
    print(pd.DataFrame(result["rows"]).to_string(index=False, float_format="{:,.3g}".format))
    if "ratio" in result:
        print(f"ratio (ours / published): {result['ratio']:.3g}")
