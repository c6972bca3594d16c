"""A run directory that survives being killed at any moment.

config.json             what is trained, on which data; a run with another config is refused
environment.json        the hardware and the versions of the last start
history.csv             one row per epoch, accuracies as fractions; a kill doesn't change its bytes
timing.csv              one row each time an epoch is trained: seconds and images per second
checkpoint.pt           the newest checkpoint: all that is needed to resume, and its sha256
checkpoint.previous.pt  the checkpoint before it
checkpoint.damaged.pt   a checkpoint that couldn't be read, if there was one
model.safetensors       the final weights
metrics.json            the scores of the final weights
.lock                   held by the process that trains
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

FORMAT = 3  # the version of a checkpoint's content; other versions can't be used
DIGEST_SIZE = hashlib.sha256().digest_size  # bytes; a checkpoint ends with its digest


class RunDirectory:
    """The files of one training run.

    A `with` block holds the directory: only one process at a time can be inside. If the file
    system has no locks, a warning says so, and the block is entered without a lock.

    Entering raises InputError if the folder can't be written, holds something other than a run, or
    is held by another process.
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
        """Return the name of this directory in error messages."""
        return f"run directory: {self.path}"

    def _refuse_other_folders(self) -> None:
        """Raise InputError if the folder has files, but no config.json of a run."""
        files = {path.name for path in self.path.iterdir() if not path.match(SCRATCH)} - {".lock"}
        if files and "recipe" not in (self.read_json("config.json") or {}):
            raise InputError(
                f"{self._where} holds {min(files)!r}, but no run's config.json: choose another"
            )

    def _take_lock(self) -> None:
        """Take the lock at once; raise InputError if another process holds it."""
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise InputError(
                f"{self._where}: another process is training in it: wait for it"
            ) from error
        except (OSError, NotImplementedError) as error:  # a mounted Drive, say, has no locks
            why = getattr(error, "strerror", None) or error
            message = f"{self._where} can't be locked ({why}): start only one training in it"
            warnings.warn(message, stacklevel=3)

    def _remove_scratch(self) -> None:
        """Remove the half-written files of a process that was killed."""
        for scratch in self.path.glob(SCRATCH):
            if scratch.is_file():
                scratch.unlink()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the object in the JSON file `name`, or None if there is no such file.

        Raises InputError if the file can't be read.
        """
        path = self.path / name
        if not os.path.lexists(path):
            return None
        with explained(f"{path} can't be read", "restore it, or choose another run"):
            return parse_object(read_regular(path, limit=10**7))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write `content` as the JSON file `name`.

        Raises InputError if the file can't be written.
        """
        write_atomically(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def write_rows(self, name: str, rows: list[dict], append: bool = False) -> None:
        """Write rows, which all have the same keys, as the CSV file `name`.

        None becomes an empty field. With `append` the rows are added to those already in the file.

        Raises InputError if the file can't be written.
        """
        path = self.path / name
        before = path.read_bytes() if append and path.is_file() else b""
        text = pd.DataFrame(rows).to_csv(index=False, header=not before, lineterminator="\n")
        write_atomically(path, before + text.encode())

    def save(self, state: dict) -> None:
        """Write `state` as checkpoint.pt, from which `load` reads it.

        Raises InputError if the file can't be written; the checkpoints before it are still there.
        """
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **state}, buffer)
        content = buffer.getvalue()
        content += hashlib.sha256(content).digest()

        # Two renames: the old checkpoint becomes the previous one, and the new file becomes the
        # checkpoint. A kill between them leaves no checkpoint.pt, and `load` takes the previous
        # one. So there is a whole checkpoint at every moment, and no file is copied.
        previous = self.path / "checkpoint.previous.pt"
        write_atomically(self.path / "checkpoint.pt", content, keep=previous)

    def load(self) -> dict | None:
        """Return the newest usable checkpoint, its tensors on the CPU, or None if there is none.

        If the newest one can't be used, because it is damaged or of another FORMAT, it is renamed
        to checkpoint.damaged.pt, a warning says so, and the one before it is returned.

        Raises InputError if there are checkpoints, but none can be used.
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
            if damage:  # if it stayed, the next save would make it the previous checkpoint
                os.replace(self.path / "checkpoint.pt", self.path / "checkpoint.damaged.pt")
                what = f"{damage[0]}; renamed to checkpoint.damaged.pt, resuming from {name}"
                warnings.warn(f"{self.path}: {what}", stacklevel=2)
            return state
        if damage:
            what = f"{self.path}: no usable checkpoint ({'; '.join(damage)})"
            raise InputError(f"{what}: restore one, or choose another run")
        return None


def _read_checkpoint(path: Path) -> dict:
    """Return the state that `save` wrote to `path`.

    Raises OSError if the file can't be read, ValueError if it isn't a checkpoint of this FORMAT.
    """
    content = read_regular(path, limit=10**9)
    payload, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError("damaged (its sha256 differs)")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # a file that torch.save didn't write can raise almost anything
        raise ValueError(f"unreadable ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"not a checkpoint of format {FORMAT}, which this version reads")
    return state
