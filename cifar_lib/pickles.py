"""A stranger's pickle read as data: its instructions are followed here, one by one, and none of
them calls anything.

Python's own unpickler looks names up and calls what it finds; lists of forbidden names are bypassed
again and again, and even an allowed function can be rebuilt by the file. Here a name from the short
list below becomes a mark, and a "call" of it is worked out by this module: arrays, their types, and
bytes as old protocols write them. All else is refused.
"""

import codecs
import io
import pickletools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cifar_lib.errors import InputError

MAX_BYTES = 1 << 26  # 20,000 images; with what decoding needs, far under 1 GB
MAX_INSTRUCTIONS = 2_000_000  # a few for each id
MAX_DIMENSIONS = 4
STATE_OF_ARRAY, STATE_OF_DTYPE = 5, 3  # fewest fields


@dataclass(frozen=True)
class _Name:
    """A function or class that the file names."""

    what: str


@dataclass
class _Unfilled:
    """An array before the instruction that fills it."""

    array: np.ndarray | None = None


@dataclass
class _DType:
    """An array's type before the instruction that gives its byte order."""

    code: str
    order: str = "="


_MARK = object()
_NAMES = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}
for _core in ("numpy.core", "numpy._core"):
    _NAMES |= {
        (f"{_core}.multiarray", "_reconstruct"): "_reconstruct",
        (f"{_core}.multiarray", "scalar"): "scalar",
    }
    _NAMES |= {(f"{_core}.numeric", "_frombuffer"): "_frombuffer"}


def read(content: bytes) -> Any:
    """The dicts, lists, tuples, numbers, strings, bytes and numpy arrays of a pickle of any
    protocol, 0 to 5.

    Python 2's strings come as str (latin1). Raises InputError where the file is broken, too long,
    or holds anything else; the message is one line.
    """
    if len(content) > MAX_BYTES:
        raise InputError(f"it has {len(content):,} bytes, over {MAX_BYTES:,}")
    machine = _Machine()
    try:
        for count, (name, argument) in enumerate(_instructions(content)):
            if count == MAX_INSTRUCTIONS:
                raise InputError(f"it has over {MAX_INSTRUCTIONS:,} instructions")
            machine.follow(name, argument)
        return _finished(machine.stack.pop())
    except InputError:
        raise
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise InputError(
            f"it can't be read as a pickle ({type(error).__name__}: {_clean(str(error))})"
        ) from error


def _instructions(content: bytes) -> Iterator[tuple[str, Any]]:
    """Each instruction's name and argument, as pickletools reads them; but Python 2's strings may
    be any bytes."""
    table = {instruction.code: instruction for instruction in pickletools.opcodes}
    file = io.BytesIO(content)
    name = ""
    while name != "STOP":
        code = file.read(1).decode("latin1")
        if code not in table:
            raise ValueError(f"no instruction {code!r}" if code else "it ends early")
        name, argument = table[code].name, table[code].arg
        if name == "STRING":
            line = file.readline()
            if len(line) < 3 or line[:1] not in b"'\"" or line[-2:] != line[:1] + b"\n":
                raise ValueError("a string without quotes")
            yield name, codecs.escape_decode(line[1:-2])[0].decode("latin1")
        else:
            yield name, argument.reader(file) if argument else None


