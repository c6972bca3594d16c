"""The competition: an untrusted pickle in, a checked submission out."""

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
from cifar_lib.errors import InputError, explained
from cifar_lib.files import output_file, read_regular, write_atomically

LONGEST = 200  # characters of an id

# How 3,072 values in a row make an image; two orders of the same bytes.
PLANES, PIXELS = "plane after plane", "pixel after pixel"
SHAPES = {(32, 32, 3): PIXELS, (3, 32, 32): PLANES, (3072,): None}  # and what each promises
# A file in another order than its shape promises is smoother in that other order. The larger mean
# step to the next pixel, across or down, in the right order is this multiple of the wrong order's:
# 0.45 (planes) and 0.29 (pixels) over CIFAR-10's test images; at most 0.71 over those of any family
# of notebooks/course/corruptions.py at its highest severity. Of these 90,000 images, each taken as
# a file of one, none got below 0.9 in the wrong order, so that much is asked for to contradict a
# shape. Without a promise, 6 of them would be read wrongly, all of them grey.
CONTRADICTION = 0.9
# The mean step to the next pixel, over the mean step between any two pixels of the same image:
# 0.26 for CIFAR-10, at most 0.51 for a family above and 0.60 for 20 images of one (noise); 1.00
# for noise, at least 0.99 for 20 images of it. A single image of a family gets up to 0.98, and a
# single one of noise 1.00 with a standard deviation of 0.014.
GARBLED, GARBLED_ALONE, FEW = 0.8, 0.99, 20  # the second holds for files of fewer images than FEW

