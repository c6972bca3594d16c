"""What the code runs on: the device, the precision it is good for, and a description of both."""

import contextlib
import ctypes
import os
import platform
import subprocess
from pathlib import Path

import psutil
import torch
import torchvision

from cifar_lib.errors import InputError, explained

try:
    import cifar_winograd  # extras/winograd: optional, fast fp32 convolutions on CPUs
except ImportError:
    cifar_winograd = None

CPUINFO = Path("/proc/cpuinfo")  # on Linux
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *DTYPES)


def choose_device(name: str = "auto") -> torch.device:
    """`auto`: a CUDA or Apple GPU if there is one, else the CPU; InputError for one not here."""
    if name == "auto":
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((kind for kind in found if found[kind]), "cpu")
    what = f"device: expected auto, cpu, cuda, cuda:N or mps, present on this machine; got {name!r}"
    kinds = (RuntimeError, AssertionError, ImportError)
    with explained(what, "use --device auto or cpu", *kinds):
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not supported")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current device
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """`auto`: bf16 where the hardware computes in it, fp16 on an older CUDA GPU (a T4), else fp32;
    InputError for an unknown one."""
    if name not in PRECISIONS:
        raise InputError(f"precision: expected one of {', '.join(PRECISIONS)}; got {name!r}")
    if name != "auto":
        return name
    if device.type == "cuda":  # is_bf16_supported() is also true where bf16 is only emulated
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    flags = _cpuinfo("flags").split()
    has_bf16 = device.type == "cpu" and ("avx512_bf16" in flags or "amx_bf16" in flags)
    return "bf16" if has_bf16 else "fp32"


def prepare(device: torch.device, precision: str) -> None:
    """Set this process up to compute fast on `device`.

    On a CPU glibc's malloc keeps the memory of large tensors for the next ones; getting it anew,
    page by page, takes a quarter of a training step. On CUDA cuDNN looks for its fastest kernels,
    and fp32 products may use TF32, as convolutions there do (NVIDIA_TF32_OVERRIDE=0: none).
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the end before they are given back
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        if precision == "fp32":
            torch.set_float32_matmul_precision("high")


def computing(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context of every forward pass: `precision`, or the fast convolutions if installed."""
    if precision != "fp32":
        # No weight is used twice in a pass, so conversions need not be remembered.
        return torch.autocast(device.type, DTYPES[precision], cache_enabled=False)
    if cifar_winograd is None or device.type != "cpu" or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return cifar_winograd.Winograd()


def describe(device: torch.device) -> dict[str, str | float | int | None]:
    """The machine and the versions, as the report's System Specifications; memory in GB (10^9)."""
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
