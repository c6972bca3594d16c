"""Files: written whole, replacing nothing that they shouldn't; read within bounds."""

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

SCRATCH = ".cifar_lib-*.tmp"  # a file that is being written; * is random


def output_file(path: str | os.PathLike) -> Path:
    """Return the path of a file that is to be written.

    Raises InputError for a folder, whether it exists or is only named with a slash at its end,
    which `Path` would drop.
    """
    text = os.fspath(path)
    if text.endswith(("/", os.sep)) or os.path.isdir(text):
        raise InputError(f"can't write {text}: it is a folder: name a file in it")
    return Path(path)


def write_atomically(
    path: Path, content: bytes, inputs: Iterable[str | os.PathLike] = (), keep: Path | None = None
) -> None:
    """Write `content` to `path`, so that the file there is at every moment the old one or the new.

    Only a regular file is replaced, and none of `inputs`, which the same command has read. With
    `keep` the old file gets that name.

    Raises InputError if it can't be written; nothing is lost then.
    """
    # Nobody can guess the name, "x" follows no link, and the umask says who may read it.
    scratch = path.parent / SCRATCH.replace("*", secrets.token_hex(8))
    remedy = "choose another place or free the disk"
    with contextlib.ExitStack() as stack, explained(f"can't write {path}", remedy, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        for replaced in (path, keep or path):
            _check_replaceable(replaced, inputs)
        stack.callback(scratch.unlink, missing_ok=True)
        with open(scratch, "xb") as file:
            with contextlib.suppress(OSError):  # the file is new, or the disk has no permissions
                shutil.copymode(path, scratch)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(scratch, path)


def _check_replaceable(path: Path, inputs: Iterable[str | os.PathLike]) -> None:
    if not os.path.lexists(path):
        return
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        reason = "it is a link, a folder or a device, not a regular file"
    elif not mode & stat.S_IWUSR:  # root could
        reason = "it is read-only"
    elif any(os.path.exists(read) and os.path.samefile(path, read) for read in inputs):
        reason = "it is an input of this command"
    else:
        return
    raise InputError(f"can't write {path}: {reason}: name another file")


def open_lock(path: Path) -> FileLock:
    """Return a lock on the file `path`, which is created if need be; `acquire` takes the lock.

    The system undoes a lock when the process that holds it dies. Raises OSError if the file can't
    be written or is a link: some versions of filelock would empty the file that a link points to.
    """
    if path.is_symlink():
        raise OSError(f"{path.name} is a link")
    open(path, "ab").close()
    # Where a file system has no locks, filelock goes by whether the file exists, and that of a
    # process that was killed would block for ever. Colab's filelock may be older than the option.
    options = {"fallback_to_soft": False} if hasattr(FileLock, "fallback_to_soft") else {}
    return FileLock(path, **options)


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises OSError if it can't be read, and ValueError for anything else.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a FIFO would wait for ever, a device never end
        raise ValueError("it isn't a regular file")
    if status.st_size > limit:
        raise ValueError(f"it has {status.st_size:,} bytes, more than {limit:,}")
    return path.read_bytes()


def parse_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object that `content` is.

    Raises ValueError for anything else, and for an empty object.
    """
    if re.search(rb"\d{100}", content):
        raise ValueError("it has a number of 100 digits or more")  # 309 are too many for a float
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(value, dict) or not value:
        raise ValueError("it isn't a JSON object, or it is empty")
    return value
