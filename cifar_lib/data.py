"""CIFAR-10 as uint8 tensors: where it is found, the generated stand-in, splits and channel
statistics."""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

from cifar_lib.errors import InputError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CAT, DOG = CLASSES.index("cat"), CLASSES.index("dog")
REAL, STAND_IN = "CIFAR-10", "stand-in data"

# Mean and standard deviation over all pixels of the 50,000 training images: `channel_statistics`,
# in [0, 1].
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# The widespread wrong deviation: the mean over images of each image's own deviation
# (`mean_of_image_stds`).
PUBLISHED_STD = (0.2023, 0.1994, 0.2010)
# What the published run normalised CIFAR-10's test images by; no statistic of CIFAR-10 that we know
# gives it.
PUBLISHED_TEST_MEAN, PUBLISHED_TEST_STD = (0.5303, 0.4737, 0.4658), (0.2822, 0.2553, 0.2613)
# What it normalised the competition's images by: those images' own statistics.
KAGGLE_MEAN, KAGGLE_STD = (0.4765, 0.4808, 0.4958), (0.2303, 0.2267, 0.2268)

KAGGLE_INPUT = Path("/kaggle/input")
FOLDER = CIFAR10.base_folder
FILES = (
    *CIFAR10.train_list,
    *CIFAR10.test_list,
    (CIFAR10.meta["filename"], CIFAR10.meta["md5"]),
)  # (name, md5)
PARTIAL, ABANDONED_SECONDS = ".download-", 3600
STALL_SECONDS = 30.0  # a download that brings nothing for this long has stalled


@dataclass(frozen=True)
class ImageSet:
    """Images with what belongs to each of them.

    images: uint8 (N, 3, 32, 32); labels: int64 (N,), or None where nobody knows them;
    ids: one per image, carried from the file it came from; source: REAL, STAND_IN or a file's name.
    """

    images: Tensor
    labels: Tensor | None = None
    ids: tuple[int | str, ...] | None = None
    source: str = REAL

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | np.ndarray | slice) -> "ImageSet":
        """The images at `index` (a tensor or array of positions, or a slice), labels and ids with
        them."""
        positions = torch.arange(len(self))[index]
        on_device = positions.to(self.images.device)
        return replace(
            self,
            images=self.images[on_device],
            labels=None if self.labels is None else self.labels[on_device],
            ids=None if self.ids is None else tuple(self.ids[i] for i in positions.tolist()),
        )

    def to(self, device: torch.device | str) -> "ImageSet":
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)


def load_cifar10(
    root: str | os.PathLike | None = None,
    download: bool = True,
    mirror: str | None = None,
    give_up_after: float | None = None,
    home: Path = Path("data"),
) -> tuple[ImageSet, ImageSet]:
    """The 50,000 training and 10,000 test images, each file checked by torchvision's md5.

    Looked for in `root`, else in `CIFAR10_ROOT`, else in `home`, else in Kaggle's input folder,
    else downloaded into `home` from `mirror` (the folder that holds the archive; default
    `CIFAR10_MIRROR`, else the origin) within `give_up_after` seconds. Raises InputError where a
    place that was named holds no whole CIFAR-10, or none is found.
    """
    folder = find_cifar10(root, home)
    if folder is None:
        if not download:
            raise InputError(
                f"no CIFAR-10 in CIFAR10_ROOT, {home} or Kaggle's input folder: set CIFAR10_ROOT to the folder that "
                f"holds {FOLDER}/, or allow the download"
            )
        folder = download_cifar10(home, mirror or os.environ.get("CIFAR10_MIRROR"), give_up_after)
    _check_files(folder)
    return _read(folder, train=True), _read(folder, train=False)


def find_cifar10(root: str | os.PathLike | None = None, home: Path = Path("data")) -> Path | None:
    """The folder with the batch files, or None. A place that was named (`root`, `CIFAR10_ROOT`)
    must hold it."""
    for name, place in (("the given path", root), ("CIFAR10_ROOT", os.environ.get("CIFAR10_ROOT"))):
        if place:
            folder = _batches_in(Path(place))
            if folder is None:
                raise InputError(
                    f"{name}: expected {FOLDER}/ in {place}, found none: name the folder that holds {FOLDER}/"
                )
            return folder
    return _batches_in(home) or next(iter(sorted(KAGGLE_INPUT.glob(f"**/{FOLDER}"))), None)


def _batches_in(place: Path) -> Path | None:
    candidates = (place / FOLDER, place) if place.name == FOLDER else (place / FOLDER,)
    return next((folder for folder in candidates if os.path.isdir(folder)), None)


