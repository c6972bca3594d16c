"""Several processes that share each batch of one run, as `torchrun` starts them; without it, one
rank of one."""

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cifar_lib.errors import InputError

T = TypeVar("T")
DOWNLOAD = timedelta(hours=3)  # how long the others may have to wait for the first one's


def join(device: str) -> str:
    """Meet the processes that torchrun started, if it did; returns this rank's device.

    Raises InputError where torchrun's environment variables are incomplete or the others can't be
    met.
    """
    if "WORLD_SIZE" not in os.environ:
        return device
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ.get(name, "") for name in names}
    wrong = [
        name
        for name in names
        if not (values[name].isdigit() or (name == "MASTER_ADDR" and values[name]))
    ]
    if wrong:
        raise InputError(
            f"{wrong[0]}: expected the value that torchrun sets, got {values[wrong[0]]!r}: start with torchrun, or "
            "unset WORLD_SIZE"
        )
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{int(values['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=DOWNLOAD)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"ranks: can't meet the other processes ({reason}): start all of them with torchrun"
        ) from error
    return device


def leave() -> None:
    if _several():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if _several() else 0


def count() -> int:
    return dist.get_world_size() if _several() else 1


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; an InputError of its is raised on every
    rank."""
    if not _several():
        return make()
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except InputError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]


def add(tensor: Tensor) -> None:
    """Make `tensor` its sum over the ranks."""
    if _several():
        dist.all_reduce(tensor)


def average(tensors: Iterable[Tensor]) -> None:
    """Make each floating-point tensor its mean over the ranks."""
    for tensor in tensors:
        if _several() and tensor.is_floating_point():
            mean = tensor.contiguous()
            dist.all_reduce(mean)
            tensor.copy_(mean / count())


def interleave(part: Tensor, n: int) -> Tensor:
    """The rows (n, ...) of which rank r holds `part`, every count()-th from the r-th; on the
    CPU."""
    if not _several():
        return part
    parts: list = [None] * count()
    dist.all_gather_object(parts, part)
    whole = torch.empty(n, *part.shape[1:], dtype=part.dtype)
    for i, rows in enumerate(parts):
        whole[i :: len(parts)] = rows
    return whole


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
