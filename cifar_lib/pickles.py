"""Reads a stranger's pickle as data, without running anything that it names.

A pickle is a small program. Its instructions push values on a stack, collect them into lists and
dicts, and call any function that they name, be it numpy's or `os.system`. Lists of forbidden names
keep being bypassed. Therefore everything is forbidden here, except for what data and
arrays need:

- Only the instructions in `INSTRUCTIONS` are followed. Any other one ends the reading.
- A name is never imported. It only chooses one of the harmless functions in `_FUNCTIONS`.
- A short file can't keep the reader busy for long, or fill the memory. The instructions are
  counted. The keys of a dict must be short names or small numbers, because tuples within tuples can
  take for ever to hash. Lists, tuples, dicts and long texts can't be used twice: if each of sixty
  tuples held the one before it twice, the last would have 2^60 members.

The last point needs control over each instruction. Python's public unpickler is written in C: it
takes as much memory as an index or a length in the file asks for, and hashes a key before anybody
can check it. The standard library also has an unpickler in Python, `pickle._Unpickler`, which calls
a method `load_...` for each instruction. `_Reader` is a subclass of it, and overrides some of these
methods.
"""

import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from cifar_lib.errors import InputError

MAX_BYTES = 1 << 26  # 64 MiB; 20,000 images take 61 MB
MAX_INSTRUCTIONS = 1_000_000  # 50 for each of 20,000 images
MAX_SHORT = 200  # characters of a dict's key, and of a text that is used more than once

# The instructions that are followed, by their names in Python's pickle module.
INSTRUCTIONS = """
PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS
PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
"""


def read(content: bytes) -> dict[str | bytes | int, Any]:
    """Return the dict that a pickle holds.

    The pickle may have any protocol from 0 to 5, and come from Python 2 or 3 with numpy 1 or 2. The
    dict's values are plain data, and read-only arrays of numbers, booleans or strings. A few things
    change their type:

    - numpy's scalars become Python's numbers and strings,
    - a flat array of objects becomes a list of them,
    - bytearrays become bytes in protocol 5; older protocols store a call, which is refused,
    - Python 2's strings are decoded as latin-1, and
    - arrays inside lists or inner dicts stay `_Array` objects.

    Raises InputError if the file is broken, too long, or needs anything that isn't allowed.
    """
    if len(content) > MAX_BYTES:
        raise InputError(f"it has over {MAX_BYTES:,} bytes")
    try:
        value = _Reader(content).load()
    except InputError:
        raise
    except Exception as error:  # a broken file can make the unpickler raise anything
        raise InputError(f"it isn't a pickle of arrays ({type(error).__name__})") from error

    if not isinstance(value, dict):
        raise InputError(f"expected a dict, got {type(value).__name__}")
    return {k: v.values if isinstance(v, _Array) else v for k, v in value.items()}