def _check_files(folder: Path) -> None:
    for name, md5 in FILES:
        if not os.path.isfile(folder / name):
            raise InputError(
                f"{folder}: {name} is missing: delete the folder to download it again, or copy it there"
            )
        if not os.access(folder / name, os.R_OK):
            raise InputError(
                f"{folder / name} can't be read: make it readable for you, or copy the file again"
            )
        if not check_integrity(folder / name, md5):
            raise InputError(
                f"{folder / name}: expected md5 {md5}, the file differs (half-downloaded or damaged): "
                "delete the folder to download it again, or copy the file again"
            )


def _read(folder: Path, train: bool) -> ImageSet:
    dataset = CIFAR10(folder.parent, train=train, download=False)
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return with_labels(ImageSet(images, torch.tensor(dataset.targets)))


def with_labels(images: ImageSet) -> ImageSet:
    """The same, once it is sure that each image has a label from 0 to 9; else InputError."""
    labels = images.labels
    if labels is None or labels.shape != (len(images),):
        found = "none" if labels is None else f"labels of shape {tuple(labels.shape)}"
        raise InputError(
            f"{images.source}: expected a label for each of {len(images)} images, got {found}"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise InputError(
            f"{images.source}: expected labels from 0 to {len(CLASSES) - 1}, got {labels.min()} to {labels.max()}: "
            "the files are not CIFAR-10's, copy or download them again"
        )
    return images


def download_cifar10(
    root: Path, mirror: str | None = None, give_up_after: float | None = None
) -> Path:
    """Download and unpack into `root`, whole or not at all; returns the folder with the batch
    files.

    Raises InputError when the server can't be reached, stalls, sends another file, or needs over
    `give_up_after` s.
    """
    url = f"{mirror.rstrip('/')}/{CIFAR10.filename}" if mirror else CIFAR10.url
    remedy = (
        "set CIFAR10_ROOT to a folder that holds it, or CIFAR10_MIRROR to another server's folder"
    )
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        workspace = tempfile.TemporaryDirectory(dir=root, prefix=PARTIAL)
    except OSError as error:
        raise InputError(f"can't write CIFAR-10 into {root}: {error.strerror}: {remedy}") from error
    try:
        with workspace as scratch:
            try:
                with _time_limit(give_up_after):
                    download_and_extract_archive(
                        url, scratch, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5
                    )
            except (OSError, HTTPException, RuntimeError, EOFError, ValueError, _GaveUp) as error:
                reason = " ".join(str(error).split())
                raise InputError(
                    f"CIFAR-10 could not be downloaded from {url} ({reason}): {remedy}"
                ) from error
            target = root / FOLDER
            shutil.rmtree(target, ignore_errors=True)
            os.replace(Path(scratch) / FOLDER, target)
    finally:
        with contextlib.suppress(OSError):
            root.rmdir()  # where nothing came, nothing stays: this works on an empty folder only
    return target


def _remove_abandoned(root: Path) -> None:
    """What a killed download left: nothing has been written there for an hour."""
    for folder in root.glob(f"{PARTIAL}*"):
        written = [path.stat().st_mtime for path in (folder, *folder.rglob("*"))]
        if max(written) < time.time() - ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


class _GaveUp(Exception):
    """The time is over. No OSError: torchvision takes those for a reason to try http after
    https."""


@contextlib.contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise _GaveUp after `seconds` of wall clock (main thread on POSIX); a socket that stalls
    raises anywhere."""

    def give_up(*_):
        raise _GaveUp(f"gave up after {seconds:.0f} s")

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    alarm = (
        seconds
        and hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
    )
    if alarm:
        handler = signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)


def generate_stand_in(
    n_train: int = 50_000, n_test: int = 10_000, seed: int = 0
) -> tuple[ImageSet, ImageSet]:
    """Generated images in CIFAR-10's shape, for where there is none: deterministic, cat and dog
    hardest to tell apart.

    A class is a few smooth colour patterns. An image is one of them, shifted, mirrored or not,
    blended with a pattern of another class (by up to 45 %, but cat and dog with each other by up to
    65 %), brightened or dimmed, with noise.
    """
    generator = torch.Generator().manual_seed(seed)
    variants = 6
    coarse = torch.rand(len(CLASSES) * variants, 3, 5, 5, generator=generator)
    patterns = F.interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)

    def draw(n: int) -> ImageSet:
        labels = (torch.arange(n) % len(CLASSES))[torch.randperm(n, generator=generator)]
        other = (labels + torch.randint(1, len(CLASSES), (n,), generator=generator)) % len(CLASSES)
        pet = (labels == CAT) | (labels == DOG)
        other = torch.where(pet, CAT + DOG - labels, other)
        blend = torch.rand(n, generator=generator) * torch.where(pet, 0.65, 0.45)
        gain = 0.7 + 0.6 * torch.rand(n, generator=generator)
        mirrored = torch.rand(n, generator=generator) < 0.5
        variant, other_variant = torch.randint(variants, (2, n), generator=generator)
        shift = torch.randint(-4, 5, (n,), generator=generator)
        images = torch.empty(n, 3, 32, 32, dtype=torch.uint8)
        for dx in range(-4, 5):
            moved = patterns.roll(dx, dims=3)
            for flip, view in ((False, moved), (True, moved.flip(3))):
                (where,) = torch.nonzero((shift == dx) & (mirrored == flip), as_tuple=True)
                for index in where.split(2048):
                    weight = blend[index].view(-1, 1, 1, 1)
                    own = view[labels[index] * variants + variant[index]]
                    blended = own.lerp_(
                        view[other[index] * variants + other_variant[index]], weight
                    )
                    blended.sub_(0.5).mul_(gain[index].view(-1, 1, 1, 1)).add_(0.5)
                    images[index] = blended.clamp_(0, 1).mul_(223).to(torch.uint8)
        noise = torch.randint(0, 33, images.shape, generator=generator, dtype=torch.uint8)
        return ImageSet(images + noise, labels, source=STAND_IN)

    return draw(n_train), draw(n_test)


def stratified_split(labels: Tensor, n_validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions int64 of the training and the validation part, each in rising order, classes in
    equal shares."""
    positions = np.arange(len(labels))
    try:
        train, validation = train_test_split(
            positions, test_size=n_validation, stratify=labels.cpu().numpy(), random_state=seed
        )
    except ValueError as error:
        raise InputError(
            f"can't hold out {n_validation} of {len(labels)} images for validation ({error}): choose another number"
        ) from error
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(validation))


