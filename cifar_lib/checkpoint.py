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
    """The files of one training run; as a context manager, one process at a time holds them.

    Entering raises InputError if the folder can't be written, holds something else, or is held by
    another process. Where the file system has no locks a warning says so.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def __enter__(self) -> "RunDirectory":
        with explained(f"{self._where} can't be written", "choose another", OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_other_folders()
            self._lock = open_lock(self.path / ".lock")
        self._take_lock()
        self._remove_scratch()
        return self

    @property
    def _where(self) -> str:
        return f"run directory: {self.path}"

    def _refuse_other_folders(self) -> None:
        """A folder with files, but without a run's config.json, holds something else."""
        files = {path.name for path in self.path.iterdir() if not path.match(SCRATCH)} - {".lock"}
        if files and "recipe" not in (self.read_json("config.json") or {}):
            raise InputError(
                f"{self._where} holds {min(files)!r}, but no config.json: choose another"
            )

    def _take_lock(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise InputError(f"{self._where}: another process trains in it: wait for it") from error
        except (OSError, NotImplementedError) as error:  # a mounted Drive, say, has no locks
            why = getattr(error, "strerror", None) or error
            reason = f"{self._where} can't be locked ({why}): start only one training in it"
            warnings.warn(reason, stacklevel=3)

    def _remove_scratch(self) -> None:
        """Remove what a process was writing when it was killed."""
        for scratch in self.path.glob(SCRATCH):
            if scratch.is_file():
                scratch.unlink()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the object that the JSON file `name` holds, or None if there is no such file.

        Raises InputError if it can't be read.
        """
        path = self.path / name
        if not os.path.lexists(path):
            return None
        with explained(f"{path} can't be read", "restore it, or choose another run"):
            return parse_object(read_regular(path, limit=10**7))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def write_rows(self, name: str, rows: list[dict], below: bool = False) -> None:
        """Write rows of equal keys as CSV, None as an empty field.

        With `below` they are added under those that the file has.
        """
        path = self.path / name
        before = path.read_bytes() if below and path.is_file() else b""
        text = pd.DataFrame(rows).to_csv(index=False, header=not before, lineterminator="\n")
        write_atomically(path, before + text.encode())

    def save(self, state: dict) -> None:
        """Write `state` as checkpoint.pt, for `load` to return."""
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **state}, buffer)
        content = buffer.getvalue()
        content += hashlib.sha256(content).digest()
        # Two renames: a kill between them leaves the newest as the previous one, and load() takes
        # it from there. So no moment is without a whole checkpoint, and none is copied.
        previous = self.path / "checkpoint.previous.pt"
        write_atomically(self.path / "checkpoint.pt", content, keep=previous)

    def load(self) -> dict | None:
        """Return the newest whole checkpoint, on the CPU, or None if there is none yet.

        A damaged one is set aside as checkpoint.damaged.pt, with a warning, for the one before.

        Raises InputError if no whole one is left.
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
    except Exception as error:  # torch.load raises nearly any, where torch.save wrote no such file
        raise ValueError(f"unreadable ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"not a checkpoint of format {FORMAT}, which this version reads")
    return state
