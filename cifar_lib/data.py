"""CIFAR-10 as uint8 tensors: where it is found, splits, channel statistics; and own pictures."""

import hashlib
import io
import math
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import CIFAR10

from cifar_lib import environment, pickles
from cifar_lib.download import download_cifar10
from cifar_lib.errors import InputError, explained
from cifar_lib.files import read_regular
from cifar_lib.hardware import memory_format, send

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CAT, DOG = CLASSES.index("cat"), CLASSES.index("dog")
Channels = tuple[float, ...]  # a number for each of red, green, blue
REAL, STAND_IN = "CIFAR-10", "stand-in data"

# Over all pixels of the 50,000 training images (`channel_statistics`), in [0, 1].
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# The widespread wrong one: the mean of the images' own standard deviations (notebook 1).
PUBLISHED_STD = (0.2023, 0.1994, 0.2010)
# What the published run normalised CIFAR-10's test images by: no statistic of CIFAR-10 we know of.
PUBLISHED_TEST_MEAN, PUBLISHED_TEST_STD = (0.5303, 0.4737, 0.4658), (0.2822, 0.2553, 0.2613)
# What it normalised the competition's images by: those images' own statistics.
KAGGLE_MEAN, KAGGLE_STD = (0.4765, 0.4808, 0.4958), (0.2303, 0.2267, 0.2268)

FOLDER = CIFAR10.base_folder
KAGGLE_INPUT = Path("/kaggle/input")

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # EPS, say, would run a program
MAX_PIXELS = 50_000_000  # of a picture: 200 MB once it is decoded
# JPEG can be decoded at an eighth of its size, so that it may be larger: a phone's 108 megapixels.
# One of several scans (progressive) is held whole, 6 bytes per pixel, and each scan goes over it.
MAX_JPEG_PIXELS, MAX_BUFFERED_PIXELS, MAX_SCANS = 150_000_000, 64_000_000, 20
# The brightest value of a picture of 16 bits is at least this: a quarter of the range. With less,
# 8, 10, 12 or 14 bits, as cameras and scanners give them, were put into 16 without being scaled.
DIMMEST_16_BIT_WHITE = 1 << 14


@dataclass(frozen=True)
class ImageSet:
    """Images with what belongs to each of them.

    images: uint8 (N, 3, 32, 32); labels: int64 (N,), or None where nobody knows them;
    ids: one per image, carried from the file it came from; source: REAL, STAND_IN, or a file's name
    and how it was read.
    """

    images: Tensor
    labels: Tensor | None = None
    ids: tuple[int | str, ...] | None = None
    source: str = REAL

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | np.ndarray | slice) -> "ImageSet":
        """The images at `index` (positions, a mask, or a slice), labels and ids with them."""
        positions = torch.arange(len(self))[index]
        on_device = send(positions, self.images.device)
        labels = None if self.labels is None else self.labels[on_device]
        ids = None if self.ids is None else tuple(self.ids[i] for i in positions.tolist())
        return ImageSet(self.images[on_device], labels, ids, self.source)

    def to(self, device: torch.device | str) -> "ImageSet":
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)


def load_cifar10(
    root: str | os.PathLike | None = None,
    give_up_after: float = math.inf,
    home: Path = Path("data"),
    archives: Path | None = None,
) -> tuple[ImageSet, ImageSet]:
    """The 50,000 training and 10,000 test images, the md5 of each file checked.

    Looked for as `find_cifar10` does, else downloaded into `home` (see `download_cifar10`) from
    `CIFAR10_MIRROR` and other sources. Raises InputError where there is no whole CIFAR-10.
    """
    folder = find_cifar10(root, home)
    if folder is None:
        mirror = environment.read("CIFAR10_MIRROR")
        folder = download_cifar10(home, mirror, give_up_after, archives)
    return _read(folder, CIFAR10.train_list), _read(folder, CIFAR10.test_list)


def find_cifar10(root: str | os.PathLike | None = None, home: Path = Path("data")) -> Path | None:
    """The folder with the batch files in `root`, else in `CIFAR10_ROOT`, else in `home`, else in
    Kaggle's input folder; or None. A folder that lacks one of the files is passed over.

    Raises InputError if `root` or `CIFAR10_ROOT` is named and there is no such folder in it.
    """
    named = root or environment.read("CIFAR10_ROOT")
    if not named:
        # Kaggle mounts data sets at different depths: <name>/, or datasets/<user>/<name>/.
        found = [home / FOLDER, *sorted(KAGGLE_INPUT.glob(f"**/{FOLDER}"))]
        return next(filter(_has_all_batches, found), None)
    places = [Path(named, FOLDER), Path(named)]
    for folder in filter(_has_all_batches, places):
        return folder
    for folder in places:  # `_read` says which of its files is missing
        if folder.name == FOLDER and os.path.isdir(folder):
            return folder
    what = f"{'the given path' if root else 'CIFAR10_ROOT'}: expected {FOLDER}/ in {named}"
    raise InputError(f"{what}, found none: name the folder that holds {FOLDER}/")


