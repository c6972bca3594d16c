"""Several processes that share each batch of one run, as `torchrun` starts them; else one."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from cifar_lib.errors import explained


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Within it this process is one of those that torchrun started, if it did; gives its device.
    InputError where torchrun's variables are incomplete, or the others can't be met or stop."""
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    remedy = "start all of them with torchrun, or unset WORLD_SIZE"
    kinds = (KeyError, ValueError, RuntimeError)
    with explained("ranks: can't meet the other processes", remedy, *kinds):
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
            torch.cuda.set_device(device)
        patience = timedelta(hours=3)  # the first one may have to download the data
        dist.init_process_group("nccl" if "cuda" in device else "gloo", timeout=patience)
    try:
        with explained("ranks: one of them stopped", "start the same command again", RuntimeError):
            yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