class _Machine:
    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.encoded = 0  # bytes made from text so far

    def follow(self, name: str, argument: Any) -> None:
        """One instruction of pickletools' list."""
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]() if callable(_CONSTANTS[name]) else _CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("TUPLE", "LIST", "DICT"):
            items = self._to_mark()
            stack.append({"TUPLE": tuple, "LIST": _finished_list, "DICT": _pairs}[name](items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            if len(stack) < n:
                raise ValueError("the stack is empty")
            stack[-n:] = [tuple(stack[-n:])]
        elif name in ("APPEND", "APPENDS"):
            items = self._to_mark() if name == "APPENDS" else [stack.pop()]
            _expect(stack[-1], list).extend(_finished_list(items))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._to_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _expect(stack[-1], dict).update(_pairs(items))
        elif name in ("GLOBAL", "INST"):
            stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(_expect(module, str), _expect(attribute, str)))
        elif name == "REDUCE":
            arguments, function = _expect(stack.pop(), tuple), _expect(stack.pop(), _Name)
            stack.append(self._call(function.what, arguments))
        elif name == "BUILD":
            state = _expect(stack.pop(), tuple)
            self._fill(stack[-1], state)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._to_mark()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise InputError(
                f"it uses the instruction {name}, which a dict of arrays doesn't need; nothing was run"
            )

    def _to_mark(self) -> list[Any]:
        for position in range(len(self.stack) - 1, -1, -1):
            if self.stack[position] is _MARK:
                items = self.stack[position + 1 :]
                del self.stack[position:]
                return items
        raise ValueError("no mark on the stack")

    def _call(self, function: str, arguments: tuple) -> Any:
        """What the function would have returned, for the arguments that numpy and pickle write."""
        if function == "encode":
            text, encoding = arguments
            if encoding not in ("latin1", "latin-1"):
                raise ValueError("bytes in an unknown encoding")
            return self._encoded(_expect(text, str))
        if function == "dtype":
            code = (
                arguments[0].decode("ascii")
                if isinstance(arguments[0], bytes)
                else _expect(arguments[0], str)
            )
            return _DType(code.lstrip("<>|="))
        if function == "_reconstruct":
            kind, shape, code = arguments
            if kind != _Name("ndarray") or shape != (0,) or code not in (b"b", "b"):
                raise ValueError("an array that numpy didn't write")
            return _Unfilled()
        if function == "scalar":
            kind, content = arguments
            return self._array((), kind, content, "C")[()]
        if function == "_frombuffer":
            content, kind, shape, order = arguments
            return self._array(shape, kind, content, order)
        raise ValueError("a class where a function was expected")

    def _fill(self, target: Any, state: tuple) -> None:
        """BUILD: the state of an array or of its type."""
        if isinstance(target, _Unfilled) and len(state) >= STATE_OF_ARRAY and target.array is None:
            _, shape, kind, fortran, content = state
            target.array = self._array(shape, kind, content, "F" if fortran else "C")
        elif isinstance(target, _DType) and len(state) >= STATE_OF_DTYPE:
            order, *structure = state[1], *state[2:5]
            order = order.decode("ascii") if isinstance(order, bytes) else order
            if order not in ("<", ">", "|", "=") or any(part is not None for part in structure):
                raise ValueError("an array type with fields")
            target.order = order
        else:
            raise InputError(
                f"it wants to change {type(target).__name__.strip('_')}; nothing was run"
            )

    def _array(self, shape: Any, kind: Any, content: Any, order: str) -> np.ndarray:
        """A new array of numbers, truth values or strings; its bytes must be as many as its shape
        says."""
        _expect(kind, _DType)
        if not re.fullmatch("[biufSU][0-9]{1,3}", kind.code):
            raise InputError(
                f"it holds an array of type {_clean(kind.code)[:20]!r}, which is none of numbers or names"
            )
        dtype = np.dtype(kind.code).newbyteorder(kind.order)
        if (
            not isinstance(shape, tuple)
            or not all(type(n) is int and n >= 0 for n in shape)
            or order not in ("C", "F")
        ):
            raise ValueError("an array of no shape")
        raw = self._encoded(content) if isinstance(content, str) else content
        if not isinstance(raw, (bytes, bytearray)):
            raise ValueError("an array without bytes")
        expected = dtype.itemsize
        for n in shape:
            expected *= n
        if len(raw) != expected or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"an array of another shape than its {len(raw):,} bytes")
        return np.frombuffer(raw, dtype).reshape(shape, order=order)

    def _encoded(self, text: str) -> bytes:
        """As often as a file may ask for it, no more bytes in all than a file may have."""
        self.encoded += len(text)
        if self.encoded > MAX_BYTES:
            raise InputError(f"it asks for over {MAX_BYTES:,} bytes to be made")
        return text.encode("latin1")


_CONSTANTS: dict[str, Any] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
    "MARK": _MARK,
}
_CONSTANTS |= {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_VALUES |= {
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
}
_VALUES |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(
            f"a {kind.__name__.strip('_')} was expected where {type(value).__name__.strip('_')} is"
        )
    return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """Keys are names: a tuple inside tuples takes for ever to hash, and different numbers can have
    equal hashes."""
    keys = items[::2]
    if len(items) % 2 or not all(isinstance(key, (str, bytes)) for key in keys):
        raise ValueError("a dict with keys that are no names")
    return dict(zip(keys, map(_finished, items[1::2]), strict=True))


def _named(module: str, name: str) -> _Name:
    if (module, name) not in _NAMES:
        raise InputError(f"it wants to run {_clean(module)}.{_clean(name)}; nothing was run")
    return _Name(_NAMES[module, name])


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:100])


def _finished_list(items: list[Any]) -> list[Any]:
    return [_finished(item) for item in items]


def _finished(value: Any) -> Any:
    """The array itself, where the value is one."""
    if isinstance(value, _Unfilled):
        if value.array is None:
            raise ValueError("an array without content")
        return value.array
    if isinstance(value, (_Name, _DType)) or value is _MARK:
        raise ValueError("a value that is no data")
    return value
