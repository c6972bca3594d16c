"""Ten training steps under PyTorch's profiler, as text: kernels, their times and their layouts.

    python -m benchmarks.profile_step [--device cuda] [--channel-multiple 8]

A GPU that waits between kernels is kept waiting by Python, and one CUDA graph for the whole step
would help. Kernels that convert between layouts, channels-last (nhwc) and contiguous (nchw), are
wasted: cuDNN then has no channels-last kernel for some convolution. Nothing is written to a file.
"""

import re

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench import hardware, parse, synchronize, training_images
from benchmarks.step_variants import TINY
from cifar_lib.fit import resolve
from cifar_lib.hardware import prepare
from cifar_lib.recipes import recipe
from cifar_lib.train import State, Step, train_one_epoch

STEPS = 10
ROWS = 40  # of the table of kernels
CONVERSION = re.compile(
    "nchwtonhwc|nhwctonchw|converttensor|tensortransform|transpose", re.IGNORECASE
)


def describe_kernels(kernels: list[tuple[str, float, float]]) -> list[str]:
    """Return lines about a GPU's kernels, which are (name, start, end), in microseconds."""
    if not kernels:
        return ["no kernels of a GPU were seen"]
    busy = sum(end - start for _, start, end in kernels)
    whole = max(end for _, _, end in kernels) - min(start for _, start, _ in kernels)

    def group(what: str, names: list[str]) -> str:
        time = sum(end - start for name, start, end in kernels if name in names)
        count = sum(name in names for name, _, _ in kernels)
        return f"{what}: {count / STEPS:g} kernels per step, {time / busy:.1%} of their time"

    names = sorted({name for name, _, _ in kernels})
    conversions = [name for name in names if CONVERSION.search(name)]
    others = [name for name in names if name not in conversions]
    return [
        f"{len(kernels) / STEPS:g} kernels per step; the GPU is busy for {busy / whole:.1%} of "
        f"{whole / STEPS:,.0f} microseconds per step",
        group("channels-last by their names", [n for n in others if "nhwc" in n.lower()]),
        group("contiguous by their names", [n for n in others if "nchw" in n.lower()]),
        group("conversions of the layout", conversions),
        *(f"  {name[:150]}" for name in conversions),
    ]


def main() -> None:
    """Profile, and print the table of kernels and what follows from it."""
    arguments, device = parse(
        __doc__, rounds=1, channel_multiple={"type": int, "default": 1, "help": "see padding.py"}
    )
    changes = TINY if arguments.dry_run else {}
    config = resolve(recipe("report", precision="auto", **changes), device, 50_000)
    prepare(device, config.precision)
    state = State(config, device, arguments.channel_multiple)
    step = Step(state)
    train = training_images(STEPS * config.batch_size).to(device)

    # The first epochs compile, search for kernels and fill caches.
    for epoch in range(1 if arguments.dry_run else 5):
        train_one_epoch(step, train, epoch)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        train_one_epoch(step, train, epoch=5)
        synchronize(device)

    machine = hardware(device)
    print(f"{STEPS} steps of {config.batch_size} images in {config.precision}, augmented; channels")
    print(f"{state.model.channels}; {machine['gpu'] or machine['cpu']}, torch {machine['torch']}\n")
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type == DeviceType.CUDA
    ]
    print("\n".join(describe_kernels(kernels)), end="\n\n")
    key = "self_device_time_total" if kernels else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=100))


if __name__ == "__main__":
    main()