# What is mistaken for a pickle: how it begins, what it is, what to do.
STRANGERS = (
    (b"PK\x03\x04", "a zip archive (or a .npz or PyTorch's)", "unpack it first"),
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
    """Read the unlabelled images and ids of a pickled dict. No code in it runs.

    data: uint8 (N, 32, 32, 3), (N, 3, 32, 32) or (N, 3072).
    ids: N different whole numbers or names.

    Some programs reshape where they should transpose, so the smoothness of the images tells the
    order of the values; the set's `source` says which one was read. What smoothness can't tell is
    taken as it comes: rows exchanged with columns, images turned or mirrored, blue before red.

    Raises InputError for anything else, and for images that are noise in either order.
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
            raise InputError(stranger) from None
        found = {key.decode() if isinstance(key, bytes) else key: found[key] for key in found}
        if not {"data", "ids"} <= found.keys():
            raise InputError(f"expected the keys data and ids, found {str([*found][:5])[:99]}")
        images, order = _images(found["data"])
        ids = _ids(found["ids"], len(images))
    return ImageSet(images, ids=ids, source=f"{path.name}, {order}")


def _stranger(content: bytes) -> str | None:
    """What a file is that isn't a pickle, and what to do with it; None where nobody knows."""
    for beginning, kind, remedy in STRANGERS:
        if content.startswith(beginning):
            return f"it is {kind}: {remedy}"
    if content[8:10] == b'{"':  # after the header's length
        return "it is a safetensors file: those are weights, for --weights"
    head = content[:1000].decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if head.lower().startswith(("<!doctype", "<html", "<?xml")):
        return "it is a web page: download the file itself, logged in if need be"
    if head.startswith(("{", "[")):
        return "it is JSON: pickle its data and ids in a dict"
    first, *others = head.splitlines()[:3]
    commas = [line.count(",") for line in (first, *others)]
    if first.isprintable() and commas[0] > 0 and len(commas) > 1 and commas[1] == commas[0]:
        return "it is a CSV table: pickle the images and ids in a dict"
    return None


def _images(data: Any) -> tuple[torch.Tensor, str]:
    """uint8 (N, 3, 32, 32), and the order in which the values were read."""
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        kind = getattr(data, "dtype", type(data).__name__)
        raise InputError(f"data: expected an array of uint8, got {kind}")
    if data.size == 0 or data.shape[1:] not in SHAPES:
        shapes = "(N, 32, 32, 3), (N, 3, 32, 32) or (N, 3072)"
        raise InputError(f"data: expected {shapes}, got {data.shape}")
    promised = SHAPES[data.shape[1:]]
    values = torch.from_numpy(np.array(data, order="C"))
    orders = {
        PLANES: values.view(-1, 3, 32, 32),
        PIXELS: values.view(-1, 32, 32, 3).permute(0, 3, 1, 2),
    }

    # The smoother order; without a promise planes, CIFAR-10's own, where both are as smooth.
    steps = {name: _steps(images) for name, images in orders.items()}
    rough = {name: max(across, down) for name, (across, down, _) in steps.items()}
    order = promised or PLANES
    other = PIXELS if order == PLANES else PLANES
    if rough[other] < rough[order] * (CONTRADICTION if promised else 1):
        order = other

    across, down, anywhere = steps[order]
    limit = GARBLED if len(values) >= FEW else GARBLED_ALONE
    if (across + down) / 2 > limit * anywhere:
        what = "noise, whether read plane after plane or pixel after pixel"
        raise InputError(f"data: expected images, got {what}: write data (N, 32, 32, 3) anew")
    return orders[order].contiguous(), order


def _steps(images: torch.Tensor) -> tuple[float, float, float]:
    """Mean absolute differences between values of the same channel, over a set (N, 3, 32, 32).

    They are those between a pixel and the next one in its row, the next one in its column, and any
    other one of its image.
    """
    shuffled = torch.randperm(32 * 32, generator=torch.Generator().manual_seed(0))
    sums = torch.zeros(3, dtype=torch.float64)
    for part in images.split(1000):
        pixels = part.short()  # (n, 3, 32, 32)
        across = (pixels[..., 1:] - pixels[..., :-1]).abs()  # (n, 3, 32, 31)
        down = (pixels[:, :, 1:] - pixels[:, :, :-1]).abs()  # (n, 3, 31, 32)
        flat = pixels.flatten(2)  # (n, 3, 1024)
        anywhere = (flat - flat[..., shuffled]).abs()
        means = [steps.mean(dtype=torch.float64) for steps in (across, down, anywhere)]
        sums += len(part) * torch.stack(means)
    across, down, anywhere = (sums / len(images)).tolist()
    return across, down, anywhere


def _ids(values: Any, count: int) -> tuple[int | str, ...]:
    """The ids, checked. They are counted first: a small array can be a gigabyte of objects."""
    array = isinstance(values, np.ndarray) and values.ndim > 0 and values.size == len(values)
    if not array and not isinstance(values, (list, tuple, range)):
        kind = getattr(values, "shape", type(values).__name__)
        raise InputError(f"ids: expected a list or a flat array, got {kind}")
    if len(values) != count:
        raise InputError(f"ids: expected one for each of {count} images, got {len(values)}")
    ids = tuple(_id(value) for value in (values.ravel().tolist() if array else values))
    repeated = [name for name, times in Counter(map(str, ids)).items() if times > 1]
    if repeated:
        raise InputError(f"ids: {repeated[0]!r:.20} stands for several images")
    return ids


def _id(value: Any) -> int | str:
    """A whole number, whatever type it came in, or a name."""
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)  # what pandas makes of whole numbers; a double is exact up to there
    if type(value) is int and abs(value) < 10**20:
        return value
    if isinstance(value, str) and 0 < len(value) <= LONGEST and value.isprintable():
        return value
    found = repr(value[:20]) if isinstance(value, str) else type(value).__name__
    raise InputError(f"ids: expected whole numbers or names of 1 to {LONGEST} letters, got {found}")


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
    inputs: files that must not be written over.

    Raises InputError, and leaves an older file as it was, if the rows aren't a valid submission.
    """
    if not label_column or not label_column.isprintable():
        raise InputError(f"submission: expected a column's name, got {label_column!r:.20}")
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