class _Reader(pickle._Unpickler):
    """The standard library's unpickler, with some instructions changed and others forbidden.

    It inherits these attributes and methods: `stack` has the values pushed so far, `memo` those
    stored for later, `append` pushes a value, `read` returns the next bytes of the file, and
    `pop_mark` removes and returns everything that was pushed since the last mark.
    """

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="latin1")
        self.memo = _Memo()

        # `dispatch` maps the byte of an instruction to its method. The original table holds the
        # original methods, so each is looked up again by its name, to find the ones that are
        # overridden below.
        original = pickle._Unpickler.dispatch
        self.dispatch = _Dispatch()
        for name in INSTRUCTIONS.split():
            code = getattr(pickle, name)[0]
            self.dispatch[code] = getattr(_Reader, original[code].__name__)

    # Functions: find one, call it, and fill the object that it returns.

    def find_class(self, module: str, name: str) -> Callable | None:
        """Return the function that stands for a name; the name itself is never imported.

        The module `numpy.core` of numpy 1 is called `numpy._core` in numpy 2.
        """
        place = module.replace("numpy._core", "numpy.core"), name
        if place not in _FUNCTIONS:
            raise InputError(f"it wants to run {module[:100]}.{name[:100]}; nothing was run")
        return _FUNCTIONS[place]

    def load_reduce(self) -> None:
        """Call the function on the stack. Only those in `_FUNCTIONS` can get there."""
        if not isinstance(self.stack[-1], tuple):
            raise InputError("it calls a function in a way that numpy doesn't; nothing was run")
        super().load_reduce()

    def load_build(self) -> None:
        """Fill the object that a call returned. Only `_DType` and `_Array` have a `build`."""
        state = self.stack.pop()
        self.stack[-1].build(state)

    # Values: reading them takes time and memory in proportion to the length of the file.

    def load_empty_dictionary(self) -> None:
        self.append(_Dict())

    def load_dict(self) -> None:
        """Push an empty dict. Pickle itself always writes it empty, and fills it afterwards."""
        if self.pop_mark():
            raise InputError("it fills a dict in a way that pickle doesn't")
        self.append(_Dict())

    def load_short_binunicode(self) -> None:
        self._load_text(1)

    def load_binunicode(self) -> None:
        self._load_text(4)

    def load_binunicode8(self) -> None:
        self._load_text(8)

    def _load_text(self, length_bytes: int) -> None:
        """Push a text. The file has its length in `length_bytes` bytes, then the text in UTF-8.

        The original methods also accept lone surrogates. No honest file has them, and 21 million of
        them take 7 s.
        """
        size = int.from_bytes(self.read(length_bytes), "little")
        self.append(self.read(size).decode("utf-8"))

    def load_bytearray8(self) -> None:
        """Push bytes instead of a bytearray.

        The original method reserves as much memory as the file says before it reads anything.
        """
        self.load_binbytes8()


class _Dispatch(dict):
    """A dict {byte of an instruction: method} that counts the look-ups.

    The unpickler looks up each instruction here right before following it, so an error raised here
    stops the reading in time.
    """

    followed = 0

    def __getitem__(self, code: int) -> Callable:
        self.followed += 1
        if self.followed > MAX_INSTRUCTIONS:
            raise InputError(f"it has over {MAX_INSTRUCTIONS:,} instructions")
        if code not in self:
            what = f"it has the instruction {bytes([code])!r}"
            raise InputError(f"it isn't a pickle of arrays: {what}")
        return super().__getitem__(code)


class _Dict(dict):
    """A dict with short keys, which are quick to hash and to compare, whatever the file holds."""

    def __setitem__(self, key: Any, value: Any) -> None:
        # Large numbers could be chosen to share one hash, which makes a dict slow. The memo numbers
        # its values from 0, one for an instruction at most, so honest numbers are small.
        is_number = isinstance(key, int) and 0 <= key < MAX_INSTRUCTIONS
        is_name = isinstance(key, (str, bytes)) and len(key) <= MAX_SHORT
        if not is_number and not is_name:
            numbers = f"numbers from 0 to {MAX_INSTRUCTIONS - 1:,}"
            wanted = f"names of at most {MAX_SHORT} characters, or {numbers}"
            raise InputError(f"expected {wanted} as keys, got a wrong {type(key).__name__}")
        super().__setitem__(key, value)


class _Memo(_Dict):
    """The values that a file stores under a number, to use them again.

    Only small values can be used again; otherwise a short file could cause any amount of work.
    Because this is a dict and not a list, a large number takes no memory for the numbers below it.
    """

    def __getitem__(self, index: int) -> Any:
        value = super().__getitem__(index)
        is_long = isinstance(value, (str, bytes)) and len(value) > MAX_SHORT
        if is_long or isinstance(value, (list, tuple, dict)):
            raise InputError(f"it uses one {type(value).__name__} several times")
        return value


# Harmless functions, which take the place of those that the pickle of an array calls.


