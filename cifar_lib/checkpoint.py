"""A run directory that survives being killed at any moment.

config.json        what is trained, on which data; another one is refused environment.json   the
hardware and versions of the last start history.csv        a row an epoch, accuracies as fractions;
the same bytes however often the run was interrupted timing.csv         a row an epoch: seconds and
images/s; what history.csv must leave out to be reproducible checkpoint.pt      everything needed to
go on, with its sha256; checkpoint.previous.pt: the one before model.safetensors  the final weights
metrics.json       what they score
"""

import csv
import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from cifar_lib.errors import InputError

FORMAT = 2
DIGEST_SIZE = hashlib.sha256().digest_size


def write_atomically(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replace `path` by `content`, on disk and whole, or leave it as it was; the old file becomes
    `keep`.

    Raises InputError where it can't write.
    """
    if os.path.isdir(path):
        raise InputError(f"can't write {path}: it is a folder: name a file")
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(scratch, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                _second_name(path, keep)
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise InputError(
            f"can't write {path} ({error.strerror}); nothing there was changed: choose another place or free the disk"
        ) from error


def _second_name(path: Path, name: Path) -> None:
    """Make `name` stand for the file at `path` too, so that at no moment there is no file at
    `path`."""
    spare = name.with_name(f".{name.name}.tmp")
    spare.unlink(missing_ok=True)
    try:
        try:
            os.link(path, spare)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, spare)
        os.replace(spare, name)
    finally:
        # Also after a success: where `name` already was this very file, as after a kill at this
        # point, rename does nothing and leaves both.
        spare.unlink(missing_ok=True)


class RunDirectory:
    """The files of one training run. Use as a context manager: one process at a time may hold
    it."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def __enter__(self) -> "RunDirectory":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise InputError(
                f"run directory: can't write into {self.path} ({error.strerror}): choose another"
            ) from error
        try:
            fcntl.flock(
                self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the kernel drops it when the process dies
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise InputError(
                f"run directory: process {holder} is training in {self.path}: wait for it, or choose another directory"
            ) from None
        except OSError as error:  # some network file systems have no locks
            self._lock.close()
            raise InputError(
                f"run directory: {self.path} can't be locked ({error.strerror}): choose one on a local disk"
            ) from error
        for scratch in self.path.glob(".*.tmp"):  # what a killed process was writing
            scratch.unlink(missing_ok=True)
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def read_json(self, name: str) -> Any:
        """The content of `name`, or None where it isn't there."""
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path / name} can't be read ({error}): restore it, or choose another run"
            ) from error

    def write_json(self, name: str, content: Any) -> None:
        write_atomically(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def write_rows(self, name: str, rows: list[dict]) -> None:
        """Write rows of equal keys as CSV; None becomes an empty field."""
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path / name, text.getvalue().encode())

    def save(self, state: dict) -> None:
        """Write `state` (nested dicts, lists, tensors, numbers, strings) as checkpoint.pt, and keep
        the one before."""
        buffer = io.BytesIO()
        torch.save(_canonical({"format": FORMAT, **state}), buffer)
        content = buffer.getvalue()
        content += hashlib.sha256(content).digest()
        write_atomically(
            self.path / "checkpoint.pt", content, keep=self.path / "checkpoint.previous.pt"
        )

    def load(self) -> dict | None:
        """The newest whole checkpoint, on the CPU; None where there is none yet.

        A missing or damaged one is passed over for the one before, with a warning; a damaged one is
        set aside as checkpoint.damaged.pt, so that the next save can't make it the one before.
        InputError where both are damaged.
        """
        damage: list[str] = []
        missing: list[str] = []
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            try:
                state = _read_checkpoint(self.path / name)
            except FileNotFoundError:
                missing.append(name)
                continue
            except (OSError, ValueError) as error:
                damage.append(f"{name}: {error}")
                continue
            if damage:
                os.replace(self.path / "checkpoint.pt", self.path / "checkpoint.damaged.pt")
                warnings.warn(f"{self.path}: {damage[0]}; going on from {name}", stacklevel=2)
            elif missing:  # a save never leaves it so
                warnings.warn(
                    f"{self.path}: {missing[0]} is missing; going on from {name}", stacklevel=2
                )
            return state
        if damage:
            raise InputError(
                f"{self.path}: no usable checkpoint ({'; '.join(damage)}): restore one, or choose another run"
            )
        return None


def _read_checkpoint(path: Path) -> dict:
    content = path.read_bytes()
    payload, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError("damaged (its sha256 differs)")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"unreadable ({str(error).splitlines()[0]})") from error
    if state.get("format") != FORMAT:
        raise ValueError(f"format {state.get('format')}, this version reads format {FORMAT}")
    return state


def _canonical(value: Any) -> Any:
    """Equal content, equal bytes: pickle writes a string again or refers back to it depending on
    its identity."""
    if isinstance(value, dict):
        return {_canonical(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return sys.intern(value) if isinstance(value, str) else value