def _has_all_batches(folder: Path) -> bool:
    files = CIFAR10.train_list + CIFAR10.test_list
    return all(os.path.isfile(folder / name) for name, _ in files)


def _read(folder: Path, files: list[list[str]]) -> ImageSet:
    """The images of batches, each a file's name and its md5."""
    images, labels = [], []
    for name, md5 in files:
        remedy = "delete the folder to download it again, or copy the file again"
        with explained(f"{folder / name} can't be read", remedy):
            content = read_regular(folder / name, pickles.MAX_BYTES)
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
                raise ValueError(f"expected md5 {md5}, the file differs")
        batch = pickles.read(content)
        images.append(batch["data"].reshape(-1, 3, 32, 32))
        labels += batch["labels"]
    return ImageSet(torch.from_numpy(np.concatenate(images)), torch.tensor(labels))


def stratified_split(labels: Tensor, n_validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions int64 of the training and the validation part, each in rising order, classes in
    equal shares. InputError where a class would be missing from one of them."""
    n, how = len(labels), {"stratify": labels.cpu(), "random_state": seed}
    parts_of = f"{n} images into {n - n_validation} and {n_validation}"
    with explained(f"can't split {parts_of}", "choose another number"):
        parts = train_test_split(np.arange(n), test_size=n_validation, **how)
    train, validation = (torch.from_numpy(np.sort(part)) for part in parts)
    return train, validation


def channel_histogram(images: Tensor) -> Tensor:
    """How often each value occurs in each channel: uint8 (N, 3, H, W) -> int64 (3, 256), CPU."""
    counts = torch.zeros(3, 256, dtype=torch.int64, device=images.device)
    for chunk in images.split(2000):
        for channel in range(3):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    return counts.cpu()


def channel_statistics(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over all pixels, in [0, 1], float64 (3,) each:
    S1 / n and sqrt(S2 / n - mean^2), of the whole numbers S1 = sum of x, S2 = sum of x^2."""
    counts = channel_histogram(images).numpy()
    values = np.arange(256)
    n, s1, s2 = counts.sum(1), counts @ values, counts @ values**2
    return s1 / n / 255, np.sqrt(s2 / n - (s1 / n) ** 2) / 255


def normalize(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """(x / 255 - mean) / std per channel: uint8 (N, 3, H, W) -> float32, in the
    memory format of their device."""
    return apply_scale(images, *scale_and_shift(mean, std, images.device))


def scale_and_shift(mean: Channels, std: Channels, device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 (1, 3, 1, 1) each, with which normalisation is x scale - shift."""
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float32))
    shift = torch.tensor(mean, dtype=torch.float32) * 255 * scale
    return scale.view(1, 3, 1, 1).to(device), shift.view(1, 3, 1, 1).to(device)


def apply_scale(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x scale - shift: uint8 (N, 3, H, W) -> float32, in the memory format of their device."""
    scaled = images.float().mul_(scale).sub_(shift)
    # The format as the last step: channels-last on a CPU four times faster than as the first.
    return scaled.contiguous(memory_format=memory_format(images.device))


class _Unusable(ValueError):
    """A picture that is one, but can't be used; `remedy`: what to do."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy


def read_picture(path: str | os.PathLike) -> Tensor:
    """A picture file as a CIFAR-10 image, uint8 (3, 32, 32): its central square, scaled down with
    anti-aliasing, on white; the first frame of an animation. Values of 12, 16 or 32 bits are scaled
    by what the file says is white.

    Raises InputError for what is no picture, what is too large, and values of unknown brightness.
    """
    remedy = f"give a file of one of {', '.join(PICTURE_FORMATS)}"
    # Whatever Pillow stumbles over in a broken file; the error says what its warnings do.
    with explained(f"picture: {path} can't be read", remedy, Exception):
        content = read_regular(Path(path), 4 * MAX_PIXELS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = _open_picture(content)
            bits, white = _depth(file, content)
            picture = ImageOps.exif_transpose(file)  # upright
            if bits > 8:
                picture = _in_8_bits(picture, file, bits, white)
            picture = picture.convert("RGBA")
    background = Image.new("RGBA", picture.size, "white")
    opaque = Image.alpha_composite(background, picture).convert("RGB")
    square = ImageOps.fit(opaque, (32, 32), Image.Resampling.BOX)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)  # (3, 32, 32)


def _open_picture(content: bytes) -> Image.Image:
    """The picture, not yet decoded; a large JPEG will be decoded at an eighth of its size."""
    try:
        file = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
    except Image.DecompressionBombError as error:
        raise _Unusable(str(error), "scale it down") from error
    size, pixels = f"{file.width} x {file.height} pixels", file.width * file.height
    limit = MAX_PIXELS
    if isinstance(file, JpegImagePlugin.JpegImageFile) and pixels > MAX_PIXELS:
        buffered, scans = _scans(content, file.layers)
        limit = MAX_BUFFERED_PIXELS if buffered else MAX_JPEG_PIXELS
        if buffered and scans > MAX_SCANS:
            raise _Unusable(f"{size} in {scans} scans", "scale it down")
        file.draft(None, (file.width // 8, file.height // 8))
    if pixels > limit:
        raise _Unusable(f"{size}, over {limit:,}", "scale it down")
    return file


def _scans(content: bytes, components: int) -> tuple[bool, int]:
    """Whether a JPEG must be held whole because its first scan isn't all of it, and its number of
    scans (pictures that a phone has put behind it are counted, too)."""
    progressive, place = False, 2
    while content[place + 1] != 0xDA:  # the start of a scan
        progressive |= content[place + 1] in (0xC2, 0xC6, 0xCA, 0xCE)  # start of a frame
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    buffered = progressive or content[place + 4] < components
    return buffered, content[place:].count(b"\xff\xda")


def _depth(file: Image.Image, content: bytes) -> tuple[int, int | None]:
    """The bits of a value in the file, and which value is white, if the file says so."""
    if file.format == "PNG":
        return content[24], _significant_bits(content)  # 24: in the header, behind the size
    if file.format == "TIFF":
        tags = file.tag_v2
        bits = max(tags.get(258, (1,)))  # BitsPerSample
        kinds = set(tags.get(339, (1,)))  # SampleFormat: 1 unsigned, 2 signed, 3 floating-point
        if kinds - {1}:
            kind = "floating-point" if 3 in kinds else "signed"
            raise _Unusable(f"its values are {kind} numbers", "save it with 8 bits per value")
        stated = max(tags.get(281, (0,)))  # MaxSampleValue
        return bits, stated or (4095 if bits == 12 else None)
    return 8, None


def _significant_bits(content: bytes) -> int | None:
    """White by a PNG's sBIT chunk, where that says that fewer bits count than are stored."""
    place = 8
    while (kind := content[place + 4 : place + 8]) not in (b"", b"IDAT"):
        if kind == b"sBIT":
            return (1 << content[place + 8]) - 1
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    return None


def _in_8_bits(
    picture: Image.Image, file: Image.Image, bits: int, white: int | None
) -> Image.Image:
    """The picture of a file of more than 8 bits per value, scaled so that `white` becomes 255."""
    remedy = "stretch it to the full range, or save it with 8 bits per value"
    grey = picture.mode.startswith("I")
    if grey:
        values = np.asarray(picture)  # uint16 or int32 (H, W)
        largest = int(values.max())
    else:  # of colours Pillow has kept the upper 8 bits
        largest = 256 * max(picture.getchannel(c).getextrema()[1] for c in _colours(picture))

    # PNG's sBIT leaves room for both: it asks for scaled values, and some programs don't scale.
    if file.format == "PNG" and white is not None and largest > white:
        white = None
    if white is None:
        white = 65535
        if bits > 16:
            raise _Unusable(f"it has {bits} bits per value and says no maximum", remedy)
        if 0 < largest < DIMMEST_16_BIT_WHITE:
            what = f"of 16 bits per value it uses only those up to {largest:,}"
            raise _Unusable(f"{what}, and says no maximum", remedy)
    if largest > white or (grey and values.min() < 0):
        raise _Unusable(f"it has values outside of 0 to {white:,}, its maximum", remedy)
    if not grey:
        if white < 65535:
            raise _Unusable(f"its colours have {bits} bits, and white is {white:,}", remedy)
        return picture

    scaled = np.multiply(values, 255 / white, dtype=np.float32).round().astype(np.uint8)
    white_is_zero = file.format == "TIFF" and file.tag_v2.get(262) == 0  # the photometric tag
    return Image.fromarray(255 - scaled if white_is_zero else scaled)


def _colours(picture: Image.Image) -> tuple[str, ...]:
    return tuple(band for band in picture.getbands() if band not in "Aa")