class _DType:
    """The type of an array.

    The constructor gets its kind and size. The instruction BUILD sets its byte order.

    Raises InputError if the array's values aren't booleans, numbers, strings or objects.
    """

    def __init__(self, code: str, align: Any, copy: Any):
        if not re.fullmatch("b1|[iu][1248]|f[248]|[SU][1-9][0-9]{0,2}|O[48]", code):
            wanted = "booleans, real numbers, short strings and plain lists of objects"
            raise InputError(f"it holds an array of type {code[:20]!r}; only {wanted} are read")
        self.dtype = np.dtype(code[0] if code[0] == "O" else code)

    def build(self, state: tuple) -> None:
        """Set the byte order, the second value of numpy's state: `<`, `>` or `|`."""
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array, which has no values until the instruction BUILD sets them."""

    def __init__(self, values: np.ndarray | list | None = None):
        self.values = values

    def build(self, state: tuple) -> None:
        """Set the values from numpy's state: version, shape, type, order in memory, bytes."""
        _, shape, dtype, is_fortran, content = state
        self.values = _values(content, dtype, shape, "F" if is_fortran else "C")


def _values(
    content: Any, dtype: _DType, shape: Any, order: Any, axes: Any = None
) -> np.ndarray | list:
    """Return a read-only view of the bytes `content` as an array. Its shape must fit them exactly.

    An array of objects must be flat. Its content is a list of the objects, and that list is
    returned. The order K, which numpy has written since version 2.3, means that the bytes are in
    order C and that the array's axes are then permuted as `axes` says.

    Raises InputError or ValueError if the shape, type and bytes don't fit each other.
    """
    # Never make an array of objects from bytes: numpy would take them for addresses.
    if dtype.dtype.kind == "O":
        if not isinstance(content, list) or shape != (len(content),):
            raise InputError("it holds an array of objects that isn't a plain list of them")
        return content

    # Turn Python 2's bytes, which were read as latin-1 text, back into bytes. numpy itself refuses
    # a shape that needs more bytes than there are. A shape that needs fewer is refused here.
    content = content.encode("latin1") if isinstance(content, str) else content
    stored = "C" if order == "K" else order
    array = np.ndarray(shape, dtype.dtype, memoryview(content), order=stored)
    if array.nbytes != len(content):
        raise InputError(f"it holds an array whose shape doesn't fit its {len(content):,} bytes")

    # numpy accepts any number as a character, and fails only when the character is used. Decode the
    # bytes once, so that a wrong one is refused now.
    if dtype.dtype.kind == "U":
        content.decode("utf-32-be" if dtype.dtype.str[0] == ">" else "utf-32-le")
    return array.transpose(axes) if order == "K" else array


def _reconstruct(array_class: Any, shape: Any, code: Any) -> _Array:
    """Return an array without values. BUILD fills it later."""
    return _Array()


def _scalar(dtype: _DType, content: Any) -> Any:
    """Return one of numpy's scalars as a Python number or string."""
    return _values(content, dtype, (), "C").item()


def _frombuffer(content: Any, dtype: _DType, shape: Any, order: Any, axes: Any = None) -> _Array:
    """Return a whole array from one call, which is how protocol 5 stores it."""
    return _Array(_values(content, dtype, shape, order, axes))


def _encode(text: str, encoding: str) -> bytes:
    """Return `text` as bytes. In protocols 0 to 2, Python 3 stores bytes as latin-1 text."""
    if encoding != "latin1":
        raise InputError("it encodes text in a way that pickle doesn't")
    return text.encode("latin1")


def _range(*numbers: int) -> range:
    """Return a range of bounded length. It takes no memory itself, but a list of it would."""
    counted = range(*numbers)
    if len(counted) > MAX_INSTRUCTIONS:
        raise InputError(f"it holds a range of over {MAX_INSTRUCTIONS:,} numbers")
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
