"""Pickles from strangers: hostile and broken files, and every honest variant."""

import pickle
import random
import subprocess
import sys
from pathlib import Path
from struct import pack

import numpy as np
import pytest

from cifar_lib.errors import InputError
from cifar_lib.kaggle import read_test_file
from cifar_lib.pickles import MAX_BYTES, MAX_INSTRUCTIONS, read

DATA = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 32, 32, 3)

# Pieces of pickles, in the bytes of their instructions


def text(value: str) -> bytes:
    return b"X" + pack("<I", len(value)) + value.encode()


def raw(value: bytes) -> bytes:
    return b"B" + pack("<I", len(value)) + value


def long(size: int) -> bytes:
    return b"\x8b" + pack("<i", size) + b"\x7f" * size


def dtype(code: str) -> bytes:
    state = b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return NAME + text(code) + b"\x89\x88\x87R" + state


NAME = b"cnumpy\ndtype\n"
ARRAY = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
SCALAR = b"cnumpy._core.multiarray\nscalar\n"
ENCODE = b"c_codecs\nencode\n"
BUFFER = b"cnumpy._core.numeric\n_frombuffer\n("
HUGE = b"J\xff\xff\xff\x7f\x85"  # a shape of 2^31 - 1
EQUAL = 2**61 - 1  # whole numbers that differ by it have the same hash


def filled(shape: bytes, kind: str, content: bytes = raw(b"a")) -> bytes:
    """A dict whose data are an array of that shape, type and content."""
    state = b"(K\x01" + shape + dtype(kind) + b"\x89" + content + b"tb"
    return b"}" + text("data") + ARRAY + state + b"s."


def beside(content: bytes) -> bytes:
    """An empty dict, given back once all of that has been followed."""
    return b"\x80\x04}" + content + b"0."


def again(function: bytes, arguments: bytes) -> bytes:
    """What the function makes of the same arguments, 100,000 times."""
    return beside(function + b"\x94" + arguments + b"\x940](" + b"h\x00h\x01R" * 10**5 + b"e")


def sized(code: bytes, form: str, size: int) -> bytes:
    """An instruction that claims to be so long, and three bytes."""
    return b"\x80\x05" + code + pack(form, size) + b"abc."


# Memo 60: a tuple of a tuple of ..., twice each, small to write and 2^60 to walk
BOMB = b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60)) + b"0"

