"""A run directory that survives being killed at any moment.

config.json             what is trained, on which data; another one is refused
environment.json        the hardware and versions of the last start
history.csv             one row per epoch, accuracies as fractions; the same bytes after any kill
timing.csv              a row for each epoch that was trained: seconds, images/s
checkpoint.pt           everything needed to go on, with its sha256
checkpoint.previous.pt  the one before
model.safetensors       the final weights
metrics.json            what they score
"""

import hashlib
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import torch

from cifar_lib.errors import InputError, explained
from cifar_lib.files import SCRATCH, open_lock, parse_object, read_regular, write_atomically

FORMAT = 3  # of a checkpoint
DIGEST_SIZE = hashlib.sha256().digest_size


class RunDirectory:
    """The files of one training run. As a context manager, only one process at a time holds it."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def __enter__(self) -> "RunDirectory":
        where = f"run directory: {self.path}"
        with explained(f"{where} can't be written", "choose another", OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            found = {p.name for p in self.path.iterdir() if not p.match(SCRATCH)} - {".lock"}
            if found and "recipe" not in (self.read_json("config.json") or {}):
                raise InputError(f"{where} holds {min(found)!r}, no config.json: choose another")
            self._lock = open_lock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise InputError(f"{where}: another process trains in it: wait for it") from error
        except (OSError, NotImplementedError) as error:  # a mounted Drive, say, has no locks
            why = getattr(error, "strerror", None) or error
            reason = f"{where} can't be locked ({why}): start only one training in it"
            warnings.warn(reason, stacklevel=2)
        for scratch in self.path.glob(SCRATCH):  # what a killed process was writing
            if scratch.is_file():
                scratch.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object that `name` holds, or None where it isn't there."""
        path = self.path / name
        if not os.path.lexists(path):
            return None
        with explained(f"{path} can't be read", "restore it, or choose another run"):
            return parse_object(read_regular(path, limit=10**7))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def write_rows(self, name: str, rows: list[dict], below: bool = False) -> None:
        """Write rows of equal keys as CSV, None as an empty field; `below`: under those there."""
        path = self.path / name
        before = path.read_bytes() if below and path.is_file() else b""
        text = pd.DataFrame(rows).to_csv(index=False, header=not before, lineterminator="\n")
        write_atomically(path, before + text.encode())

    def save(self, state: dict) -> None:
        """Write `state`, what `load` gives back, as checkpoint.pt."""
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **state}, buffer)
        content = buffer.getvalue()
        content += hashlib.sha256(content).digest()
        # Two renames: a kill between them leaves the newest as the previous one, and load() takes
        # it from there. So no moment is without a whole checkpoint, and none is copied.
        previous = self.path / "checkpoint.previous.pt"
        write_atomically(self.path / "checkpoint.pt", content, keep=previous)

    def load(self) -> dict | None:
        """The newest whole checkpoint, on the CPU; None where there is none yet.

        A damaged one is set aside as checkpoint.damaged.pt for the one before, with a warning;
        InputError where no other is left.
        """
        damage: list[str] = []
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            try:
                state = _read_checkpoint(self.path / name)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                damage.append(f"{name}: {error}")
                continue
            if damage:  # else the next save would make it the one before
                os.replace(self.path / "checkpoint.pt", self.path / "checkpoint.damaged.pt")
                warnings.warn(f"{self.path}: {damage[0]}; going on from {name}", stacklevel=2)
            return state
        if damage:
            what = f"{self.path}: no usable checkpoint ({'; '.join(damage)})"
            raise InputError(f"{what}: restore one, or choose another run")
        return None


def _read_checkpoint(path: Path) -> dict:
    content = read_regular(path, limit=10**9)
    payload, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError("damaged (its sha256 differs)")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # nearly any, where it is no file of torch.save
        raise ValueError(f"unreadable ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"no checkpoint of format {FORMAT}, which this version reads")
    return state
