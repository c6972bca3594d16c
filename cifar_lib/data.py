"""CIFAR-10 as uint8 tensors: where it is found, splits, channel statistics, pictures of one's own.

The pixels themselves are never changed here; `normalize` makes what the network gets.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from cifar_lib.download import download_cifar10
from cifar_lib.errors import InputError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CAT, DOG = CLASSES.index("cat"), CLASSES.index("dog")
REAL, STAND_IN = "CIFAR-10", "stand-in data"

# Over all pixels of the 50,000 training images (`channel_statistics`), in [0, 1].
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# The widespread wrong one: the mean of the images' own standard deviations (`mean_of_image_stds`).
PUBLISHED_STD = (0.2023, 0.1994, 0.2010)
# What the published run normalised CIFAR-10's test images by: no statistic of CIFAR-10 we know of.
PUBLISHED_TEST_MEAN, PUBLISHED_TEST_STD = (0.5303, 0.4737, 0.4658), (0.2822, 0.2553, 0.2613)
# What it normalised the competition's images by: those images' own statistics.
KAGGLE_MEAN, KAGGLE_STD = (0.4765, 0.4808, 0.4958), (0.2303, 0.2267, 0.2268)

FOLDER = CIFAR10.base_folder
META = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
FILES = (*CIFAR10.train_list, *CIFAR10.test_list, META)  # (name, md5)
KAGGLE_INPUT = Path("/kaggle/input")

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # EPS, say, would run a program
MAX_PIXELS = 50_000_000  # of a picture: 200 MB once it is decoded


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
        """The images at `index` (positions, a mask, or a slice), labels and ids with them."""
        positions = torch.arange(len(self))[index]
        on_device = positions.to(self.images.device, non_blocking=True)
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
    give_up_after: float | None = None,
    home: Path = Path("data"),
    archives: Path | None = None,
) -> tuple[ImageSet, ImageSet]:
    """The 50,000 training and 10,000 test images, each file checked by torchvision's md5.

    Looked for in `root`, else in `CIFAR10_ROOT`, else in `home`, else in Kaggle's input folder,
    else downloaded into `home` (see `download_cifar10`, also for the last two parameters) from
    `CIFAR10_MIRROR` and other sources. Raises InputError where a place that was named holds no
    whole CIFAR-10, or none is found.
    """
    folder = find_cifar10(root, home)
    if folder is None and not download:
        raise InputError(
            f"no CIFAR-10 in CIFAR10_ROOT, {home} or Kaggle's input folder: set CIFAR10_ROOT to "
            f"the folder that holds {FOLDER}/, or allow the download"
        )
    if folder is None:
        mirror = os.environ.get("CIFAR10_MIRROR") or None
        folder = download_cifar10(home, mirror, give_up_after, archives)
    _check_files(folder)
    return _read(folder, train=True), _read(folder, train=False)


def find_cifar10(root: str | os.PathLike | None = None, home: Path = Path("data")) -> Path | None:
    """The folder with the batch files, or None. A place that is named (`root`, `CIFAR10_ROOT`) must
    hold it: InputError."""
    named = {"the given path": root, "CIFAR10_ROOT": os.environ.get("CIFAR10_ROOT")}
    for name, place in named.items():
        if place:
            folder = _batches_in(Path(place))
            if folder is None:
                raise InputError(
                    f"{name}: expected {FOLDER}/ in {place}, found none: name the folder that "
                    f"holds {FOLDER}/"
                )
            return folder
    return _batches_in(home) or next(iter(sorted(KAGGLE_INPUT.glob(f"**/{FOLDER}"))), None)


def _batches_in(place: Path) -> Path | None:
    candidates = (place / FOLDER, place) if place.name == FOLDER else (place / FOLDER,)
    return next((folder for folder in candidates if os.path.isdir(folder)), None)


def _check_files(folder: Path) -> None:
    remedy = "delete the folder to download it again, or copy the file again"
    for name, md5 in FILES:
        path = folder / name
        if not os.path.isfile(path):
            raise InputError(f"{folder}: {name} is missing: {remedy}")
        try:
            whole = check_integrity(path, md5)
        except OSError as error:
            raise InputError(f"{path} can't be read ({error.strerror}): {remedy}") from error
        if not whole:
            raise InputError(f"{path}: expected md5 {md5}, the file differs: {remedy}")


def _read(folder: Path, train: bool) -> ImageSet:
    dataset = CIFAR10(folder.parent, train=train, download=False)
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(dataset.targets))


def check_labels(images: ImageSet) -> None:
    """Raises InputError unless each image has a label from 0 to 9."""
    labels = images.labels
    if labels is None or labels.shape != (len(images),):
        found = "none" if labels is None else f"labels of shape {tuple(labels.shape)}"
        raise InputError(
            f"{images.source}: expected a label for each of {len(images)} images, got {found}"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise InputError(
            f"{images.source}: expected labels from 0 to {len(CLASSES) - 1}, got {labels.min()} to "
            f"{labels.max()}: these are not CIFAR-10's"
        )


def stratified_split(labels: Tensor, n_validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions int64 of the training and the validation part, each in rising order, classes in
    equal shares. Raises InputError where a class would be missing from one of them."""
    try:
        train, validation = train_test_split(
            np.arange(len(labels)),
            test_size=n_validation,
            stratify=labels.cpu().numpy(),
            random_state=seed,
        )
    except ValueError as error:
        raise InputError(
            f"can't split {len(labels)} images into {len(labels) - n_validation} and "
            f"{n_validation} ({error}): choose another number"
        ) from error
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(validation))


