"""Pickles from strangers: a corpus of hostile and broken files, a fuzzer, and every honest
variant."""

import pickle
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifar_lib.errors import InputError
from cifar_lib.kaggle import read_test_file
from cifar_lib.pickles import MAX_BYTES, MAX_INSTRUCTIONS, read

DATA = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 32, 32, 3)
HONEST = {
    protocol: pickle.dumps({b"data": DATA, b"ids": [0, 1]}, protocol) for protocol in range(6)
}

# What has been used to run code, under prefixes that blocklists and allowlists let through among
# them
GADGETS = """
os system|posix system|nt system|os popen|os execv|os.path os|subprocess Popen|subprocess check_output|subprocess run
builtins eval|builtins exec|builtins getattr|builtins open|builtins __import__|builtins compile|builtins bytes
__builtin__ eval|__builtin__ apply|importlib import_module|runpy run_path|runpy _run_code|code InteractiveInterpreter
pty spawn|shutil rmtree|ctypes CDLL|operator attrgetter|operator methodcaller|functools partial|webbrowser open
socket create_connection|pickle loads|_pickle loads|marshal loads|types CodeType|types FunctionType|timeit timeit
pdb run|cProfile run|bdb Bdb|asyncio run|pip main|pydoc pipepager|copyreg _reconstructor|torch load|torch hub.load
torch.storage _load_from_bytes|torch.serialization load|numpy load|numpy fromfile|numpy memmap|numpy.lib.npyio load
numpy.f2py.crackfortran getlincoef|numpy.f2py.crackfortran myeval|numpy.f2py.diagnose run|numpy.f2py compile
numpy.testing._private.utils runstring|numpy.distutils.exec_command exec_command|numpy.core.multiarray fromfile
numpy._core.multiarray frombuffer|numpy.core.multiarray _reconstruct.__globals__|numpy ndarray.__class__
numpy dtype.__base__|numpy core.multiarray._reconstruct|numpy._core.numeric _frombuffer.__globals__
numpy  dtype|numpy dtype.|_codecs lookup|_codecs encode.__self__|codecs encode|_codecs decode
""".replace("\n", "|").strip("|")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def short_bytes(value: bytes) -> bytes:
    return b"C" + bytes([len(value)]) + value


def gadgets() -> dict[str, bytes]:
    cases = {}
    for line in GADGETS.split("|"):
        module, _, name = line.partition(" ")
        call = text("touch owned") + b"\x85R."
        cases[f"GLOBAL {line}"] = b"\x80\x02c" + f"{module}\n{name}\n".encode() + call
        cases[f"STACK_GLOBAL {line}"] = b"\x80\x04" + text(module) + text(name) + b"\x93" + call
    return cases


ARRAY = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
ENCODE = b"c_codecs\nencode\n"


def dtype(
    code: str, state: bytes = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
) -> bytes:
    return b"cnumpy\ndtype\n" + text(code) + b"\x89\x88\x87R" + state


def filled(shape: bytes, kind: bytes, content: bytes) -> bytes:
    """A dict whose data are an array of that shape, type and content."""
    return (
        b"\x80\x04}" + text("data") + ARRAY + b"(K\x01" + shape + kind + b"\x89" + content + b"tbs."
    )


def doubled(n: int) -> bytes:
    """A tuple of a tuple of ... twice each: small to write, 2^n to walk."""
    return b")\x94" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(n)
    )


