"""Reads the competition's untrusted pickle, and writes a checked submission."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cifar_lib import pickles
from cifar_lib.data import CLASSES, ImageSet
from cifar_lib.errors import InputError, Unusable, explained
from cifar_lib.files import output_file, read_regular, write_atomically

LONGEST = 200  # characters of an id

# The two orders in which 3,072 values can form an image: the whole red plane, then the green and
# the blue one; or red, green and blue of the first pixel, then of the second, and so on.
PLANES, PIXELS = "plane after plane", "pixel after pixel"

# The shapes that an image may have, and the order that each shape promises, if any.
SHAPES = {(32, 32, 3): PIXELS, (3, 32, 32): PLANES, (3072,): None}

# Images are smoother if their values are read in the right order, so the values can contradict the
# order that the shape promises. Roughness is the mean step to the next pixel, across or down,
# whichever is larger. The right order's roughness, divided by the wrong order's, is
#   0.45 (if planes are right) and 0.29 (if pixels are right) for CIFAR-10's test images, and
#   at most 0.71 for any family of notebooks/course/corruptions.py at its highest severity.
# Each of these 90,000 images, clean and in eight families, was also read as a file of its own. The
# wrong order's roughness was never less than 0.9 times the right order's. So the promised order is
# given up only if the other one's roughness is less than 0.9 times its own. If the shape promises
# no order, the smoother one is taken. It would be the wrong one for 6 of the 90,000 images, all of
# them grey.
CONTRADICTION = 0.9

# Images count as noise if, in the order taken, the mean step to the next pixel (across and down,
# averaged), divided by the mean step to a random pixel of the same image, is above GARBLED. This
# ratio is
#   0.26 for CIFAR-10's test images,
#   at most 0.51 for a whole family as above, and at most 0.60 for 20 images of a family ("noise"),
#   1.00 for pure noise, and at least 0.99 for 20 images of pure noise.
# One image alone tells less. The ratio of a single image from a family is up to 0.98, that of a
# single image of pure noise 1.00 with a standard deviation of 0.014. Therefore files of fewer than
# FEW images have a higher limit, GARBLED_IF_FEW.
GARBLED, GARBLED_IF_FEW, FEW = 0.8, 0.99, 20

# Files that are mistaken for a pickle: how each begins, what it is, and what to do with it.
STRANGERS = (
    (
        b"PK\x03\x04",
        "a zip archive, a .npz or PyTorch file",
        "unpack a zip, pickle arrays in a dict",
    ),
    (b"\x1f\x8b", "gzip-compressed", "unpack it first"),
    (b"BZh", "bzip2-compressed", "unpack it first"),
    (b"\xfd7zXZ\x00", "xz-compressed", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file", "run `git lfs pull`"),
    (b"\x93NUMPY", "a NumPy .npy file", "pickle it in a dict, with its ids"),
    (b"\x89HDF\r\n", "an HDF5 file", "pickle its arrays in a dict"),
    (b"MATLAB 5.0", "a MATLAB file", "pickle its arrays in a dict"),
    (b"\x89PNG", "a PNG picture", "use `predict` for pictures"),
    (b"\xff\xd8\xff", "a JPEG picture", "use `predict` for pictures"),
)


def read_test_file(path: str | os.PathLike) -> ImageSet:
    """Return the unlabelled images of a pickled dict, with their ids. No code in the file is run.

    The dict has at least these two keys:

    data: uint8 (N, 32, 32, 3), (N, 3, 32, 32) or (N, 3072).
    ids: N different whole numbers or names.

    Some programs reshape when they should transpose, and then the shape is wrong about the order of
    the values. Therefore the smoothness of the images can overrule the shape, and the returned
    set's `source` says which order was read. Smoothness can't tell whether rows and columns are
    exchanged, whether images are rotated or mirrored, or whether blue comes before red. Such images
    are returned as they are in the file.

    Raises InputError if the file can't be read or doesn't hold such a dict, or if the images are
    noise in the order taken.
    """
    path = Path(path)
    remedy = "give the competition's .pkl, a dict with data (N, 32, 32, 3) and ids"
    with explained(f"test file: {path} can't be read", remedy):
        content = read_regular(path, pickles.MAX_BYTES)
        try:
            found = pickles.read(content)
        except InputError:
            stranger = _stranger(content)
            if stranger is None:
                raise
            raise stranger from None

        # Keys are bytes if a program has read a pickle from Python 2 with encoding="bytes" and
        # stored it again.
        found = {key.decode() if isinstance(key, bytes) else key: found[key] for key in found}
        if not {"data", "ids"} <= found.keys():
            raise InputError(f"expected the keys data and ids, found {str([*found][:5])[:99]}")
        images, order = _images(found["data"])
        ids = _ids(found["ids"], len(images))
    return ImageSet(images, ids=ids, source=f"{path.name}, {order}")


def _stranger(content: bytes) -> Unusable | None:
    """Return an error that names the kind of file and the remedy, or None if it is unknown."""
    if not content:
        return Unusable("it is empty", "download it again")
    for beginning, kind, remedy in STRANGERS:
        if content.startswith(beginning):
            return Unusable(f"it is {kind}", remedy)
    if content[8:10] == b'{"':  # a JSON header, after the eight bytes of its length
        return Unusable("it is a safetensors file", "those are weights, for --weights")
    head = content[:1000].decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if head.lower().startswith(("<!doctype", "<html", "<?xml")):
        return Unusable("it is a web page", "download the file itself, logged in if need be")
    if head.startswith(("{", "[")):
        return Unusable("it is JSON", "pickle its data and ids in a dict")

    # In a CSV table, the first two lines have the same number of commas.
    lines = head.splitlines()[:2]
    commas = [line.count(",") for line in lines]
    if len(lines) == 2 and lines[0].isprintable() and commas[0] == commas[1] > 0:
        return Unusable("it is a CSV table", "pickle the images and ids in a dict")
    return None


def _images(data: Any) -> tuple[torch.Tensor, str]:
    """Return the images as uint8 (N, 3, 32, 32), and the order in which their values were read."""
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        kind = getattr(data, "dtype", type(data).__name__)
        raise InputError(f"data: expected an array of uint8, got {kind}")
    if data.size == 0 or data.shape[1:] not in SHAPES:
        shapes = "(N, 32, 32, 3), (N, 3, 32, 32) or (N, 3072)"
        raise InputError(f"data: expected {shapes}, got {data.shape}")

    # Read the same values in both orders.
    promised = SHAPES[data.shape[1:]]
    values = torch.from_numpy(np.array(data, order="C"))  # N x 3,072 values, in the file's shape
    orders = {
        PLANES: values.view(-1, 3, 32, 32),  # (N, 3, 32, 32)
        PIXELS: values.view(-1, 32, 32, 3).permute(0, 3, 1, 2),  # (N, 3, 32, 32)
    }

    # Take the promised order, unless the other one is much smoother. Without a promise, take the
    # smoother one. If both are equally smooth, take planes, which is CIFAR-10's own order.
    steps = {name: _steps(images) for name, images in orders.items()}
    roughness = {name: max(across, down) for name, (across, down, _) in steps.items()}
    order = promised or PLANES
    other = PIXELS if order == PLANES else PLANES
    if roughness[other] < roughness[order] * (CONTRADICTION if promised else 1):
        order = other

    # Refuse images that are noise even in the order taken.
    across, down, anywhere = steps[order]
    limit = GARBLED if len(values) >= FEW else GARBLED_IF_FEW
    if (across + down) / 2 > limit * anywhere:
        what = f"data: expected images, got what looks like noise, read {order}"
        raise Unusable(what, "write the data again, as (N, 32, 32, 3)")
    return orders[order].contiguous(), order


def _steps(images: torch.Tensor) -> tuple[float, float, float]:
    """Return three mean absolute differences between a pixel and another one of the same image.

    images: uint8 (N, 3, 32, 32). Values are only compared within their channel.

    The other pixel is the next one in the row, the next one in the column, or a random one. One
    permutation, the same for all images, chooses the random pixels.
    """
    shuffled = torch.randperm(32 * 32, generator=torch.Generator().manual_seed(0))
    sums = torch.zeros(3, dtype=torch.float64)
    for part in images.split(1000):
        pixels = part.short()  # (n, 3, 32, 32); a difference of uint8 would wrap around
        across = (pixels[..., 1:] - pixels[..., :-1]).abs()  # (n, 3, 32, 31)
        down = (pixels[:, :, 1:] - pixels[:, :, :-1]).abs()  # (n, 3, 31, 32)
        flat = pixels.flatten(2)  # (n, 3, 1024)
        anywhere = (flat - flat[..., shuffled]).abs()  # (n, 3, 1024)
        means = [steps.mean(dtype=torch.float64) for steps in (across, down, anywhere)]
        sums += len(part) * torch.stack(means)
    across, down, anywhere = (sums / len(images)).tolist()
    return across, down, anywhere


def _ids(values: Any, count: int) -> tuple[int | str, ...]:
    """Return the ids of `count` images, checked.

    They are counted before they become Python objects, because an object for each value of a 64 MB
    array can take a gigabyte.
    """
    is_array = isinstance(values, np.ndarray) and values.ndim > 0 and values.size == len(values)
    if not is_array and not isinstance(values, (list, tuple, range)):
        kind = getattr(values, "shape", type(values).__name__)
        raise InputError(f"ids: expected a list or a flat array, got {kind}")
    if len(values) != count:
        raise InputError(f"ids: expected one for each of {count} images, got {len(values)}")
    ids = tuple(_id(value) for value in (values.ravel().tolist() if is_array else values))
    repeated = [name for name, times in Counter(map(str, ids)).items() if times > 1]
    if repeated:
        raise InputError(f"ids: {repeated[0][:20]!r} is the id of several images")
    return ids


def _id(value: Any) -> int | str:
    """Return one id: a name, or a whole number as an int, whatever type it had in the file."""
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)  # pandas may store whole numbers as doubles, exact up to 2^53
    if type(value) is int and abs(value) < 10**20:
        return value
    if isinstance(value, str) and 0 < len(value) <= LONGEST and value.isprintable():
        return value
    wanted = f"whole numbers of at most 20 digits, or names of 1 to {LONGEST} printable characters"
    found = repr(value[:20]) if isinstance(value, str) else f"{value!r:.30}"
    raise InputError(f"ids: expected {wanted}, got {found}")


def write_submission(
    path: str | os.PathLike,
    ids: Sequence[int | str],
    labels: Sequence[int],
    label_column: str = "Labels",
    inputs: Sequence[str | os.PathLike] = (),
) -> None:
    """Write the header `ID,<label_column>` and one row per image, in the order given.

    path: a file, or `-` for standard output.
    labels: class numbers, 0 to 9.
    inputs: files that must not be overwritten.

    Raises InputError if the rows aren't a valid submission or the file can't be written. An older
    file then stays as it was.
    """
    if not label_column or not label_column.isprintable():
        what = f"submission: expected a printable column name, got {label_column[:20]!r}"
        raise InputError(f"{what}: change --label-column")
    wrong = [label for label in labels if label not in range(len(CLASSES))]
    if wrong:
        raise InputError(f"submission: expected labels 0 to 9, got {wrong[0]!r:.20}")
    rows = zip(_ids(ids, len(labels)), map(int, labels), strict=True)
    table = pd.DataFrame(rows, columns=["ID", label_column], dtype=object)
    content = table.to_csv(index=False, lineterminator="\n").encode()
    if str(path) == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        write_atomically(output_file(path), content, inputs)
