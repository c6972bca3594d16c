"""Reads a stranger's pickle as data, without running anything that it names.

A pickle is a small program: instructions push values on a stack, collect them into lists and dicts,
and call whatever function they name, `os.system` as willingly as numpy's. Lists of forbidden names
are bypassed again and again, so here everything is forbidden but a few:

- `INSTRUCTIONS` are those that data and arrays need. Any other one ends the reading.
- A name is never looked up: it stands for one of the inert functions in `_FUNCTIONS`.
- A short file must not become long work or fill the memory. The instructions are counted, the keys
  of a dict are short (tuples in tuples can take for ever to hash), and only small values are used
  twice (a tuple of the same tuple twice, sixty deep, would have 2^60 members).

The last point is why `_Reader` changes the unpickler that the standard library keeps in Python,
`pickle._Unpickler`: it calls a method `load_...` for each instruction. The public one is in C. It
takes as much memory as an index or a length asks for, and hashes a key before anybody has seen it.
"""

import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from cifar_lib.errors import InputError

MAX_BYTES = 1 << 26  # 64 MiB; 20,000 images have 61 MB
MAX_INSTRUCTIONS = 1_000_000  # 50 for each of 20,000 images
MAX_SHORT = 200  # characters of a dict's key, and of a text that is used again
INSTRUCTIONS = """
PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS
PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
"""


def read(content: bytes) -> dict[str | bytes | int, Any]:
    """Returns the dict that a pickle holds; protocols 0 to 5, by Python 2 or 3 and numpy 1 or 2.

    Its values are plain data, and arrays of numbers, truth values or strings. Arrays are read-only;
    those inside lists or inner dicts stay objects of this module. numpy's scalars become Python's
    numbers and texts, a flat array of objects becomes a list of them, protocol 5's bytearrays
    become bytes, and Python 2's strings are decoded as latin-1.

    Raises InputError if the file is broken or too long, or wants anything else.
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
    """The unpickler with the instructions that are changed: each has a method `load_...`."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="latin1")
        self.memo = _Memo()

        # `dispatch` maps an instruction's byte to its method; below, a method may have its like.
        original = pickle._Unpickler.dispatch
        self.dispatch = _Dispatch()
        for name in INSTRUCTIONS.split():
            code = getattr(pickle, name)[0]
            self.dispatch[code] = getattr(_Reader, original[code].__name__)

    # Functions: found, called, and their results filled

    def find_class(self, module: str, name: str) -> Callable | None:
        """Returns what stands for a name; numpy 2 has `numpy._core` for numpy 1's `numpy.core`."""
        place = module.replace("numpy._core", "numpy.core"), name
        if place not in _FUNCTIONS:
            shown = repr(f"{module[:100]}.{name[:100]}")[1:-1]
            raise InputError(f"it wants to run {shown}; nothing was run")
        return _FUNCTIONS[place]

    def load_reduce(self) -> None:
        """Calls a function. Nothing but those of `_FUNCTIONS` on the stack can be called."""
        if not isinstance(self.stack[-1], tuple):
            raise InputError("it calls a function otherwise than numpy does; nothing was run")
        super().load_reduce()

    def load_build(self) -> None:
        """Fills what a call returned; only `_DType` and `_Array` have a method `build`."""
        state = self.stack.pop()
        self.stack[-1].build(state)

    # Values: no more work or memory than the file is long

    def load_empty_dictionary(self) -> None:
        self.append(_Dict())

    def load_dict(self) -> None:
        """Pickle itself always writes an empty one, and fills it afterwards."""
        if self.pop_mark():
            raise InputError("it fills a dict otherwise than pickle does")
        self.append(_Dict())

    def load_short_binunicode(self) -> None:
        self._load_text(1)

    def load_binunicode(self) -> None:
        self._load_text(4)

    def load_binunicode8(self) -> None:
        self._load_text(8)

    def _load_text(self, digits: int) -> None:
        """Reads a length of so many bytes, and UTF-8. The original takes lone surrogates too, which
        no honest file has, and needs 7 s for 21 million of them."""
        size = int.from_bytes(self.read(digits), "little")
        self.append(self.read(size).decode("utf-8"))

    def load_bytearray8(self) -> None:
        """As bytes: the original takes as much memory as the file says, before it reads."""
        self.load_binbytes8()


