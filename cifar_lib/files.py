"""Safe reading and writing of files.

A file is written whole or not at all. It replaces only a regular file, and none that the same
command has read. A file is read only up to a limit.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from cifar_lib.errors import InputError, explained

SCRATCH = ".cifar_lib-*.tmp"  # the name of a file while it is being written; * is random


def output_file(path: str | os.PathLike) -> Path:
    """Return the path of a file that is going to be written.

    Raises InputError if `path` is a folder, or if it ends with a slash, which `Path` would drop.
    """
    text = os.fspath(path)
    if text.endswith(("/", os.sep)) or os.path.isdir(text):
        raise InputError(f"can't write {text}: it names a folder: name a file in it")
    return Path(path)


def write_atomically(
    path: Path, content: bytes, inputs: Iterable[str | os.PathLike] = (), keep: Path | None = None
) -> None:
    """Write `content` to `path` so that every reader finds either the old or the new content.

    Only a regular file is replaced, and never one of `inputs`, the files that the same command has
    read. With `keep`, the old file isn't replaced: it is first renamed to `keep`, and then the new
    file is renamed to `path`. In the moment between these two renames, `path` doesn't exist.

    Raises InputError if the file can't be written. The old content is still there then: at `path`
    or, with `keep`, perhaps at `keep`.
    """
    # The content goes into a new file first. Nobody can guess its name, the mode "x" below follows
    # no link, and the umask decides who may read it.
    scratch = path.parent / SCRATCH.replace("*", secrets.token_hex(8))
    remedy = "choose another place, or free some disk space"
    with contextlib.ExitStack() as stack, explained(f"can't write {path}", remedy, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        for replaced in (path, keep or path):
            _check_replaceable(replaced, inputs)
        stack.callback(scratch.unlink, missing_ok=True)
        with open(scratch, "xb") as file:
            # The new file gets the permissions of the old one, if there is an old file and the disk
            # stores permissions at all.
            with contextlib.suppress(OSError):
                shutil.copymode(path, scratch)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

        # Only now, when the content is on the disk, is the old file renamed or replaced.
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(scratch, path)


def _check_replaceable(path: Path, inputs: Iterable[str | os.PathLike]) -> None:
    """Raise InputError if there is something at `path` that must not be replaced."""
    if not os.path.lexists(path):
        return
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        reason = "it is a link, a folder or a device, not a regular file"
    elif not mode & stat.S_IWUSR:  # on Linux and macOS, a rename would replace it all the same
        reason = "it is read-only"
    elif any(os.path.exists(read) and os.path.samefile(path, read) for read in inputs):
        reason = "it is an input of this command"
    else:
        return
    raise InputError(f"can't write {path}: {reason}: name another file")


def open_lock(path: Path) -> FileLock:
    """Return a lock on the file `path`, which is created if it doesn't exist.

    The lock isn't taken yet: its method `acquire` takes it. The operating system releases it when
    the process that holds it dies.

    Raises OSError if the file can't be written, or is a link: some versions of filelock would empty
    the file that a link points to.
    """
    if path.is_symlink():
        raise OSError(f"{path.name} is a link")
    open(path, "ab").close()

    # On a file system without locks, filelock would fall back to counting the lock as taken while
    # the file exists. The file of a killed process would then block everybody for ever, so we
    # forbid the fallback. Colab's filelock may be too old to have the option for this.
    options = {"fallback_to_soft": False} if hasattr(FileLock, "fallback_to_soft") else {}
    return FileLock(path, **options)


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises OSError if it can't be read, and ValueError if it isn't a regular file or is too long.
    """
    status = os.stat(path)
    # A FIFO could block for ever, and a device might never end.
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it isn't a regular file")
    if status.st_size > limit:
        raise ValueError(f"it has {status.st_size:,} bytes, more than {limit:,}")
    return path.read_bytes()


def parse_object(content: bytes) -> dict[str, Any]:
    """Return the object that `content`, a JSON text, holds.

    Raises ValueError if `content` is anything else, or the object is empty.
    """
    # A whole number of over 309 digits is too large for a float, and fails only when it is used.
    # None of our files has even 100 digits in a row.
    if re.search(rb"\d{100}", content):
        raise ValueError("it has 100 digits or more in a row")
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict) or not value:
        raise ValueError("it isn't a JSON object, or it is empty")
    return value
