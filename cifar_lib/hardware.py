"""What the code runs on: the device, the precision it is good for, and a description of both."""

import contextlib
import ctypes
import os
import platform
import subprocess
from pathlib import Path

import torch
import torchvision

from cifar_lib.errors import InputError

try:
    import cifar_winograd  # extras/winograd: optional, fast fp32 convolutions on CPUs
except ImportError:
    cifar_winograd = None

CPUINFO = Path("/proc/cpuinfo")  # on Linux
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *DTYPES)


def choose_device(name: str = "auto") -> torch.device:
    """`auto` takes a CUDA or Apple GPU if there is one, else the CPU.

    Raises InputError for a device that isn't here.
    """
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    expected = "expected auto, cpu, cuda, cuda:N or mps"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device: {expected}, present on this machine; got {name!r} ({reason}): "
            "use --device auto or cpu"
        ) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device: {expected}; got {name!r}: use --device auto")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current device
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """`auto`: bf16 where the hardware computes in it, fp16 on an older CUDA GPU (a T4), else fp32.

    Raises InputError for an unknown one.
    """
    if name not in PRECISIONS:
        raise InputError(f"precision: expected one of {', '.join(PRECISIONS)}; got {name!r}")
    if name != "auto":
        return name
    if device.type == "cuda":  # is_bf16_supported() is also true where bf16 is only emulated
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    flags = CPUINFO.read_text().split() if CPUINFO.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def prepare(device: torch.device, precision: str) -> str | None:
    """Set this process up to compute fast on `device`; returns what the user should know, if any.

    On CUDA cuDNN measures which of its kernels is fastest, and fp32 products may use TF32, which
    rounds their inputs to 10 bits, as PyTorch's convolutions there always have.
    """
    if device.type == "cpu":
        _keep_freed_memory()
    if device.type != "cuda":
        return None
    torch.backends.cudnn.benchmark = True
    if precision != "fp32" or os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return None
    torch.set_float32_matmul_precision("high")
    return "fp32 on this GPU uses TF32 where it has it; NVIDIA_TF32_OVERRIDE=0 computes in full"


def _keep_freed_memory() -> None:
    """Have glibc's malloc keep the memory of large tensors for the next ones.

    It would give it back to the system and get it anew, page by page, for every layer: at 128
    images of 32x32 that is a quarter of a training step. Elsewhere than on glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the end before they are given back


def computing(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context of every forward pass: `precision`, or the fast convolutions if installed."""
    if precision != "fp32":
        # No weight is used twice in a pass, so conversions need not be remembered.
        return torch.autocast(device.type, DTYPES[precision], cache_enabled=False)
    if cifar_winograd is None or device.type != "cpu" or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return cifar_winograd.Winograd()


def describe(device: torch.device) -> dict[str, str | float | int | None]:
    """The machine and the versions, as the report's System Specifications list them; memory in GB
    (10^9 bytes)."""
    on_gpu = device.type == "cuda"
    return {
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 2),
        "device": str(device),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "winograd": cifar_winograd is not None,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit this package is checked out at, `+changes` if the tree differs; None outside."""
    here = Path(__file__)
    commands = (
        ("ls-files", "--error-unmatch", here.name),  # no file of this package's: another repository
        ("rev-parse", "HEAD"),
        ("status", "--porcelain", "--untracked-files=no"),
    )
    run = {"cwd": here.parent, "capture_output": True, "text": True, "check": True, "timeout": 10}
    try:
        _, head, status = (subprocess.run(["git", *command], **run).stdout for command in commands)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+changes" if status.strip() else "")
