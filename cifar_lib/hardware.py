"""The hardware that the code runs on: how a device and a precision are chosen and described."""

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import psutil
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from cifar_lib.errors import InputError, explained, printable

APPLE_GPU = "mps"  # torch's name for this type of device
DEVICE_TYPES = ("cpu", "cuda", APPLE_GPU)
CPUINFO = Path("/proc/cpuinfo")  # Linux's description of the CPU; other systems have no such file
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *DTYPES)
# This command builds extras/winograd with the installed torch, instead of downloading another one.
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ./extras/winograd"


def choose_device(name: str = "auto") -> torch.device:
    """Return the device with this name, after a small computation on it gave the right result.

    `auto` is a CUDA GPU if there is one, else an Apple GPU, else the CPU. A GPU that is present but
    can't compute is skipped; one line on standard error, once per process, says why.

    Raises InputError if `name` is neither `auto` nor a device that is present and can compute.
    """
    if name == "auto":
        return _first_that_computes()
    wanted = "auto, or a device that works on this machine (cpu, cuda, cuda:N or mps)"
    what = f"device: expected {wanted}; got {name!r}"
    with explained(what, "use --device auto or cpu", RuntimeError):
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
    """Return the device that `auto` stands for.

    The result is cached, so the line about a broken GPU is printed once.
    """
    gpus = {"cuda": torch.cuda.is_available(), APPLE_GPU: torch.backends.mps.is_available()}
    for kind in filter(gpus.get, gpus):  # those that are present
        device = torch.device(kind)
        failure = _failure(device)
        if failure is None:
            return device
        line = f"device: {kind} is present but can't compute ({failure}): continuing without it"
        print(printable(line), file=sys.stderr)
    return torch.device("cpu")


@functools.cache
def _failure(device: torch.device) -> str | None:
    """Return one line that says why `device` can't compute, or None if it can.

    Only a computation can tell. `torch.cuda.is_available` finds Kaggle's P100, and memory can be
    allocated on it, but torch is no longer compiled for it. The error comes only when a kernel
    starts, or when its result is read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has many lines of warnings about such a GPU
            result = _small_computation(device)
    except Exception as error:  # a driver or a library can raise anything
        return _first_line(error)
    return None if result == 10.0 else f"3 x 3 + 1 came out as {result}"


def _small_computation(device: torch.device) -> float:
    """Return the sum of 1 and the convolution of nine ones with nine ones: 10.0 if kernels run."""
    ones = torch.ones(1, 1, 3, 3, device=device)  # the image, and also the weights
    return (F.conv2d(ones, ones) + 1).item()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the order in memory that images and weights should have on `device`.

    Channels-last is the faster order on CPUs and CUDA GPUs. On an Apple GPU, the backward pass of
    batch normalisation doesn't support this order: it silently gives wrong gradients on macOS 14,
    and raises an error on macOS 26 (pytorch/pytorch#175189 and #181411, fixed by #188371 after
    torch 2.12).
    """
    return torch.contiguous_format if device.type == APPLE_GPU else torch.channels_last


