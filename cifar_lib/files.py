"""Files: what is written is whole and replaces nothing it shouldn't, what is read has bounds."""

import contextlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cifar_lib.errors import InputError

SCRATCH = ".cifar_lib-*.tmp"  # a file that is being written; * is random


def write_atomically(
    path: Path,
    content: bytes,
    inputs: Iterable[str | os.PathLike] = (),
    keep: Path | None = None,
) -> None:
    """Put `content` at `path`, on disk and whole, in place of the file there, which becomes `keep`.

    Only a regular file is replaced, and none of `inputs`, which the same command has read.
    Raises InputError where it can't write; nothing is lost then.
    """
    # Nobody can guess this name, and "x" opens no link or file that is there. A file made by
    # `tempfile` would have the same, but not the permissions that the umask asks for.
    scratch = path.parent / SCRATCH.replace("*", secrets.token_hex(8))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode_of_replaceable(path, inputs)
        if keep is not None:
            _mode_of_replaceable(keep)
        try:
            with open(scratch, "xb") as file:
                if mode is not None:
                    with contextlib.suppress(OSError):  # a mounted Drive, say, has no permissions
                        os.fchmod(file.fileno(), mode)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if mode is not None and keep is not None:
                os.replace(path, keep)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the new names too, where folders can be flushed
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise InputError(
            f"can't write {path} ({error.strerror}): choose another place or free the disk"
        ) from error


def _mode_of_replaceable(path: Path, inputs: Iterable[str | os.PathLike] = ()) -> int | None:
    """The permissions of the file at `path`, None where there is none; InputError if it stays."""
    if not os.path.lexists(path):
        return None
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        reason = "it is a link, a folder or a device, no regular file"
    elif not mode & stat.S_IWUSR:  # root could
        reason = "it is read-only"
    elif any(os.path.exists(read) and os.path.samefile(path, read) for read in inputs):
        reason = "it is an input of this command"
    else:
        return stat.S_IMODE(mode)
    raise InputError(f"can't write {path}: {reason}: name another file")


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; raises OSError or ValueError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a FIFO would wait for ever, a device never end
        raise ValueError("it is no regular file")
    if status.st_size > limit:
        raise ValueError(f"it has {status.st_size:,} bytes, more than {limit:,}")
    return path.read_bytes()


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object, not an empty one, that `content` is; raises ValueError where it is none."""
    if re.search(rb"\d{100}", content):
        raise ValueError("it has a number of 100 digits or more")  # 309 are too many for a float
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(value, dict) or not value:
        raise ValueError("it is no JSON object, or an empty one")
    return value
