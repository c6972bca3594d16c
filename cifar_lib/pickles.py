"""A stranger's pickle read as data: Python's own unpickler, with few instructions and fewer names.

A pickle runs what it names, and lists of forbidden names are bypassed again and again. Here a file
finds only the names of numpy's arrays, and behind each of them an inert function of this module.
The unpickler is the one written in Python: its instructions can be counted, a dict's keys are seen
before they are hashed, and no room is taken for a number that the file names.
"""

import io
import pickle
import re
from collections.abc import Callable
from functools import partialmethod
from typing import Any

import numpy as np

from cifar_lib.errors import InputError

MAX_BYTES = 1 << 26  # 20,000 images
MAX_INSTRUCTIONS = 1_000_000  # fifty for each image
SHORT = 200  # characters of a dict's keys, and of a text that is used again
INSTRUCTIONS = """
PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS
PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
"""


def read(content: bytes) -> dict[str | bytes | int, Any]:
    """The dict of a pickle of any protocol, 0 to 5, written by Python 2 or 3 and numpy 1 or 2.

    Its values: plain data, and arrays of numbers, truth values or strings (read-only; those inside
    of lists and deeper dicts stay inert). numpy's scalars come as Python's, a flat array of objects
    as a list of them, bytearrays as bytes, Python 2's strings as latin1. InputError where it is
    broken, too long, or wants anything else.
    """
    if len(content) > MAX_BYTES:
        raise InputError(f"it has over {MAX_BYTES:,} bytes")
    try:
        value = _Reader(content).load()
    except InputError:
        raise
    except Exception as error:  # whatever the unpickler stumbles over in a broken file
        raise InputError(f"no pickle of arrays ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise InputError(f"expected a dict, got {type(value).__name__}")
    return {k: v.values if isinstance(v, _Array) else v for k, v in value.items()}


class _Reader(pickle._Unpickler):
    """Each `load_...` is an instruction of the unpickler, changed."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="latin1")
        methods = pickle._Unpickler.dispatch
        codes = [getattr(pickle, name)[0] for name in INSTRUCTIONS.split()]
        self.dispatch = _Counted({c: getattr(_Reader, methods[c].__name__) for c in codes})
        self.memo = _Memo()

    def find_class(self, module: str, name: str) -> Any:
        place = module.replace("numpy._core", "numpy.core"), name
        if place not in _NAMES:
            shown = repr(f"{module[:100]}.{name[:100]}")[1:-1]
            raise InputError(f"it wants to run {shown}; nothing was run")
        return _NAMES[place]

    def load_reduce(self) -> None:
        if not isinstance(self.stack[-1], tuple):
            raise InputError("it calls a function otherwise than numpy does; nothing was run")
        super().load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        self.stack[-1].build(state)  # only what is to become an array has that

    def load_empty_dictionary(self) -> None:
        self.append(_Dict())

    def load_dict(self) -> None:
        if self.pop_mark():
            raise InputError("it fills a dict otherwise than pickle does")
        self.append(_Dict())

    def load_text(self, digits: int) -> None:
        """UTF-8; the unpickler's own methods take lone surrogates too, 21 million in 7 s."""
        size = int.from_bytes(self.read(digits), "little")
        self.append(self.read(size).decode("utf-8"))

    load_short_binunicode = partialmethod(load_text, 1)
    load_binunicode = partialmethod(load_text, 4)
    load_binunicode8 = partialmethod(load_text, 8)
    load_bytearray8 = pickle._Unpickler.load_binbytes8  # its own takes as much room as it is told


class _Counted(dict):
    """{instruction: method}: the unpickler looks each up that it follows; KeyError ends it."""

    followed = 0

    def __getitem__(self, code: int) -> Callable:
        self.followed += 1
        if self.followed > MAX_INSTRUCTIONS:
            raise InputError(f"it has over {MAX_INSTRUCTIONS:,} instructions")
        return super().__getitem__(code)


class _Dict(dict):
    """Keys that are quick to hash and compare, unlike tuples in tuples or numbers of equal hash."""

    def __setitem__(self, key: Any, value: Any) -> None:
        small = isinstance(key, int) and 0 <= key < MAX_INSTRUCTIONS
        if not small and not (isinstance(key, (str, bytes)) and len(key) <= SHORT):
            raise InputError(f"expected short names as a dict's keys, got {type(key).__name__}")
        super().__setitem__(key, value)


class _Memo(_Dict):
    """What is used again is small, so that the work is no more than the file is long."""

    def __getitem__(self, index: int) -> Any:
        value = super().__getitem__(index)
        long = isinstance(value, (str, bytes)) and len(value) > SHORT
        if long or isinstance(value, (list, tuple, dict)):
            raise InputError(f"it uses one {type(value).__name__} several times")
        return value


class _DType:
    """An array's type: the call gives kind and size, BUILD the byte order."""

    def __init__(self, code: str, align: Any, copy: Any):
        if not re.fullmatch("b1|[iu][1248]|f[248]|[SU][1-9][0-9]{0,2}|O[48]", code):
            raise InputError(f"it holds an array of {code[:20]!r}, neither numbers nor names")
        self.dtype = np.dtype(code[0] if code[0] == "O" else code)

    def build(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array, without values where BUILD has yet to fill it."""

    def __init__(self, values: np.ndarray | list | None = None):
        self.values = values

    def build(self, state: tuple) -> None:
        _, shape, kind, fortran, content = state
        self.values = _values(content, kind, shape, "F" if fortran else "C")


def _values(
    content: Any, kind: _DType, shape: Any, order: Any, axes: Any = None
) -> np.ndarray | list:
    """A view of the bytes, which must be as many as the shape says; of objects, which are names or
    numbers in a list, that list. Order K, from numpy 2.3 on: the bytes are in order C, and the axes
    are exchanged afterwards."""
    if kind.dtype.kind == "O":  # never a view: bytes would be taken for addresses
        if not isinstance(content, list) or shape != (len(content),):
            raise InputError("it holds an array of objects that isn't a plain list of them")
        return content
    content = content.encode("latin1") if isinstance(content, str) else content
    stored = "C" if order == "K" else order
    array = np.ndarray(shape, kind.dtype, memoryview(content), order=stored)  # checks the shape
    if array.nbytes != len(content):
        raise InputError(f"it holds an array of another shape than its {len(content):,} bytes")
    if kind.dtype.kind == "U":  # numpy takes any number for a character, and breaks on it later
        content.decode("utf-32-be" if kind.dtype.str[0] == ">" else "utf-32-le")
    return array.transpose(axes) if order == "K" else array


def _range(*numbers: int) -> range:
    """Takes no room, however long; Python writes `range(N)` as a call."""
    counted = range(*numbers)
    if len(counted) > MAX_INSTRUCTIONS:
        raise InputError(f"it counts to over {MAX_INSTRUCTIONS:,}")
    return counted


_NAMES = {
    ("numpy", "ndarray"): None,  # only an argument of `_reconstruct`
    ("numpy", "dtype"): _DType,
    ("builtins", "range"): _range,
    ("__builtin__", "xrange"): _range,
    ("numpy.core.multiarray", "_reconstruct"): lambda kind, shape, code: _Array(),
    ("numpy.core.multiarray", "scalar"): lambda kind, raw: _values(raw, kind, (), "C").item(),
    ("numpy.core.numeric", "_frombuffer"): lambda *arguments: _Array(_values(*arguments)),
    # Of bytes, by Python 3 in protocols 0 to 2; a KeyError for another encoding.
    ("_codecs", "encode"): lambda text, encoding: text.encode({"latin1": "latin1"}[encoding]),
}