class _Dispatch(dict):
    """{instruction: method}, which counts: the unpickler looks each up before it follows it."""

    followed = 0

    def __getitem__(self, code: int) -> Callable:
        self.followed += 1
        if self.followed > MAX_INSTRUCTIONS:
            raise InputError(f"it has over {MAX_INSTRUCTIONS:,} instructions")
        if code not in self:
            raise InputError(f"no pickle of arrays: it has the instruction {bytes([code])!r}")
        return super().__getitem__(code)


class _Dict(dict):
    """A dict of short keys: quick to hash and to compare, whatever a file makes up."""

    def __setitem__(self, key: Any, value: Any) -> None:
        # Numbers as large as 2^61 can have the same hash.
        is_number = isinstance(key, int) and 0 <= key < MAX_INSTRUCTIONS
        is_name = isinstance(key, (str, bytes)) and len(key) <= MAX_SHORT
        if not is_number and not is_name:
            raise InputError(f"expected short names as a dict's keys, got {type(key).__name__}")
        super().__setitem__(key, value)


class _Memo(_Dict):
    """What a file stores by number and uses again: small values only, or nothing bounds the work.

    Being a dict it takes no memory for the numbers left out.
    """

    def __getitem__(self, index: int) -> Any:
        value = super().__getitem__(index)
        is_long = isinstance(value, (str, bytes)) and len(value) > MAX_SHORT
        if is_long or isinstance(value, (list, tuple, dict)):
            raise InputError(f"it uses one {type(value).__name__} several times")
        return value


# What an array's pickle calls: inert functions in place of numpy's


class _DType:
    """The type of an array: the call gives its kind and size, BUILD the byte order."""

    def __init__(self, code: str, align: Any, copy: Any):
        if not re.fullmatch("b1|[iu][1248]|f[248]|[SU][1-9][0-9]{0,2}|O[48]", code):
            raise InputError(f"it holds an array of {code[:20]!r}, neither numbers nor names")
        self.dtype = np.dtype(code[0] if code[0] == "O" else code)

    def build(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array, without values until BUILD brings them."""

    def __init__(self, values: np.ndarray | list | None = None):
        self.values = values

    def build(self, state: tuple) -> None:
        _, shape, kind, is_fortran, content = state
        self.values = _values(content, kind, shape, "F" if is_fortran else "C")


def _values(
    content: Any, kind: _DType, shape: Any, order: Any, axes: Any = None
) -> np.ndarray | list:
    """Returns a read-only array on the bytes, whose shape must fit them exactly.

    An array of objects must be a flat list of them, and that list is returned. Order K, from numpy
    2.3 on, means that the bytes are in order C and the axes are exchanged afterwards.
    """
    # Never a view of objects: numpy would take the bytes for addresses.
    if kind.dtype.kind == "O":
        if not isinstance(content, list) or shape != (len(content),):
            raise InputError("it holds an array of objects that isn't a plain list of them")
        return content

    # numpy refuses a shape that needs more bytes than there are.
    content = content.encode("latin1") if isinstance(content, str) else content
    stored = "C" if order == "K" else order
    array = np.ndarray(shape, kind.dtype, memoryview(content), order=stored)
    if array.nbytes != len(content):
        raise InputError(f"it holds an array of another shape than its {len(content):,} bytes")

    # numpy takes any number for a character, and breaks on it later; decoding fails now.
    if kind.dtype.kind == "U":
        content.decode("utf-32-be" if kind.dtype.str[0] == ">" else "utf-32-le")
    return array.transpose(axes) if order == "K" else array


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """Any array begins like this; BUILD fills it."""
    return _Array()


def _scalar(kind: _DType, content: Any) -> Any:
    """One of numpy's numbers or texts, as Python's."""
    return _values(content, kind, (), "C").item()


def _frombuffer(content: Any, kind: _DType, shape: Any, order: Any, axes: Any = None) -> _Array:
    """A whole array in one call, from protocol 5 on."""
    return _Array(_values(content, kind, shape, order, axes))


def _encode(text: str, encoding: str) -> bytes:
    """Bytes, as Python 3 writes them in protocols 0 to 2."""
    if encoding != "latin1":
        raise InputError("it encodes text otherwise than pickle does")
    return text.encode("latin1")


def _range(*numbers: int) -> range:
    """A range takes no memory, however long it is, until somebody counts it out."""
    counted = range(*numbers)
    if len(counted) > MAX_INSTRUCTIONS:
        raise InputError(f"it counts to over {MAX_INSTRUCTIONS:,}")
    return counted


_FUNCTIONS = {
    ("numpy", "ndarray"): None,  # only an argument of `_reconstruct`
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
    ("builtins", "range"): _range,
    ("__builtin__", "xrange"): _range,
}
