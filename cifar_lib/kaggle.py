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

from cifar_lib.checkpoint import write_atomically
from cifar_lib.data import CLASSES, KAGGLE_MEAN, KAGGLE_STD, ImageSet
from cifar_lib.errors import InputError
from cifar_lib.shift import match_statistics

MAX_BYTES = 1 << 30  # a test set of 10,000 images has 31 MB


def read_test_file(path: str | os.PathLike) -> ImageSet:
    """The unlabelled images and ids of a pickled dict with `data` and `ids` (keys bytes or str), running no code in it.

    `data`: uint8 (N, 32, 32, 3), or flat (N, 3072) with the channels one after the other, told apart by the shape.
    `ids`: N different whole numbers or names. Raises InputError for anything else.
    """
    path = Path(path)
    remedy = "give the competition's .pkl, a dict with data (N, 32, 32, 3) and ids"
    if not path.is_file():
        raise InputError(f"test file: expected a file, found none at {path}: {remedy}")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"test file: {path} has {path.stat().st_size:,} bytes, over {MAX_BYTES:,}: {remedy}")
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        images, ids = _images(_entry(content, "data")), _ids(_entry(content, "ids"))
    except InputError as error:
        raise InputError(f"test file: {path}: {error}: {remedy}") from error
    except Exception as error:  # a hostile pickle can raise anything; whatever it is, the file is refused
        raise InputError(f"test file: {path} can't be read as a pickle ({_one_line(error)}): {remedy}") from error
    if len(images) != len(ids):
        raise InputError(f"test file: {path}: {len(images)} images, but {len(ids)} ids: {remedy}")
    return ImageSet(images, ids=ids, source=path.name)


def _one_line(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text[:200]}"


def _empty_array(kind: object, shape: tuple, code: bytes | str) -> np.ndarray:
    """numpy's `_reconstruct`, for the one call that numpy itself writes: an empty array, filled afterwards."""
    if kind is not _ARRAY or shape != (0,):
        raise InputError("it asks numpy for something else than an array")
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _scalar(dtype: np.dtype, content: bytes | str) -> np.generic:
    """numpy's `scalar`, without its object scalars."""
    raw = content.encode("latin1") if isinstance(content, str) else content
    if dtype.hasobject or dtype.itemsize != len(raw):
        raise InputError("it holds a numpy scalar of another size than its type's")
    return np.frombuffer(raw, dtype)[0]


def _frombuffer(buffer: Any, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    """numpy's `_frombuffer` (protocol 5)."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def _dtype(code: str | bytes, align: bool = False, copy: bool = False) -> np.dtype:
    """numpy's `dtype`, from the name of a simple type: no objects, records or dotted names."""
    name = code.decode("ascii") if isinstance(code, bytes) else code
    if not isinstance(name, str) or name.strip("<>|=")[:1] not in tuple("biufSU") or len(name) > 8:
        raise InputError(f"it holds an array of type {str(name)[:20]!r}")
    return np.dtype(name)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode`, as Python 3 writes bytes in protocols 0 to 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise InputError(f"it asks to encode as {str(encoding)[:20]!r}")
    return text.encode("latin1")


_ARRAY = object()  # stands for numpy.ndarray, which is only ever named, never called
_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    **{(f"{core}.multiarray", "_reconstruct"): _empty_array for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.numeric", "_frombuffer"): _frombuffer for core in ("numpy.core", "numpy._core")},
}


class _Unpickler(pickle.Unpickler):
    """Finds the exact names above and no others; what it finds are stand-ins that do only what an array needs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise InputError(f"it wants to run {module[:60]}.{name[:60]}; nothing was run")
        return _ALLOWED[module, name]


def _entry(content: object, key: str) -> Any:
    if not isinstance(content, dict):
        raise InputError(f"expected a dict, got {type(content).__name__}")
    for name in (key, key.encode()):
        if name in content:
            return content[name]
    found = ", ".join(repr(k)[:20] for k in list(content)[:5]) or "nothing"
    raise InputError(f"expected the key {key!r}, found {found}")


def _images(data: object) -> torch.Tensor:
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        kind = f"an array of {data.dtype}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(f"data: expected an array of uint8, got {kind}")
    if len(data) == 0 or data.shape[1:] not in ((32, 32, 3), (3072,)):
        raise InputError(f"data: expected (N, 32, 32, 3) or (N, 3072), got {data.shape}")
    chw = data.reshape(-1, 3, 32, 32) if data.ndim == 2 else data.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.array(chw, order="C"))


def _ids(values: object) -> tuple[int | str, ...]:
    if isinstance(values, np.ndarray):
        values = values.tolist() if values.ndim == 1 else None
    if not isinstance(values, (list, tuple)):
        raise InputError(f"ids: expected a list or a flat array, got {type(values).__name__}")
    ids = tuple(_id(value) for value in values)
    if len(set(ids)) != len(ids):
        repeated = next(i for i in ids if ids.count(i) > 1)
        raise InputError(f"ids: {repeated!r} stands for several images")
    return ids


def _id(value: object) -> int | str:
    value = value.item() if isinstance(value, np.generic) else value
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if type(value) is int or (isinstance(value, str) and value and value.isprintable()):
        return value
    raise InputError(f"ids: expected whole numbers or names, got {str(value)[:20]!r}")


def write_submission(
    path: str | os.PathLike, ids: Sequence[int | str], labels: Sequence[int], label_column: str = "Labels"
) -> None:
    """Write `ID,<label_column>`, a row an image in the order given; checked before it replaces an existing file.

    `labels`: class numbers 0 to 9. Raises InputError, and changes nothing, where the rows are no valid submission.
    """
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
        raise InputError("submission: the ids written are not the ids asked for: use ids without control characters")
    wrong = [row for row in rows if len(row) != 2 or row[1] not in map(str, range(len(CLASSES)))]
    if wrong or len(set(row[0] for row in rows)) != len(rows):
        raise InputError(f"submission: expected different ids and labels 0 to 9, got {wrong[:1] or 'a repeated id'}")


def generate_test_file(path: str | os.PathLike, test: ImageSet, seed: int = 0) -> ImageSet:
    """A shifted test file in the competition's format, for where there is no real one; returns its images with labels.

    The images of `test` in another order, with the channel statistics that the published run found in the competition's
    images (KAGGLE_MEAN, KAGGLE_STD). The file itself holds `data` (N, 32, 32, 3) and `ids` 0 to N - 1, no labels.
    """
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    shuffled = test[order]
    images = match_statistics(shuffled.images, KAGGLE_MEAN, KAGGLE_STD)
    content = {b"data": images.permute(0, 2, 3, 1).contiguous().numpy(), b"ids": list(range(len(images)))}
    write_atomically(Path(path), pickle.dumps(content, protocol=4))
    return replace(shuffled, images=images, ids=tuple(range(len(images))))
