"""Pickles from strangers: hostile and broken files, and every honest variant."""

import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cifar_lib import pickles
from cifar_lib.errors import InputError
from cifar_lib.kaggle import read_test_file
from cifar_lib.pickles import MAX_BYTES, MAX_INSTRUCTIONS, read

DATA = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 32, 32, 3)
HONEST = {
    protocol: pickle.dumps({b"data": DATA, b"ids": [0, 1]}, protocol) for protocol in range(6)
}
# Anybody's code; what lies beside or inside of the names that are allowed; numpy's own loaders
GADGETS = (
    "os system|builtins eval|importlib import_module|functools partial|numpy load|_codecs decode|"
    "numpy dtype.__base__|numpy core.multiarray.scalar|numpy.f2py.diagnose run|numpy  dtype"
)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def dtype(code: str, order: str = "<") -> bytes:
    state = b"(K\x03" + text(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return b"cnumpy\ndtype\n" + text(code) + b"\x89\x88\x87R" + state


ARRAY = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
SCALAR = b"cnumpy._core.multiarray\nscalar\n"
ENCODE = b"c_codecs\nencode\n"
NAME = b"cnumpy\ndtype\n"
EQUAL = 2**61 - 1  # whole numbers that differ by it have the same hash


def filled(shape: bytes, kind: bytes, content: bytes = raw(b"a")) -> bytes:
    """A dict whose data are an array of that shape, type and content."""
    return (
        b"\x80\x04}" + text("data") + ARRAY + b"(K\x01" + shape + kind + b"\x89" + content + b"tbs."
    )


def beside(content: bytes) -> bytes:
    """An empty dict, given back once all of that has been followed."""
    return b"\x80\x04}" + content + b"0."


def again(function: bytes, arguments: bytes, times: int = 10**5) -> bytes:
    """What the function makes of the same arguments, as often as that."""
    call = b"h\x00h\x01R" * times
    return beside(function + b"\x94" + arguments + b"\x940](" + call + b"e")


def long(size: int) -> bytes:
    return b"\x8b" + struct.pack("<i", size) + b"\x7f" * size


def doubled(n: int = 60) -> bytes:
    """Memo n: a tuple of a tuple of ... twice each, small to write, 2^n to walk."""
    pairs = (b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(n))
    return b"\x80\x04)\x94" + b"".join(pairs) + b"0"


def gadgets() -> dict[str, bytes]:
    cases = {}
    for line in GADGETS.split("|"):
        module, _, name = line.partition(" ")
        call = text("touch owned") + b"\x85R"
        cases[f"GLOBAL {line}"] = beside(b"c" + f"{module}\n{name}\n".encode() + call)
        cases[f"STACK_GLOBAL {line}"] = beside(text(module) + text(name) + b"\x93" + call)
    return cases


# What `read` may take for data, and the competition's reader refuses
ODD = {
    "a name as data": b"}" + text("data") + NAME + b"s" + text("ids") + b"]s.",
    "an array never filled": b"}" + text("data") + ARRAY + b"s" + text("ids") + b"]s.",
    "small arrays as ids": pickle.dumps({"data": DATA, "ids": np.full(10**6, b"a")}),
    "ids that are a bomb": doubled() + b"}" + text("ids") + b"h\x3cs" + text("data") + b"h\x3cs.",
    "a dict of itself": b"\x80\x04}\x94" + text("data") + b"h\x00s.",
    "nested tuples": b"}" + text("ids") + b")" + b"\x85" * 10**5 + b"s" + text("data") + b"Ns.",
    "long as an id": b"}" + text("data") + b"Ns" + text("ids") + b"]" + long(10**6) + b"as.",
}
CORPUS = ODD | {
    **gadgets(),
    # instructions that make objects, or ask for something outside the file
    "INST": beside(b"(S'u1'\nI0\nI1\ninumpy\ndtype\n"),
    "OBJ": beside(b"(" + NAME + text("u1") + b"\x89\x88o"),
    "NEWOBJ": beside(NAME + b")\x81"),
    "NEWOBJ_EX": beside(NAME + b")}\x92"),
    "PERSID": beside(b"Pfile\n"),
    "EXT1": beside(b"\x82\x01"),
    "FROZENSET": beside(b"(K\x01\x91"),
    "DUP": b"\x80\x02}2.",
    # changing what has a name, calling it otherwise than numpy does
    "BUILD on a function": beside(ENCODE + b"N}" + text("owned") + b")s\x86b"),
    "BUILD on a class": beside(NAME + b"N}" + text("owned") + b")s\x86b"),
    "REDUCE of text": beside(text("os.system") + b")R"),
    "REDUCE with a list": beside(ENCODE + b"(" + text("a") + text("latin1") + b"lR"),
    "encode by another codec": beside(ENCODE + text("a") + text("zlib") + b"\x86R"),
    # arrays of objects, of records, of sizes that their bytes don't have
    "object array": pickle.dumps({"data": np.array([print, None])}),
    "records": filled(b"K\x01\x85", dtype("i4,i4"), raw(bytes(8))),
    "empty element": filled(b"J\xff\xff\xff\x7f\x85", dtype("S0"), raw(b"")),
    "characters that don't exist": filled(b"K\x01\x85", dtype("U1"), raw(b"\xff" * 4)),
    "array from nothing": filled(b"J\xff\xff\xff\x7f\x85", dtype("u1"), b"N"),
    "shape too small": filled(b"K\x01\x85", dtype("u1"), raw(b"ab")),
    "shape too large": filled(b"J\xff\xff\xff\x7f\x85", dtype("u1")),
    "shape of long numbers": filled(b"(" + long(1000) * 40 + b"t", dtype("u1")),
    "shape of too many": filled(b"(" + b"K\x01" * 10**5 + b"t", dtype("u1")),
    "shape of bombs": doubled() + filled(b"h\x3ch\x3c\x86", dtype("u1")),
    # small files, or small work, that would become large
    "a long dtype name again": again(NAME, text("<" * 10**6) + b"\x89\x88\x87"),
    "long scalars again": again(SCALAR, dtype("U999") + raw(b"a\0\0\0" * 999) + b"\x86"),
    "bytes again": again(ENCODE, text("x" * 10**5) + text("latin1") + b"\x86"),
    "memo of four billion": beside(b"Nr\xff\xff\xff\xff"),
    "memo of equal hashes": beside(b"N" + b"".join(b"p%d\n" % (n * EQUAL) for n in range(9))),
    "keys of equal hash": pickle.dumps({n * EQUAL: None for n in range(9)}),
    "a dict's items on the stack": beside(b"(K\x01Nd"),
    "a key that is a bomb": doubled() + beside(b"}h\x3cNs"),
    "long keys": pickle.dumps({"x" * 10**6: None}),
    "INT of a million digits": beside(b"I" + b"9" * 10**6 + b"\n"),
    "PUT of a million digits": beside(b"Np" + b"9" * 10**6 + b"\n"),
    "lone surrogates": beside(text("") + b"X\x03\x00\x00\x00\xed\xa0\x800"),
    "endless instructions": beside(b"](10" * (MAX_INSTRUCTIONS // 4) + b"N"),
    "too long": beside(raw(bytes(MAX_BYTES))),
    **{
        f"{name} of {size:#x}": b"\x80\x05" + code + struct.pack(form, size) + b"abc."
        for name, code, form, size in [
            ("BINBYTES8", b"\x8e", "<Q", 2**62),
            ("BYTEARRAY8", b"\x96", "<Q", 2**33),
            ("BINUNICODE", b"X", "<I", 2**32 - 1),
            ("LONG4", b"\x8b", "<i", 2**31 - 1),
            ("FRAME", b"\x95", "<Q", 2**62),
        ]
    },
    # no pickles, and broken ones
    "nothing": b"",
    "noise": random.Random(0).randbytes(5000),
    "stack runs out": b"\x80\x02\x87.",
    "key without value": b"\x80\x02}(K\x01u.",
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_dict_of_images_and_ids_is_refused_in_one_line(name, tmp_path):
    path = tmp_path / "test.pkl"
    path.write_bytes(ODD[name])
    with pytest.raises(InputError) as caught:
        read_test_file(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400 + len(str(path))


class Made:
    """Pickled as a call of `function`, and what its result is built with."""

    def __init__(self, function, arguments, *state):
        self.parts = function, arguments, *state

    def __reduce__(self):
        return self.parts


def test_bytes_are_never_taken_for_the_addresses_of_objects():
    """numpy would follow them, and crash or worse."""
    objects, empty = np.dtype("O"), (np.ndarray, (0,), b"b")
    reconstruct, _, _ = np.array(["a"], dtype=object).__reduce__()
    buffer, _ = np.arange(2).__reduce_ex__(5)
    scalar, _ = np.int64(1).__reduce__()
    addresses = bytes(range(16))
    for made in (
        Made(reconstruct, empty, (1, (2,), objects, False, addresses)),
        Made(reconstruct, empty, (1, (3,), objects, False, [1, 2])),
        Made(reconstruct, empty, (1, (1, 2), objects, False, [1, 2])),
        Made(buffer, (addresses, objects, (2,), "C")),
        Made(scalar, (objects, addresses[:8])),
    ):
        with pytest.raises(InputError, match="that isn't a plain list of them"):
            read(pickle.dumps({"data": DATA, "ids": made}, 4))


def test_a_name_is_refused_where_it_is_named():
    for name, content in gadgets().items():
        with pytest.raises(InputError) as caught:
            read(content)
        wanted = name.partition(" ")[2].replace(" ", ".", 1)
        assert str(caught.value) == f"it wants to run {wanted}; nothing was run"


ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parent.parent), "OPENBLAS_NUM_THREADS": "1"}
BOUNDED = """
import pickle, resource, sys, time
from cifar_lib import pickles
import encodings.latin_1, encodings.ascii, encodings.raw_unicode_escape, encodings.utf_32_le
corpus = pickle.load(open("corpus.pkl", "rb"))
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
heard = []
watched = ("open", "import", "exec", "compile", "os.", "subprocess.", "socket.", "pickle")
sys.addaudithook(lambda event, _: heard.append(event) if event.startswith(watched) else None)
for name, content in corpus.items():
    start, message = time.process_time(), "read"
    try:
        pickles.read(content)
    except pickles.InputError as error:
        message = str(error)
    print(f"{time.process_time() - start:.2f} {message}")
print(heard)
"""


def test_every_hostile_file_is_refused_in_a_gigabyte_and_ten_seconds_and_runs_nothing(tmp_path):
    # The kernel holds a process of its own to the limit; an audit hook hears what it opens or runs.
    (tmp_path / "corpus.pkl").write_bytes(pickle.dumps(CORPUS))
    command = [sys.executable, "-c", BOUNDED]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, encoding="utf-8"
    )
    *lines, heard = done.stdout.splitlines()
    assert heard == "[]", done.stderr
    for name, line in zip(CORPUS, lines, strict=True):
        seconds, _, message = line.partition(" ")
        assert float(seconds) < 10 and message.isprintable() and len(message) < 400, (name, line)
        assert (message != "read" or name in ODD) and "MemoryError" not in message, (name, line)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.pkl"]


@pytest.mark.parametrize("protocol", HONEST)
@pytest.mark.parametrize(
    "value",
    [
        {"data": DATA, "more": [None, True, 1.5, -3, 2**40, "é", b"\x00\xff", (), {"a": {1: []}}]},
        {
            b"data": np.asfortranarray(DATA),
            "transposed": DATA.transpose(0, 3, 1, 2),
            "b": DATA[::2],
        },
        {"data": DATA, "same": DATA, "ids": np.array([5, 6], ">i4")},
        {"ids": np.array(["a", "bé😀"]), "b": np.array(["a"], ">U3"), "c": np.array([b"a"])},
        {"ids": [np.int64(3), np.str_("x"), np.float32(0.5), np.bool_(True)], "b": np.array(7)},
    ],
)
def test_honest_content_comes_back_as_pickle_would_read_it(protocol, value):
    content = pickle.dumps(value, protocol)
    found = read(content)
    assert found.keys() == value.keys()
    for key, item in pickle.loads(content).items():
        np.testing.assert_equal(found[key], item)


@pytest.mark.parametrize("bound", ["MAX_BYTES", "MAX_INSTRUCTIONS"])
def test_what_is_too_long_is_refused(bound, monkeypatch):
    monkeypatch.setattr(pickles, bound, 9)
    with pytest.raises(InputError, match="^it has over 9 (bytes|instructions)$"):
        read(HONEST[4])


def mutated(content: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, lost or added, mostly near the ends: in the middle lie only pixels."""
    changed = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        head, tail = dice.randrange(400), len(changed) - dice.randrange(300)
        at = dice.choice([head, tail, dice.randrange(len(changed) + 1)])
        changed[at : at + dice.randint(0, 4)] = dice.randbytes(dice.randint(0, 8))
    return bytes(changed)


@pytest.mark.parametrize("protocol", HONEST)
def test_an_honest_file_cut_or_changed_anywhere_is_read_or_refused(protocol):
    content, dice = HONEST[protocol], random.Random(protocol)
    for end in range(0, len(content), 100):
        with pytest.raises(InputError):
            read(content[:end])
    for _ in range(100):
        try:
            assert isinstance(read(mutated(content, dice)), dict)
        except InputError as error:
            assert str(error).isprintable()