def channel_histogram(images: Tensor) -> Tensor:
    """How often each of the 256 values occurs in each channel: uint8 (N, 3, H, W) -> int64 (3,
    256)."""
    counts = torch.zeros(3, 256, dtype=torch.int64, device=images.device)
    for chunk in images.split(2000):
        for channel in range(3):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    return counts.cpu()


def read_picture(path: str | os.PathLike) -> Tensor:
    """Any picture file as a CIFAR-10 image, uint8 (3, 32, 32): its central square, scaled down with
    anti-aliasing.

    Transparent parts become white. Raises InputError for a file that is no picture.
    """
    path = Path(path)
    try:
        with Image.open(path) as file:
            picture = _eight_bits(ImageOps.exif_transpose(file)).convert(
                "RGBA"
            )  # phones turn pictures by a note
    except FileNotFoundError as error:
        raise InputError(f"picture: expected a file, found no file at {path}") from error
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"picture: {path} can't be read as a picture ({reason}): give a PNG or JPEG file"
        ) from error
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
        "RGB"
    )
    square = ImageOps.fit(picture, (32, 32), Image.Resampling.BOX)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Greys of 16 bits (which Pillow calls I;16, or I) as 8: its own conversion cuts them off at
    255."""
    if picture.mode == "F":
        raise ValueError("its greys are floating-point numbers")
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture) / 257).round().clip(0, 255).astype(np.uint8))


def channel_statistics(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over all pixels of all images, in [0, 1], float64
    (3,) each.

    From whole-number sums, so exact but for the last rounding: mean = S1 / n, variance = S2 / n -
    mean^2, with S1 = sum of x, S2 = sum of x^2 over the n pixels of a channel.
    """
    counts = channel_histogram(images).numpy()
    values = np.arange(256)
    n, s1, s2 = counts.sum(1), counts @ values, counts @ values**2
    return s1 / n / 255, np.sqrt(s2 / n - (s1 / n) ** 2) / 255


def mean_of_image_stds(images: Tensor) -> np.ndarray:
    """The mean over images of each image's own standard deviation per channel, in [0, 1], float64
    (3,).

    Below the deviation over all pixels, as it leaves out how far the images' means lie apart. With
    Bessel's correction, torch's default: that gives the widespread .2023 .1994 .2010 to the digit.
    """
    stds = [chunk.flatten(2).double().std(dim=2) for chunk in images.split(2000)]
    return (torch.cat(stds).mean(0) / 255).cpu().numpy()


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x / 255 - mean) / std, channel by channel: uint8 (N, 3, H, W) -> float32, channels-last."""
    return apply_scale(images, *scale_and_shift(mean, std, images.device))


def scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """float32 (1, 3, 1, 1) each, with which normalisation is x scale - shift."""
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float32, device=device))
    shift = torch.tensor(mean, dtype=torch.float32, device=device) * 255 * scale
    return scale.view(1, 3, 1, 1), shift.view(1, 3, 1, 1)


def apply_scale(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x scale - shift: uint8 (N, 3, H, W) -> float32, channels-last."""
    # Channels last as the last step: on a CPU four times faster than as the first.
    return images.float().mul_(scale).sub_(shift).contiguous(memory_format=torch.channels_last)
