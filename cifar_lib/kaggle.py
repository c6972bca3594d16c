"""The competition: an untrusted pickle in, a validated submission out."""

import csv
import io
import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_lib import pickles
from cifar_lib.checkpoint import write_atomically
from cifar_lib.data import CLASSES, KAGGLE_MEAN, KAGGLE_STD, ImageSet
from cifar_lib.errors import InputError
from cifar_lib.shift import match_statistics

MAX_NAME = 200  # characters of an id


def read_test_file(path: str | os.PathLike) -> ImageSet:
    """The unlabelled images and ids of a pickled dict with `data` and `ids` (keys bytes or str); no
    code in it runs.

    `data`: uint8 (N, 32, 32, 3), or flat (N, 3072) with the channels one after the other, told
    apart by the shape. `ids`: N different whole numbers or names. Raises InputError for anything
    else.
    """
    path = Path(path)
    remedy = "give the competition's .pkl, a dict with data (N, 32, 32, 3) and ids"
    if not os.path.isfile(path):
        raise InputError(f"test file: expected a file, found none at {path}: {remedy}")
    try:
        with open(path, "rb") as file:
            content = pickles.read(file.read(pickles.MAX_BYTES + 1))
        images, ids = _images(_entry(content, "data")), _ids(_entry(content, "ids"))
    except InputError as error:
        raise InputError(f"test file: {path}: {error}: {remedy}") from error
    except OSError as error:
        raise InputError(f"test file: {path} can't be read ({error.strerror}): {remedy}") from error
    if len(images) != len(ids):
        raise InputError(f"test file: {path}: {len(images)} images, but {len(ids)} ids: {remedy}")
    return ImageSet(images, ids=ids, source=path.name)


def _entry(content: object, key: str) -> Any:
    if not isinstance(content, dict):
        raise InputError(f"expected a dict, got {type(content).__name__}")
    for name in (key, key.encode()):
        if name in content:
            return content[name]
    found = ", ".join(_short(name) for name in list(content)[:5]) or "nothing"
    raise InputError(f"expected the key {key!r}, found {found}")


def _short(value: object) -> str:
    """A few characters of a value that can be long: a number of a million digits takes minutes to
    write out."""
    if isinstance(value, (str, bytes)):
        return repr(value[:20])
    return (
        str(value)
        if isinstance(value, int) and abs(value) < 10**20
        else f"a {type(value).__name__}"
    )


def _images(data: object) -> torch.Tensor:
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        kind = f"an array of {data.dtype}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(f"data: expected an array of uint8, got {kind}")
    if data.size == 0 or data.shape[1:] not in ((32, 32, 3), (3072,)):
        raise InputError(f"data: expected (N, 32, 32, 3) or (N, 3072), got {data.shape}")
    chw = data.reshape(-1, 3, 32, 32) if data.ndim == 2 else data.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.array(chw, order="C"))


def _ids(values: object) -> tuple[int | str, ...]:
    if isinstance(values, np.ndarray):
        values = values.tolist() if values.ndim == 1 else None
    if not isinstance(values, (list, tuple)):
        raise InputError(f"ids: expected a list or a flat array, got {type(values).__name__}")
    ids = tuple(_id(value) for value in values)
    seen: set[int | str] = set()
    for name in ids:
        if name in seen:
            raise InputError(f"ids: {_short(name)} stands for several images")
        seen.add(name)
    return ids


def _id(value: object) -> int | str:
    value = value.item() if isinstance(value, np.generic) else value
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if type(value) is int and abs(value) < 10**20:
        return value
    if isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable():
        return value
    raise InputError(
        f"ids: expected whole numbers or names of at most {MAX_NAME} characters, got {_short(value)}"
    )


def write_submission(
    path: str | os.PathLike,
    ids: Sequence[int | str],
    labels: Sequence[int],
    label_column: str = "Labels",
) -> None:
    """Write `ID,<label_column>`, a row an image in the order given; checked before it replaces an
    existing file.

    `labels`: class numbers 0 to 9. Raises InputError, and changes nothing, where the rows are no
    valid submission.
    """
    if not label_column or not label_column.isprintable():
        raise InputError(
            f"submission: expected a column's name, got {label_column[:20]!r}: use Labels or Category"
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ID", label_column])
    writer.writerows(zip(ids, (int(label) for label in labels), strict=True))
    content = text.getvalue().encode()
    _validate(content, ids, label_column)
    write_atomically(Path(path), content)
    _validate(Path(path).read_bytes(), ids, label_column)


def _validate(content: bytes, ids: Sequence[int | str], label_column: str) -> None:
    """Every id once, in order, each with a class number."""
    header, *rows = csv.reader(io.StringIO(content.decode()))
    if header != ["ID", label_column] or [row[0] for row in rows] != [str(i) for i in ids]:
        raise InputError(
            "submission: the ids written are not the ids asked for: use ids without control characters"
        )
    wrong = [row for row in rows if len(row) != 2 or row[1] not in map(str, range(len(CLASSES)))]
    if wrong or len(set(row[0] for row in rows)) != len(rows):
        raise InputError(
            f"submission: expected different ids and labels 0 to 9, got {wrong[:1] or 'a repeated id'}"
        )


def generate_test_file(path: str | os.PathLike, test: ImageSet, seed: int = 0) -> ImageSet:
    """A shifted test file in the competition's format, for where there is no real one; returns its
    images with labels.

    The images of `test` in another order, with the channel statistics that the published run found
    in the competition's images (KAGGLE_MEAN, KAGGLE_STD). The file itself holds `data` (N, 32, 32,
    3) and `ids` 0 to N - 1, no labels.
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