def channel_multiple_for(device: torch.device) -> int:
    """Return the number of which channel counts should be multiples in training on `device`.

    Channels of zeros are added to get there (`cifar_lib.padding`). So far the number is 1 on every
    device, which adds none. NVIDIA's half-precision kernels are said to be fast only for multiples
    of 8. `benchmarks/step_variants.py` compares several numbers, but hasn't been run on a GPU yet;
    one that it shows to be at least 10 % faster belongs here.
    """
    return 1


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return `values`, a tensor on the CPU, as a tensor on `device`.

    Python doesn't wait until a CUDA GPU has its copy. It does wait for an Apple GPU, which would
    otherwise read the values after their memory may have been freed and used for something else
    (pytorch/pytorch#139550 and #189690).
    """
    return values.to(device, non_blocking=device.type != APPLE_GPU)


def choose_precision(name: str, device: torch.device) -> str:
    """Return the precision with this name: fp32, bf16 or fp16.

    `auto` is bf16 on CUDA GPUs of compute capability 8.0 or more and, on Linux, on x86 CPUs with
    instructions for bf16. It is fp16 on older CUDA GPUs, such as a T4, and fp32 everywhere else.

    Raises InputError if there is no precision with this name.
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
    """Return the module of the fast fp32 convolutions for CPUs (extras/winograd), and a reason.

    The module is optional: it is None if it isn't installed or can't be used. The reason says why
    an installed one can't be used, and is None otherwise.
    """
    if importlib.util.find_spec("cifar_winograd") is None:
        return None, None

    # It is compiled for one version of torch. With another one it can crash the process, at once or
    # in the middle of training. Therefore the version that it was built with is compared first.
    try:
        from cifar_winograd_build import TORCH as built_with
    except ImportError:
        return None, "it doesn't say which torch it was built with"
    if built_with != torch.__version__:
        return None, f"it was built with torch {built_with}, but this is torch {torch.__version__}"
    try:
        import cifar_winograd
    except (ImportError, OSError, AttributeError) as error:
        return None, f"it can't be loaded: {_first_line(error)}"
    return cifar_winograd, None


cifar_winograd, winograd_failure = _load_winograd()


@functools.cache
def _say_that_winograd_is_not_used(why: str) -> None:
    """Print one line on standard error. Because of the cache, each reason is printed only once."""
    line = f"extras/winograd isn't used, so fp32 is slower ({why}): {REBUILD}"
    print(printable(line), file=sys.stderr)


def prepare(device: torch.device, precision: str) -> None:
    """Set this process up to compute fast on `device`.

    If extras/winograd would be used but can't be, one line on standard error says why.
    """
    if device.type == "cpu" and winograd_failure and choose_precision(precision, device) == "fp32":
        _say_that_winograd_is_not_used(winograd_failure)

    # Let glibc's malloc keep the memory of large tensors for the next ones. Otherwise each
    # training step gets it from the system again, page by page.
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: a large tensor gets no mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return memory only if this many bytes are free

    # Let cuDNN search for its fastest kernels, and let fp32 matrix products use TF32, as cuDNN's
    # convolutions already do. Setting NVIDIA_TF32_OVERRIDE=0 forbids TF32 in both.
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        if precision == "fp32":
            torch.set_float32_matmul_precision("high")


@contextlib.contextmanager
def background_thread() -> Iterator[ThreadPoolExecutor]:
    """Yield a thread that works beside the training, on one core; the caller keeps all its cores.

    If it weren't limited to one core, the thread would start OpenMP threads of its own, and there
    would be more threads than cores. Then all threads, including the training's, sleep when they
    wait for each other. They wait many times in each step, which slows a small network down.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1) as thread:
        # A thread that computes for the first time takes the number of cores that was set last, by
        # whichever thread. So the background thread sets 1 and computes. Then this thread sets its
        # own number again, because otherwise the training, too, might run on one core.
        thread.submit(_compute_on_one_core).result()
        torch.set_num_threads(threads)
        yield thread


def _compute_on_one_core() -> None:
    """Limit this thread to one core, and compute something, so that the limit takes effect."""
    torch.set_num_threads(1)
    torch.ones(10**6).add_(1)


def computing(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context manager that every forward pass runs in.

    It sets the precision. For fp32 on a CPU, it switches on the fast convolutions of
    extras/winograd, if they can be used and torch.compile isn't at work.
    """
    if precision != "fp32":
        # Each weight is used once in a pass, so caching converted weights is of no use.
        return torch.autocast(device.type, DTYPES[precision], cache_enabled=False)
    if cifar_winograd is None or device.type != "cpu" or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return cifar_winograd.Winograd()


def describe(device: torch.device) -> dict[str, str | float | int | None]:
    """Return the hardware and the versions that a run depends on; memory is in GB (10^9 bytes).

    These are the rows of the report's System Specifications, and a few more.
    """
    on_gpu = device.type == "cuda"
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))  # only on Linux
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cpu_cores": len(affinity(0)),  # the cores that this process may use
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
    """Return Linux's value of this field for the first core, or "" if there is none."""
    if not CPUINFO.exists():
        return ""
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(field))
    return next(found, "")


def _commit() -> str | None:
    """Return the commit that this package is checked out at, or None outside of a git checkout.

    The commit ends with `+changes` if tracked files differ from it.
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, encoding="utf-8"
        )
    except OSError:  # git isn't installed
        return None
    return done.stdout.strip() or None
