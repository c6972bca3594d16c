"""The untrusted pickle in, the submission out."""

import csv
import os
import pickle
import subprocess

import numpy as np
import pytest
import torch

from cifar_lib.data import KAGGLE_MEAN, KAGGLE_STD, ImageSet, channel_statistics
from cifar_lib.errors import InputError
from cifar_lib.kaggle import generate_test_file, read_test_file, write_submission
from cifar_lib.shift import match_statistics
from cifar_lib.stand_in import generate_stand_in

N = 4
IMAGES = torch.arange(N * 3072).remainder(251).to(torch.uint8).view(N, 3, 32, 32)
HWC = IMAGES.permute(0, 2, 3, 1).contiguous().numpy()
IDS = [7, 3, 11, 0]


def written(tmp_path, content, protocol=4):
    path = tmp_path / "test.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


def refusal(path):
    with pytest.raises(InputError) as caught:
        read_test_file(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "data", [HWC, IMAGES.flatten(1).numpy(), np.asfortranarray(HWC)], ids=["hwc", "flat", "fortran"]
)
@pytest.mark.parametrize("keys", [("data", "ids"), (b"data", b"ids")], ids=["str", "bytes"])
def test_every_honest_variant_reads_the_same(tmp_path, protocol, data, keys):
    for ids in (IDS, tuple(IDS), np.array(IDS), list(np.array(IDS))):
        read = read_test_file(
            written(tmp_path, dict(zip(keys, (data, ids), strict=True)), protocol)
        )
        assert torch.equal(read.images, IMAGES) and read.ids == tuple(IDS) and read.labels is None


def test_files_of_python_2_and_older_numpy_are_read(tmp_path):
    # protocol 2 as Python 2 wrote it: byte strings (U, T) for keys and pixels, numpy.core instead
    # of numpy._core
    pixels = HWC.tobytes()
    shape = b"(K%cK\x20K\x20K\x03t" % N
    python_2 = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + shape
    )
    python_2 += b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
    python_2 += len(pixels).to_bytes(4, "little") + pixels + b"tbU\x03ids](K\x07K\x03K\x0bK\x00eu."
    read = read_test_file(written(tmp_path, python_2))
    assert torch.equal(read.images, IMAGES) and read.ids == tuple(IDS)


def test_files_of_python_2s_default_protocol_are_read(tmp_path):
    # protocol 0: text, with all bytes that aren't printable escaped inside of quotes
    pixels = repr(HWC.tobytes())[1:].encode()
    python_2 = b"(dp1\nS'data'\np2\ncnumpy.core.multiarray\n_reconstruct\np3\n(cnumpy\nndarray\np4\n(I0\ntp5\nS'b'\np6\n"
    python_2 += (
        b"tp7\nRp8\n(I1\n(I%d\nI32\nI32\nI3\ntp9\ncnumpy\ndtype\np10\n(S'u1'\np11\nI0\nI1\ntp12\nRp13\n"
        % N
    )
    python_2 += (
        b"(I3\nS'|'\np14\nNNNI-1\nI-1\nI0\ntp15\nbI00\nS"
        + pixels
        + b"\np16\ntp17\nbsS'ids'\np18\n(lp19\n"
    )
    python_2 += b"I7\naI3\naI11\naI0\nas."
    read = read_test_file(written(tmp_path, python_2))
    assert torch.equal(read.images, IMAGES) and read.ids == tuple(IDS)


def test_names_as_ids_are_carried(tmp_path):
    assert read_test_file(written(tmp_path, {"data": HWC, "ids": [b"a", "b", "c", "d"]})).ids == (
        "a",
        "b",
        "c",
        "d",
    )


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["data", "ids", "key"])
@pytest.mark.parametrize(
    "function, arguments",
    [
        (os.system, ("touch owned",)),
        (subprocess.Popen, (["touch", "owned"],)),
        (eval, ("open('owned', 'w')",)),
    ],
    ids=["system", "popen", "eval"],
)
def test_no_code_of_the_file_runs(tmp_path, monkeypatch, where, function, arguments):
    monkeypatch.chdir(tmp_path)
    gadget = Runs(function, *arguments)
    content = {
        "data": {"data": gadget, "ids": IDS},
        "ids": {"data": HWC, "ids": [gadget]},
        "key": [gadget],
    }[where]
    assert "wants to run" in refusal(written(tmp_path, content))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name", [b"numpy.f2py\ncompile", b"numpy\nload", b"numpy\nndarray.tofile", b"builtins\ngetattr"]
)
def test_names_under_allowed_prefixes_are_refused(tmp_path, name):
    assert "wants to run" in refusal(written(tmp_path, b"c" + name + b"\n."))
    assert "wants to run" in refusal(
        written(
            tmp_path,
            b"\x80\x04\x8c%c" % name.index(b"\n")
            + name.replace(b"\n", b"\x8c%c" % (len(name) - name.index(b"\n") - 1))
            + b"\x93.",
        )
    )


