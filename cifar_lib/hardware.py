"""What the code runs on: the device, the precision it is good for, and a description of both."""

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import psutil
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from cifar_lib.errors import InputError, explained, printable

APPLE_GPU = "mps"  # the type of torch's device for it
DEVICE_TYPES = ("cpu", "cuda", APPLE_GPU)
CPUINFO = Path("/proc/cpuinfo")  # on Linux
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *DTYPES)
# Against the torch at hand, and without installing another torch first.
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ./extras/winograd"


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of this name, once a small computation on it has given the right result.

    `auto` is a CUDA GPU, else an Apple GPU, else the CPU. It passes over a GPU that is present and
    can't compute; one line on standard error, once per process, says why.

    Raises InputError if a device was named that is unknown, isn't here, or can't compute.
    """
    if name == "auto":
        return _first_that_computes()
    what = f"device: expected auto, cpu, cuda, cuda:N or mps, working on this machine; got {name!r}"
    kinds = (RuntimeError, AssertionError, ImportError)
    with explained(what, "use --device auto or cpu", *kinds):
        device = torch.device(name)
        if device.type not in DEVICE_TYPES:
            raise RuntimeError("not supported")
        failure = _failure(device)
        if failure is not None:
            raise RuntimeError(failure)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current device
    return device


@functools.cache
def _first_that_computes() -> torch.device:
    """What `auto` stands for. As this is cached, the line about a broken GPU comes once."""
    gpus = {"cuda": torch.cuda.is_available(), APPLE_GPU: torch.backends.mps.is_available()}
    for kind in filter(gpus.get, gpus):  # those that are present
        device = torch.device(kind)
        failure = _failure(device)
        if failure is None:
            return device
        line = f"device: {kind} is here but can't compute ({failure}): going on without it"
        print(printable(line), file=sys.stderr)
    return torch.device("cpu")


@functools.cache
def _failure(device: torch.device) -> str | None:
    """Why nothing can be computed on `device`, in one line; None where it can.

    Kaggle's P100 is a GPU that `torch.cuda.is_available` finds, and on which memory can be had. But
    torch is no longer compiled for it: that shows when a kernel starts, or its result is read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of such a GPU in many lines
            result = _small_computation(device)
    except Exception as error:  # whatever a driver or a library raises
        return _first_line(error)
    return None if result == 10.0 else f"3 x 3 + 1 came out as {result}"


def _small_computation(device: torch.device) -> float:
    """A convolution over nine ones, and 1 added: 10 where kernels run."""
    ones = torch.ones(1, 1, 3, 3, device=device)
    return (F.conv2d(ones, ones) + 1).item()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the order in memory of images and weights on `device`, for what the network computes.

    Channels-last is the fast one on CPUs and CUDA GPUs. On an Apple GPU the backward pass of batch
    normalisation gives wrong gradients for it, without a word (macOS 14), or an error (macOS 26):
    pytorch/pytorch#175189 and #181411, mended by #188371 after torch 2.12.
    """
    return torch.contiguous_format if device.type == APPLE_GPU else torch.channels_last


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return a copy of CPU `values` on `device`. The host of a CUDA GPU doesn't wait for it.

    An Apple GPU would read them after they may have been freed, and compute with what lies there by
    then: pytorch/pytorch#139550 and #189690. There the host waits.
    """
    return values.to(device, non_blocking=device.type != APPLE_GPU)


def choose_precision(name: str, device: torch.device) -> str:
    """Return the precision of this name: fp32, bf16 or fp16.

    `auto` is bf16 where the hardware computes in it, fp16 on an older CUDA GPU (a T4), else fp32.

    Raises InputError for another name.
    """
    if name not in PRECISIONS:
        raise InputError(f"precision: expected one of {', '.join(PRECISIONS)}; got {name!r}")
    if name != "auto":
        return name
    if device.type == "cuda":  # is_bf16_supported() is also true where bf16 is only emulated
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    flags = _cpuinfo("flags").split()
    has_bf16 = device.type == "cpu" and ("avx512_bf16" in flags or "amx_bf16" in flags)
    return "bf16" if has_bf16 else "fp32"


def _load_winograd() -> tuple[ModuleType | None, str | None]:
    """The optional fast fp32 convolutions for CPUs (extras/winograd), or None; and, where they are
    installed and can't be used, why."""
    if importlib.util.find_spec("cifar_winograd") is None:
        return None, None
    # It is compiled against one torch. Loaded into another one it may end the process, at once or
    # in the middle of training: so its record of that torch is read first.
    try:
        from cifar_winograd_build import TORCH as built_with
    except ImportError:
        return None, "it doesn't say which torch it was built with"
    if built_with != torch.__version__:
        return None, f"it was built with torch {built_with}, this is torch {torch.__version__}"
    try:
        import cifar_winograd
    except (ImportError, OSError, AttributeError) as error:
        return None, f"it can't be loaded: {_first_line(error)}"
    return cifar_winograd, None


cifar_winograd, winograd_failure = _load_winograd()


@functools.cache
def _say_that_winograd_is_not_used(why: str) -> None:
    """Once in a process: one line on standard error."""
    line = f"extras/winograd isn't used, fp32 is slower without it ({why}): {REBUILD}"
    print(printable(line), file=sys.stderr)


def prepare(device: torch.device, precision: str) -> None:
    """Set this process up to compute fast on `device`.

    Where extras/winograd would be used and can't be, a line on standard error says why.
    """
    if device.type == "cpu" and winograd_failure and choose_precision(precision, device) == "fp32":
        _say_that_winograd_is_not_used(winograd_failure)

    # glibc's malloc keeps the memory of large tensors for the next ones: getting it anew, page by
    # page, takes a quarter of a training step.
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the end before they are given back

    # cuDNN looks for its fastest kernels, and fp32 products may use TF32, as its convolutions do
    # (NVIDIA_TF32_OVERRIDE=0 forbids both).
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        if precision == "fp32":
            torch.set_float32_matmul_precision("high")


def computing(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context of every forward pass: `precision`, and fast convolutions if installed."""
    if precision != "fp32":
        # No weight is used twice in a pass, so conversions need not be remembered.
        return torch.autocast(device.type, DTYPES[precision], cache_enabled=False)
    if cifar_winograd is None or device.type != "cpu" or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return cifar_winograd.Winograd()


def describe(device: torch.device) -> dict[str, str | float | int | None]:
    """Return what a run depends on, as the report's System Specifications; memory in GB (10^9)."""
    on_gpu = device.type == "cuda"
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))  # Linux only
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cpu_cores": len(affinity(0)),  # those that this process may use
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 2),
        "device": str(device),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "winograd": cifar_winograd is not None,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _cpuinfo(field: str) -> str:
    """What Linux says of the first core."""
    if not CPUINFO.exists():
        return ""
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(field))
    return next(found, "")


def _commit() -> str | None:
    """The commit this package is checked out at, `+changes` if it differs; None elsewhere."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    describe = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *describe], capture_output=True, encoding="utf-8"
        )
    except OSError:  # git isn't installed
        return None
    return done.stdout.strip() or None
