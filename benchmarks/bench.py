"""What the benchmarks share: options, the machine they ran on, peaks of memory and arithmetic,
tables and files."""

import argparse
import json
import re
import resource
import statistics
import sys
import time
from pathlib import Path

import pandas as pd
import torch

from cifar_lib.data import ImageSet, find_cifar10, load_cifar10
from cifar_lib.errors import InputError
from cifar_lib.files import write_atomically
from cifar_lib.hardware import DTYPES, choose_device, describe
from notebooks.course.stand_in import generate_stand_in

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "benchmarks"
# Of a training image: forward, and twice that backward; two for a multiply-add.
FLOP_PER_IMAGE = 3 * 2 * 769.05e6


def parse(description: str, rounds: int) -> tuple[argparse.Namespace, torch.device]:
    """The options that all benchmarks have, and the device."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--rounds", type=int, default=rounds, help="after one to warm up")
    parser.add_argument("--json", action="store_true", help="print the object that is written")
    parser.add_argument(
        "--dry-run", action="store_true", help="one round on few images, and nothing is written"
    )
    arguments = parser.parse_args()
    try:
        if arguments.rounds < 1:
            raise InputError(f"--rounds: expected at least 1, got {arguments.rounds}")
        arguments.rounds = 1 if arguments.dry_run else arguments.rounds
        return arguments, choose_device(arguments.device)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


def training_images(n: int) -> ImageSet:
    """The first n, of CIFAR-10 where it is, else generated: speed doesn't depend on what they
    show."""
    return load_cifar10()[0][slice(n)] if find_cifar10() else generate_stand_in(n, 1)[0]


def hardware(device: torch.device) -> dict:
    capability = torch.backends.cpu.get_cpu_capability()
    return {**describe(device), "cpu_instructions": capability}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product, the most that this device shows here."""
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
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory(device: torch.device) -> float:
    """GB since the last reset: allocated on a GPU; on a CPU, resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "linux":
        return (
            int(
                re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[
                    1
                ]
            )
            * 1024
            / 1e9
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def ratio(theirs: list[float], ours: list[float]) -> float:
    """The median over rounds of ours / theirs."""
    return statistics.median(b / a for a, b in zip(theirs, ours, strict=True))


def record(name: str, result: dict, arguments: argparse.Namespace) -> None:
    """Write the result under the hardware's name, and print it."""
    machine = result["hardware"]
    label = (
        machine["gpu"]
        or f"{machine['cpu']} {machine['cpu_cores']} cores {machine['cpu_instructions']}"
    )
    path = RESULTS / f"{name}-{re.sub('[^a-z0-9]+', '-', label.lower()).strip('-')}.json"
    if not arguments.dry_run:
        write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{name} on {label}, torch {machine['torch']}{' (dry run)' if arguments.dry_run else ''}")
    print(pd.DataFrame(result["rows"]).to_string(index=False, float_format="{:,.3g}".format))
    if "ratio" in result:
        print(f"ratio (ours / published): {result['ratio']:.3g}")