CORPUS = {
    **gadgets(),
    # instructions that make objects, or ask for something outside the file
    "INST": b"(S'touch owned'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch owned'\no.",
    "NEWOBJ": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "NEWOBJ_EX": b"\x80\x04cnumpy\nndarray\n)}\x92.",
    "PERSID": b"Pfile\n.",
    "BINPERSID": b"\x80\x02K\x01Q.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "READONLY_BUFFER": b"\x80\x05\x97\x98.",
    "FROZENSET": b"\x80\x04(K\x01\x91.",
    "ADDITEMS": b"\x80\x04\x8f(K\x01\x90.",
    "DUP": b"\x80\x02]2a.",
    # changing what has a name, calling it otherwise than numpy does
    "BUILD on a function": b"\x80\x02cnumpy\ndtype\nN}X\x0c\x00\x00\x00__defaults__N\x86s\x86b.",
    "BUILD on a dict": b"\x80\x02}(K\x01tb.",
    "REDUCE of a class": b"\x80\x02cnumpy\nndarray\nK\x05\x85R.",
    "REDUCE of text": b"\x80\x02" + text("os.system") + b")R.",
    "_reconstruct of another class": ARRAY.replace(b"ndarray", b"dtype") + b".",
    "_reconstruct of another shape": ARRAY.replace(b"K\x00\x85", b"J\xff\xff\xff\x7f\x85") + b".",
    "encode by another codec": b"\x80\x02" + ENCODE + text("a") + text("zlib") + b"\x86R.",
    "__setstate__ chain": b"\x80\x04"
    + ARRAY
    + b"(K\x01K\x00\x85"
    + dtype("u1")
    + b"\x89C\x00tb(K\x01)tb.",
    "array filled twice": b"\x80\x04"
    + ARRAY
    + (b"(K\x01K\x00\x85" + dtype("u1") + b"\x89C\x00tb") * 2
    + b".",
    "array never filled": b"\x80\x04" + ARRAY + b".",
    "only a name": b"\x80\x04cnumpy\nndarray\n.",
    "only a type": b"\x80\x04" + dtype("u1") + b".",
    "only a mark": b"(.",
    # arrays of objects, of records, of sizes that their bytes don't have
    "object array": pickle.dumps({"data": np.array([print, None]), "ids": []}),
    "object type": filled(b"K\x01\x85", dtype("O8"), b"]N\x61"),
    "records": filled(b"K\x01\x85", dtype("i4,i4"), short_bytes(bytes(8))),
    "void": filled(b"K\x01\x85", dtype("V8"), short_bytes(bytes(8))),
    "dates": filled(b"K\x01\x85", dtype("M8"), short_bytes(bytes(8))),
    "type with fields": filled(
        b"K\x01\x85", dtype("u1", b"(K\x03U\x01|N(U\x01at}U\x01aNstb"), short_bytes(b"a")
    ),
    "type inside a type": filled(
        b"K\x01\x85", dtype("u1", b"(K\x03U\x01|cnumpy\ndtype\nNNtb"), short_bytes(b"a")
    ),
    "giant element": filled(b"K\x01\x85", dtype("S999999999"), short_bytes(b"a")),
    "empty element": filled(b"J\xff\xff\xff\x7f\x85", dtype("S0"), short_bytes(b"")),
    "giant shape": filled(b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85", dtype("u1"), short_bytes(b"a")),
    "negative shape": filled(b"J\xff\xff\xff\xff\x85", dtype("u1"), short_bytes(b"a")),
    "shape of floats": filled(
        b"G?\xf0\x00\x00\x00\x00\x00\x00\x85", dtype("u1"), short_bytes(b"a")
    ),
    "shape that overflows": filled(
        b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7fJ\x04\x00\x00\x00\x87", dtype("u1"), short_bytes(b"a")
    ),
    "forty dimensions": filled(b"(" + b"K\x01" * 40 + b"t", dtype("u1"), short_bytes(b"a")),
    "scalar too short": b"\x80\x04cnumpy._core.multiarray\nscalar\n"
    + dtype("i8")
    + b"C\x01a\x86R.",
    # bombs
    "memo of four billion": b"\x80\x02Nr\xff\xff\xff\xff" + b"r\xfe\xff\xff\xff.",
    "memo that isn't": b"\x80\x02h\x07.",
    "endless key": b"\x80\x04}" + doubled(60) + b"Ns.",
    "endless ids": b"\x80\x04}"
    + text("ids")
    + doubled(60)
    + b"s"
    + text("data")
    + doubled(60)
    + b"s.",
    "list of itself": b"\x80\x04]\x94h\x00a.",
    "bytes made again and again": b"\x80\x02"
    + text("x" * 10**6)
    + b"\x94"
    + (ENCODE + b"h\x00" + text("latin1") + b"\x86R0") * 99
    + b".",
    "number of a million digits": b"I" + b"9" * 10**6 + b"\n.",
    "long of a million digits": b"L" + b"9" * 10**6 + b"L\n.",
    "long as an id": b"\x80\x04}"
    + text("ids")
    + b"]\x8b"
    + struct.pack("<I", 10**6)
    + b"\x01" * 10**6
    + b"as"
    + text("data")
    + b"Ns.",
    "keys of equal hash": pickle.dumps({n * (2**61 - 1): None for n in range(1, 9)}),
    # declared sizes
    **{
        f"{name} of {size:#x}": b"\x80\x05" + code + struct.pack(form, size) + b"abc."
        for name, code, form, size in [
            ("BINBYTES", b"B", "<I", 2**32 - 1),
            ("BINBYTES8", b"\x8e", "<Q", 2**62),
            ("BYTEARRAY8", b"\x96", "<Q", 2**62),
            ("BINUNICODE", b"X", "<I", 2**32 - 1),
            ("BINUNICODE8", b"\x8d", "<Q", 2**62),
            ("BINSTRING", b"T", "<i", 2**31 - 1),
            ("BINSTRING", b"T", "<i", -1),
            ("LONG4", b"\x8b", "<i", 2**31 - 1),
            ("LONG4", b"\x8b", "<i", -1),
            ("FRAME", b"\x95", "<Q", 2**62),
        ]
    },
    # endless instructions
    "endless None": b"\x80\x04" + b"N" * (MAX_INSTRUCTIONS + 9) + b".",
    "endless marks": b"\x80\x04" + b"(" * (MAX_INSTRUCTIONS + 9) + b".",
    "endless memo": b"\x80\x04N" + b"\x94" * (MAX_INSTRUCTIONS + 9) + b".",
    "too long": b"\x80\x04C" + bytes(MAX_BYTES),
    # no pickles, and broken ones
    "nothing": b"",
    "a stop": b".",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "a zip": b"PK\x03\x04" + bytes(50),
    "gzip": b"\x1f\x8b\x08" + bytes(50),
    "a page": b"<!DOCTYPE html><html>Not found</html>",
    "a table": b"ID,Labels\n0,3\n",
    "json": b'{"data": []}',
    "noise": bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)),
    "protocol 255": b"\x80\xff}.",
    "stack runs out": b"\x80\x02\x87.",
    "key without value": b"\x80\x02}(K\x01u.",
    "content after a cut": HONEST[4][:-1],
}