def test_object_arrays_are_refused(tmp_path):
    refusal(written(tmp_path, {"data": np.array([Runs(os.getcwd)], dtype=object), "ids": [0]}))
    assert "type" in refusal(written(tmp_path, {"data": HWC, "ids": np.array(IDS, dtype=object)}))


@pytest.mark.parametrize(
    "content, message",
    [
        ([1], "expected a dict"),
        ({"ids": IDS}, "'data'"),
        ({"data": HWC}, "'ids'"),
        ({"data": HWC.astype(np.int64), "ids": IDS}, "uint8"),
        ({"data": HWC.tolist(), "ids": IDS}, "uint8"),
        ({"data": HWC[:, :16], "ids": IDS}, "(N, 3072)"),
        ({"data": IMAGES.numpy(), "ids": IDS}, "(N, 3072)"),
        ({"data": HWC[:0], "ids": []}, "(N, 3072)"),
        ({"data": np.array(5, np.uint8), "ids": [1]}, "got ()"),
        ({"data": HWC, "ids": IDS[:3]}, "3 ids"),
        ({"data": HWC, "ids": [1, 2, 3, 1]}, "1 stands for several"),
        ({"data": HWC, "ids": [1, 2, 3, 4.5]}, "whole numbers"),
        ({"data": HWC, "ids": "abcd"}, "list"),
    ],
)
def test_a_wrong_content_is_named(tmp_path, content, message):
    assert message in refusal(written(tmp_path, content))


def test_broken_files_are_refused(tmp_path):
    whole = pickle.dumps({"data": HWC, "ids": IDS}, 4)
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        refusal(written(tmp_path, whole[:size]))
    assert "found none" in refusal(tmp_path / "absent.pkl")


def test_submission_has_the_files_ids_in_order(tmp_path):
    write_submission(tmp_path / "s.csv", IDS, [3, 5, 0, 9])
    assert (tmp_path / "s.csv").read_text() == "ID,Labels\n7,3\n3,5\n11,0\n0,9\n"
    write_submission(tmp_path / "s.csv", ["a,b"], [1], label_column="Category")
    rows = list(csv.reader((tmp_path / "s.csv").read_text().splitlines()))
    assert rows == [["ID", "Category"], ["a,b", "1"]]


@pytest.mark.parametrize("ids, labels", [([1, 2], [3, 10]), ([1, 1], [3, 4]), ([1, 2], [3, -1])])
def test_an_invalid_submission_leaves_the_old_one(tmp_path, ids, labels):
    path = tmp_path / "s.csv"
    path.write_text("old")
    with pytest.raises(InputError):
        write_submission(path, ids, labels)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["s.csv"]


def test_match_statistics_reaches_its_target():
    _, test = generate_stand_in(10, 500)
    mean, std = channel_statistics(match_statistics(test.images, KAGGLE_MEAN, KAGGLE_STD))
    assert np.allclose(mean, KAGGLE_MEAN, atol=5e-4) and np.allclose(std, KAGGLE_STD, atol=5e-4)


def test_generated_file_reads_back_with_its_labels_in_step(tmp_path):
    marked = (
        torch.arange(40, dtype=torch.uint8)
        .mul(6)
        .view(-1, 1, 1, 1)
        .expand(-1, 3, 32, 32)
        .contiguous()
    )
    test = ImageSet(marked, torch.arange(40) % 10)
    known = generate_test_file(tmp_path / "g.pkl", test)
    read = read_test_file(tmp_path / "g.pkl")
    assert (
        torch.equal(read.images, known.images)
        and read.ids == tuple(range(40))
        and read.labels is None
    )
    order = known.images[:, 0, 0, 0].int().argsort()  # the shift keeps the order of brightness
    assert torch.equal(known.labels[order], test.labels) and not torch.equal(
        known.labels, test.labels
    )