def channel_histogram(images: Tensor) -> Tensor:
    """How often each of the 256 values occurs in each channel: uint8 (N, 3, H, W) -> int64
    (3, 256) on the CPU."""
    counts = torch.zeros(3, 256, dtype=torch.int64, device=images.device)
    for chunk in images.split(2000):
        for channel in range(3):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    return counts.cpu()


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

    Below the one over all pixels, as it leaves out how far the images' means lie apart. With
    Bessel's correction, torch's default: that gives the widespread .2023 .1994 .2010 to the digit.
    """
    stds = [chunk.flatten(2).double().std(dim=2) for chunk in images.split(2000)]
    return (torch.cat(stds).mean(0) / 255).cpu().numpy()


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x / 255 - mean) / std per channel: uint8 (N, 3, H, W) -> float32, channels-last."""
    return apply_scale(images, *scale_and_shift(mean, std, images.device))


def scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """float32 (1, 3, 1, 1) each, with which normalisation is x scale - shift."""
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float32))
    shift = torch.tensor(mean, dtype=torch.float32) * 255 * scale
    return scale.view(1, 3, 1, 1).to(device), shift.view(1, 3, 1, 1).to(device)


def apply_scale(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x scale - shift: uint8 (N, 3, H, W) -> float32, channels-last."""
    # Channels last as the last step: on a CPU four times faster than as the first.
    return images.float().mul_(scale).sub_(shift).contiguous(memory_format=torch.channels_last)


def read_picture(path: str | os.PathLike) -> Tensor:
    """A picture file as a CIFAR-10 image, uint8 (3, 32, 32): its central square, scaled down with
    anti-aliasing; of an animation the first frame.

    Transparent parts become white. Raises InputError for a file that is no picture.
    """
    path = Path(path)
    remedy = f"give a file of one of {', '.join(PICTURE_FORMATS)}"
    if not os.path.isfile(path):
        raise InputError(f"picture: expected a file, found no file at {path}: {remedy}")
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"{file.width} x {file.height} pixels, over {MAX_PIXELS:,}")
            upright = ImageOps.exif_transpose(file)  # phones turn pictures by a note
            picture = _eight_bits(upright).convert("RGBA")
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"picture: {path} can't be read ({reason}): {remedy}") from error
    white = Image.new("RGBA", picture.size, "white")
    opaque = Image.alpha_composite(white, picture).convert("RGB")
    square = ImageOps.fit(opaque, (32, 32), Image.Resampling.BOX)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Greys of 16 bits (Pillow's I;16 or I) as 8: its own conversion cuts them off at 255."""
    if picture.mode == "F":
        raise ValueError("its greys are floating-point numbers")
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture) / 257).round().clip(0, 255).astype(np.uint8))