def refused(content: bytes) -> str:
    with pytest.raises(InputError) as caught:
        read(content)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400
    return message


@pytest.mark.parametrize("name", CORPUS)
def test_the_reader_refuses_what_is_no_dict_of_arrays(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "test.pkl"
    path.write_bytes(CORPUS[name])
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        read_test_file(path)
    assert str(caught.value).isprintable() and str(path) in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["test.pkl"]
    assert time.perf_counter() - start < 60


def test_a_name_is_refused_where_it_is_named():
    for name, content in gadgets().items():
        assert refused(content).startswith("it wants to run "), name
    assert refused(CORPUS["GLOBAL os system"]) == "it wants to run os.system; nothing was run"


def test_the_whole_corpus_needs_less_than_a_gigabyte_and_runs_nothing(tmp_path):
    # A process of its own, which the kernel holds to the limit; sys.addaudithook hears of
    # everything that is opened, imported, compiled or started.
    (tmp_path / "corpus.pkl").write_bytes(pickle.dumps(list(CORPUS.values())))
    script = """
import pickle, resource, sys
from cifar_lib.errors import InputError
from cifar_lib.pickles import read
import encodings.latin_1, encodings.ascii, encodings.raw_unicode_escape
corpus = pickle.load(open("corpus.pkl", "rb"))
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
heard = []
watched = ("open", "import", "exec", "compile", "os.", "subprocess.", "socket.", "ctypes.", "pickle.find_class")
sys.addaudithook(lambda event, arguments: heard.append(event) if event.startswith(watched) else None)
for content in corpus:
    try:
        read(content)
    except InputError as error:
        if "MemoryError" in str(error):
            heard.append(str(error))
print(sorted(set(heard)))
"""
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "[]\n", done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.pkl"]


@pytest.mark.parametrize("protocol", HONEST)
def test_an_honest_file_cut_off_at_every_tenth_byte_is_refused(protocol):
    content = HONEST[protocol]
    for end in range(0, len(content), 10):
        refused(content[:end])


@pytest.mark.parametrize("protocol", HONEST)
@pytest.mark.parametrize(
    "value",
    [
        {"data": DATA, "ids": [0, 1]},
        {
            b"data": np.asfortranarray(DATA),
            b"ids": (0, 1),
            b"more": [None, True, 1.5, -3, 2**40, "é", b"\x00\xff", {}],
        },
        {"data": DATA.reshape(2, -1), "ids": np.array([5, 6], dtype=">i4")},
        {"data": DATA, "ids": np.array(["a", "bé"])},
        {"data": DATA, "ids": [np.int64(3), np.str_("x")]},
        {"data": DATA[::2], "same": [DATA, DATA], "ids": np.array([b"a"])},
    ],
)
def test_honest_content_comes_back_as_pickle_would_read_it(protocol, value):
    content = pickle.dumps(value, protocol)
    expected, found = pickle.loads(content), read(content)
    assert expected.keys() == found.keys()
    for key, item in expected.items():
        np.testing.assert_equal(found[key], item)


@pytest.mark.parametrize("protocol", range(4))
def test_files_of_numpy_1_and_2_read_the_same(protocol):
    names = (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    two, one = names if names[0] in HONEST[protocol] else names[::-1]
    assert HONEST[protocol].count(two) == 1
    np.testing.assert_equal(read(HONEST[protocol].replace(two, one)), read(HONEST[protocol]))


@settings(max_examples=300, deadline=5000, suppress_health_check=list(HealthCheck))
@given(
    protocol=st.sampled_from(list(HONEST)),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=12)),
        min_size=1,
        max_size=6,
    ),
)
def test_an_honest_file_changed_anywhere_is_read_or_refused(protocol, edits):
    content = bytearray(HONEST[protocol])
    for place, removed, inserted in edits:
        # mostly near the ends: in the middle lie only pixels
        position = int(place * 400) if place < 0.7 else len(content) - int((1 - place) * 300)
        content[position : position + removed] = inserted
    try:
        read(bytes(content))
    except InputError as error:
        assert str(error).isprintable()


@settings(max_examples=300, deadline=5000)
@given(
    st.lists(
        st.sampled_from(
            [
                c
                for c in b"(.0123456789:;<>=?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz})\n"
            ]
        )
        | st.integers(0x80, 0x98),
        max_size=200,
    )
)
def test_any_sequence_of_instructions_is_read_or_refused(codes):
    try:
        read(bytes(codes))
    except InputError as error:
        assert str(error).isprintable()