# Files, and words of what `read` says of them
NOT_FLAT, NO_NUMBERS = "that isn't a plain list of them", "only booleans, real numbers"
TWICE, KEYS, BROKEN = (
    "it uses one tuple several times",
    "expected names of at most",
    "it isn't a pickle of",
)
# Data in the eyes of `read`, perhaps, but no images and ids
ODD = [
    ("a name as data", b"}" + text("data") + NAME + b"s" + text("ids") + b"]s.", "read"),
    ("an array not filled", b"}" + text("data") + ARRAY + b"s" + text("ids") + b"]s.", "read"),
    ("small arrays as ids", pickle.dumps({"data": DATA, "ids": np.full(10**6, b"a")}), "read"),
    ("bombs", BOMB + b"}" + text("ids") + b"h\x3cs" + text("data") + b"h\x3cs.", TWICE),
    ("a dict of itself", b"}\x94" + text("data") + b"h\x00s.", "several times"),
    ("tuples", b"}(" + text("data") + b"N" + text("ids") + b")" + b"\x85" * 10**5 + b"u.", "read"),
    ("a long", b"}(" + text("data") + b"N" + text("ids") + b"]" + long(10**6) + b"au.", "read"),
]
HOSTILE = [
    # Changing what has a name, calling it in a way that numpy doesn't
    ("BUILD, function", beside(ENCODE + b"N}" + text("owned") + b")s\x86b"), "(AttributeError)"),
    ("BUILD, class", beside(NAME + b"N}" + text("owned") + b")s\x86b"), "(TypeError)"),
    ("REDUCE, text", beside(text("os.system") + b")R"), "(TypeError)"),
    ("REDUCE, list", beside(ENCODE + b"(" + text("a") + text("latin1") + b"lR"), "it calls a"),
    ("another codec", beside(ENCODE + text("a") + text("zlib") + b"\x86R"), "it encodes text"),
    # Arrays of records, of sizes that their bytes don't have, of characters that don't exist
    ("records", filled(b"K\x01\x85", "i4,i4", raw(bytes(8))), NO_NUMBERS),
    ("empty element", filled(HUGE, "S0", raw(b"")), NO_NUMBERS),
    ("long element", filled(b"K\x01\x85", "S1000", raw(bytes(1000))), NO_NUMBERS),
    ("characters", filled(b"K\x01\x85", "U1", raw(b"\xff" * 4)), "(UnicodeDecodeError)"),
    ("array from nothing", filled(HUGE, "u1", b"N"), BROKEN),
    ("shape too small", filled(b"K\x01\x85", "u1", raw(b"ab")), "shape doesn't fit its 2 bytes"),
    ("shape too large", filled(HUGE, "u1"), BROKEN),
    ("shape of long numbers", filled(b"(" + long(1000) * 40 + b"t", "u1"), BROKEN),
    ("shape of too many", filled(b"(" + b"K\x01" * 10**5 + b"t", "u1"), BROKEN),
    ("shape of bombs", BOMB + filled(b"h\x3ch\x3c\x86", "u1"), TWICE),
    # Bytes as the addresses of objects: numpy would follow them, and crash or worse
    ("objects", filled(b"K\x02\x85", "O8", raw(bytes(16))), NOT_FLAT),
    ("objects, more", filled(b"K\x03\x85", "O8", b"](K\x01K\x02e"), NOT_FLAT),
    ("objects, table", filled(b"K\x01K\x02\x86", "O8", b"](K\x01K\x02e"), NOT_FLAT),
    ("objects, buffer", beside(BUFFER + raw(bytes(16)) + dtype("O8") + b"K\x02\x85NtR"), NOT_FLAT),
    ("objects, scalar", beside(SCALAR + dtype("O8") + raw(bytes(8)) + b"\x86R"), NOT_FLAT),
    ("objects, function", pickle.dumps({"data": np.array([print])}), "builtins.print; nothing"),
    # Small files, or small work, that would become large
    ("dtype name", again(NAME, text("<" * 10**6) + b"\x89\x88\x87"), TWICE),
    ("long scalars", again(SCALAR, dtype("U999") + raw(b"a\0\0\0" * 999) + b"\x86"), TWICE),
    ("bytes", again(ENCODE, text("x" * 10**5) + text("latin1") + b"\x86"), TWICE),
    ("text", beside(text("x" * 201) + b"\x94h\x00"), "it uses one str several times"),
    ("list", beside(b"]\x94h\x00"), "it uses one list several times"),
    ("memo of four billion", beside(b"Nr\xff\xff\xff\xff"), KEYS),
    ("memo, equal hashes", beside(b"N" + b"".join(b"p%d\n" % (n * EQUAL) for n in (1, 2))), KEYS),
    ("keys of equal hash", pickle.dumps({n * EQUAL: None for n in range(9)}), KEYS),
    ("items of DICT", beside(b"(K\x01Nd"), "it fills a dict in a way"),
    ("a bomb as a key", BOMB + beside(b"}h\x3cNs"), TWICE),
    ("tuples as a key", beside(b"})" + b"\x85" * 10**5 + b"Ns"), KEYS),
    ("long keys", pickle.dumps({"x" * 10**6: None}), KEYS),
    ("INT of a million digits", beside(b"I" + b"9" * 10**6 + b"\n"), BROKEN),
    ("PUT of a million digits", beside(b"Np" + b"9" * 10**6 + b"\n"), BROKEN),
    ("lone surrogates", beside(b"X\x03\0\0\0\xed\xa0\x80"), "(UnicodeDecodeError)"),
    ("no end", beside(b"](10" * (MAX_INSTRUCTIONS // 4)), "it has over 1,000,000 instructions"),
    ("too long", beside(raw(bytes(MAX_BYTES))), "it has over 67,108,864 bytes"),
    ("BINBYTES8 of 2^62", sized(b"\x8e", "<Q", 2**62), BROKEN),
    ("BYTEARRAY8 of 8 GB", sized(b"\x96", "<Q", 2**33), BROKEN),
    ("BINUNICODE of 4 GB", sized(b"X", "<I", 2**32 - 1), BROKEN),
    ("LONG4 of 2 GB", sized(b"\x8b", "<i", 2**31 - 1), BROKEN),
    ("FRAME of 2^62", sized(b"\x95", "<Q", 2**62), BROKEN),
    # No pickles, and broken ones
    ("nothing", b"", BROKEN),
    ("noise", random.Random(0).randbytes(5000), BROKEN),
    ("stack runs out", b"\x80\x02\x87.", BROKEN),
    ("key without value", b"\x80\x02}(K\x01u.", BROKEN),
    ("no dict", pickle.dumps([1]), "expected a dict, got list"),
]
# Instructions that make objects, or ask for something outside the file
FORBIDDEN = "INST OBJ NEWOBJ NEWOBJ_EX PERSID BINPERSID EXT1 EXT2 EXT4 DUP EMPTY_SET ADDITEMS "
for name in (FORBIDDEN + "FROZENSET NEXT_BUFFER READONLY_BUFFER").split():
    code = getattr(pickle, name)
    HOSTILE.append((name, beside(b"(" + NAME + text("u1") + code), f"instruction {code!r}"))
# Anybody's code; what lies beside or inside of the names that are allowed; numpy's own loaders
GADGETS = """os system|builtins eval|importlib import_module|functools partial|_codecs decode|
numpy  dtype|numpy dtype.__base__|numpy core.multiarray.scalar|numpy load|numpy.f2py.diagnose run"""
for gadget in GADGETS.replace("\n", "").split("|"):
    module, _, name = gadget.partition(" ")
    by_line, by_stack = f"c{module}\n{name}\n".encode(), text(module) + text(name) + b"\x93"
    for way, found in ("GLOBAL", by_line), ("STACK_GLOBAL", by_stack):
        words = f"it wants to run {module}.{name}; nothing was run"
        HOSTILE.append((f"{way} {gadget}", beside(found + text("owned") + b"\x85R"), words))
CORPUS = {name: content for name, content, _ in ODD + HOSTILE}

BOUNDED = """
import pickle, resource, sys, time
from cifar_lib import pickles
import encodings.latin_1, encodings.ascii, encodings.raw_unicode_escape, encodings.utf_32_le
corpus = pickle.load(open("corpus.pkl", "rb"))
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
heard = []
watched = ("open", "import", "exec", "compile", "os.", "subprocess.", "socket.", "pickle")
sys.addaudithook(lambda event, _: heard.append(event) if event.startswith(watched) else None)
for content in corpus.values():
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
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "OPENBLAS_NUM_THREADS": "1"}
    command, options = [sys.executable, "-c", BOUNDED], {"cwd": tmp_path, "encoding": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, **options)
    *lines, heard = done.stdout.splitlines() or [""]
    assert heard == "[]", done.stderr
    for (name, _, words), line in zip(ODD + HOSTILE, lines, strict=True):
        seconds, _, message = line.partition(" ")
        assert words in message and "MemoryError" not in message, (name, line)
        assert float(seconds) < 10 and message.isprintable() and len(message) < 400, (name, line)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.pkl"]


@pytest.mark.parametrize("content", [pytest.param(row[1], id=row[0]) for row in ODD])
def test_what_is_no_dict_of_images_and_ids_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "test.pkl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_test_file(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400 + len(str(path))


# What pickle writes, in every protocol
VALUES = [
    {"data": DATA, "more": [None, True, 1.5, -3, 2**40, "é", b"\x00\xff", (), {"a": {1: []}}]},
    {b"data": np.asfortranarray(DATA), "moved": DATA.transpose(0, 3, 1, 2), "part": DATA[::2]},
    {"data": DATA, "same": DATA, "ids": np.array([5, 6], ">i4")},
    {"ids": np.array(["a", "bé😀"]), "b": np.array(["a"], ">U3"), "c": np.array([b"a"])},
    {"ids": [np.int64(3), np.str_("x"), np.float32(0.5), np.bool_(True)], "b": np.array(7)},
    {"objects": np.array(["a", 1], dtype=object), "x" * 200: range(3), 10**6 - 1: ["y" * 200] * 2},
]
WRITTEN = [(pickle.dumps(value, protocol), value) for protocol in range(6) for value in VALUES]

# As Python 2 with numpy 1 wrote an array: byte strings for keys and pixels, numpy.core instead of
# numpy._core. Protocol 0 is text, with all bytes that aren't printable escaped inside of quotes.
PYTHON_2 = [
    b"(dp0\nS'data'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\n"
    b"tp4\nS'b'\np5\ntp6\nRp7\n(I1\n(I2\nI32\nI32\nI3\ntp8\ncnumpy\ndtype\np9\n(S'u1'\np10\nI0\n"
    b"I1\ntp11\nRp12\n(I3\nS'|'\np13\nNNNI-1\nI-1\nI0\ntp14\nbI00\nS"
    + repr(DATA.tobytes())[1:].encode()
    + b"\np15\ntp16\nbsS'ids'\np17\n(lp18\nL5L\naI6\nas.",
    b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
    b"\x87R(K\x01(K\x02K\x20K\x20K\x03tcnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff"
    b"\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
    + pack("<I", DATA.nbytes)
    + DATA.tobytes()
    + b"tbU\x03ids](K\x05K\x06eu.",
]
WRITTEN += [(content, {"data": DATA, "ids": [5, 6]}) for content in PYTHON_2]
# A text whose length has eight bytes, as pickle writes only one of over 4 GB.
WRITTEN.append((b"}\x8d" + pack("<Q", 4) + b"dataNs.", {"data": None}))


@pytest.mark.parametrize(("content", "value"), WRITTEN)
def test_honest_content_comes_back_as_pickle_would_read_it(content, value):
    found = read(content)
    assert found.keys() == value.keys()
    for key, item in value.items():
        expected = item.tolist() if key == "objects" else item
        np.testing.assert_equal(found[key], expected)
        assert getattr(found[key], "dtype", None) == getattr(expected, "dtype", None)


def mutated(content: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, lost or added, mostly near the ends: in the middle lie only pixels."""
    changed = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        head, tail = dice.randrange(400), max(len(changed) - dice.randrange(300), 0)
        at = dice.choice([head, tail, dice.randrange(len(changed) + 1)])
        changed[at : at + dice.randint(0, 4)] = dice.randbytes(dice.randint(0, 8))
    return bytes(changed)


@pytest.mark.parametrize("protocol", range(6))
def test_an_honest_file_cut_or_changed_anywhere_is_read_or_refused(protocol):
    content = pickle.dumps({b"data": DATA, b"ids": [0, 1]}, protocol)
    for end in range(0, len(content), 100):
        with pytest.raises(InputError):
            read(content[:end])
    dice = random.Random(protocol)
    for _ in range(100):
        try:
            assert isinstance(read(mutated(content, dice)), dict)
        except InputError as error:
            assert str(error).isprintable()
