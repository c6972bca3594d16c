"""The competition: an untrusted pickle in, a validated submission out."""

import csv
import io
import os
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_lib import pickles
from cifar_lib.data import CLASSES, KAGGLE_MEAN, KAGGLE_STD, ImageSet
from cifar_lib.errors import InputError
from cifar_lib.files import write_atomically
from cifar_lib.shift import match_statistics

MAX_NAME = 200  # characters of an id


def read_test_file(path: str | os.PathLike) -> ImageSet:
    """The unlabelled images and ids of a pickled dict; no code in it runs.

    `data`: uint8 (N, 32, 32, 3), or flat (N, 3072) with the channels one after the other, told
    apart by the shape; `ids`: N different whole numbers or names. The two keys may be str or bytes.
    Raises InputError for anything else.
    """
    path = Path(path)
    remedy = "give the competition's .pkl, a dict with data (N, 32, 32, 3) and ids"
    if not os.path.isfile(path):
        raise InputError(f"test file: expected a file, found none at {path}: {remedy}")
    try:
        with open(path, "rb") as file:
            content = pickles.read(file.read(pickles.MAX_BYTES + 1))
        images = _images(_entry(content, "data"))
        ids = _ids(_entry(content, "ids"), len(images))
    except InputError as error:
        raise InputError(f"test file: {path}: {error}: {remedy}") from error
    except OSError as error:
        raise InputError(f"test file: {path} can't be read ({error.strerror}): {remedy}") from error
    return ImageSet(images, ids=ids, source=path.name)


def _entry(content: dict, key: str) -> Any:
    for name in (key, key.encode()):
        if name in content:
            return content[name]
    found = ", ".join(repr(name)[:20] for name in list(content)[:5]) or "nothing"
    raise InputError(f"expected the key {key!r}, found {found}")


def _images(data: object) -> torch.Tensor:
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        kind = f"an array of {data.dtype}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(f"data: expected an array of uint8, got {kind}")
    if data.size == 0 or data.shape[1:] not in ((32, 32, 3), (3072,)):
        raise InputError(f"data: expected (N, 32, 32, 3) or (N, 3072), got {data.shape}")
    chw = data.reshape(-1, 3, 32, 32) if data.ndim == 2 else data.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.array(chw, order="C"))


def _ids(values: object, count: int) -> tuple[int | str, ...]:
    """Counted first: a small array can be a gigabyte of Python's objects."""
    flat = isinstance(values, np.ndarray) and values.ndim == 1
    if not flat and not isinstance(values, (list, tuple)):
        raise InputError(f"ids: expected a list or a flat array, got {type(values).__name__}")
    if len(values) != count:
        raise InputError(f"{count} images, but {len(values)} ids")
    ids = tuple(_id(value) for value in (values.tolist() if flat else values))
    name, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise InputError(f"ids: {name!r:.20} stands for several images")
    return ids


def _id(value: object) -> int | str:
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if type(value) is int and abs(value) < 10**20:
        return value
    if isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable():
        return value
    found = repr(value[:20]) if isinstance(value, str) else type(value).__name__
    raise InputError(
        f"ids: expected whole numbers or names of 1 to {MAX_NAME} letters, got {found}"
    )


def write_submission(
    path: str | os.PathLike,
    ids: Sequence[int | str],
    labels: Sequence[int],
    label_column: str = "Labels",
    inputs: Sequence[str | os.PathLike] = (),
) -> None:
    """Write `ID,<label_column>` and a row an image in the order given.

    `labels`: class numbers 0 to 9; `inputs`: files that must not be written over. Raises
    InputError, and leaves an older file as it was, where the rows are no valid submission.
    """
    if not label_column or not label_column.isprintable():
        raise InputError(
            f"submission: expected a column's name, got {label_column!r:.20}: use Labels"
        )
    if len(ids) != len(labels):
        raise InputError(
            f"submission: expected a label an id, got {len(labels)} for {len(ids)} ids"
        )
    wrong = [label for label in labels if label not in range(len(CLASSES))]
    if wrong:
        raise InputError(f"submission: expected labels 0 to 9, got {wrong[0]!r:.20}")
    names = Counter(map(str, ids))
    wrong = [name for name in names if names[name] > 1 or not name.isprintable()]
    if wrong:
        raise InputError(f"submission: expected different, printable ids, got {wrong[0]!r:.20}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ID", label_column])
    writer.writerows(zip(ids, map(int, labels), strict=True))
    write_atomically(Path(path), text.getvalue().encode(), inputs)


def generate_test_file(path: str | os.PathLike, test: ImageSet, seed: int = 0) -> ImageSet:
    """A file in the competition's format, where there is no real one; returns its images labelled.

    The images of `test` in another order, with the channel statistics that the published run found
    in the competition's images. The file holds `data` (N, 32, 32, 3) and `ids` 0 to N - 1.
    """
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    shuffled = test[order]
    images = match_statistics(shuffled.images, KAGGLE_MEAN, KAGGLE_STD)
    content = {
        b"data": images.permute(0, 2, 3, 1).contiguous().numpy(),
        b"ids": list(range(len(images))),
    }
    write_atomically(Path(path), pickle.dumps(content, protocol=4))
    return replace(shuffled, images=images, ids=tuple(range(len(images))))
