"""The competition: an untrusted pickle in, a validated submission out."""

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
from cifar_lib.files import read_regular, write_atomically

LONGEST = 200  # characters of an id


def read_test_file(path: str | os.PathLike) -> ImageSet:
    """The unlabelled images and ids of a pickled dict; no code in it runs.

    `data`: uint8 (N, 32, 32, 3), or (N, 3072) with the channels one after the other; `ids`: N
    different whole numbers or names. Raises InputError for anything else.
    """
    remedy = "give the competition's .pkl, a dict with data (N, 32, 32, 3) and ids"
    with explained(f"test file: {path} can't be read", remedy):
        content = pickles.read(read_regular(Path(path), pickles.MAX_BYTES))
        content = {key.decode() if isinstance(key, bytes) else key: content[key] for key in content}
        if not {"data", "ids"} <= content.keys():
            raise InputError(f"expected the keys data and ids, found {str([*content][:5])[:99]}")
        images = _images(content["data"])
        ids = _ids(content["ids"], len(images))
    return ImageSet(images, ids=ids, source=Path(path).name)


def _images(data: Any) -> torch.Tensor:
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        kind = getattr(data, "dtype", type(data).__name__)
        raise InputError(f"data: expected an array of uint8, got {kind}")
    if data.size == 0 or data.shape[1:] not in ((32, 32, 3), (3072,)):
        raise InputError(f"data: expected (N, 32, 32, 3) or (N, 3072), got {data.shape}")
    chw = data.reshape(-1, 3, 32, 32) if data.ndim == 2 else data.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.array(chw, order="C"))


def _ids(values: Any, count: int) -> tuple[int | str, ...]:
    """Counted first: a small array can be a gigabyte of Python's objects."""
    flat = isinstance(values, np.ndarray) and values.ndim == 1
    if not flat and not isinstance(values, (list, tuple)):
        raise InputError(f"ids: expected a list or a flat array, got {type(values).__name__}")
    if len(values) != count:
        raise InputError(f"ids: expected one for each of {count} images, got {len(values)}")
    ids = tuple(_id(value) for value in (values.tolist() if flat else values))
    repeated = [name for name, times in Counter(map(str, ids)).items() if times > 1]
    if repeated:
        raise InputError(f"ids: {repeated[0]!r:.20} stands for several images")
    return ids


def _id(value: Any) -> int | str:
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
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
    """Write `ID,<label_column>` and a row an image in the order given; `-` is standard output.

    `labels`: class numbers 0 to 9; `inputs`: files that must not be written over. Raises
    InputError, and leaves an older file as it was, where the rows are no valid submission.
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
        write_atomically(Path(path), content, inputs)
