"""The untrusted pickle in, the submission out."""

import os
import pickle

import numpy as np
import pytest
import torch
from shifts import generate_test_file

from cifar_lib.data import ImageSet
from cifar_lib.errors import InputError
from cifar_lib.files import parse_object
from cifar_lib.kaggle import read_test_file, write_submission

N = 4
IMAGES = torch.arange(N * 3072).remainder(251).to(torch.uint8).view(N, 3, 32, 32)
HWC = IMAGES.permute(0, 2, 3, 1).contiguous().numpy()
IDS = [7, 3, 11, 0]


def written(tmp_path, content):
    path = tmp_path / "test.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, 4))
    return path


@pytest.mark.parametrize("data", [HWC, IMAGES.flatten(1).numpy()], ids=["hwc", "flat"])
@pytest.mark.parametrize("keys", [("data", "ids"), (b"data", b"ids")], ids=["str", "bytes"])
@pytest.mark.parametrize("ids", [IDS, tuple(IDS), np.array(IDS), list(np.array(IDS))])
def test_every_honest_variant_reads_the_same(tmp_path, data, keys, ids):
    read = read_test_file(written(tmp_path, dict(zip(keys, (data, ids), strict=True))))
    assert torch.equal(read.images, IMAGES) and read.ids == tuple(IDS) and read.labels is None


@pytest.mark.parametrize("ids", [[b"a", "b", "c", "d"], np.array(["a", "b", "c", "d"])])
def test_names_as_ids_are_carried(tmp_path, ids):
    assert read_test_file(written(tmp_path, {"data": HWC, "ids": ids})).ids == tuple("abcd")


# As Python 2 wrote it: byte strings for keys and pixels, numpy.core instead of numpy._core.
# Protocol 0 is text, with all bytes that aren't printable escaped inside of quotes.
PYTHON_2 = {
    0: b"(dp1\nS'data'\np2\ncnumpy.core.multiarray\n_reconstruct\np3\n(cnumpy\nndarray\np4\n(I0\n"
    b"tp5\nS'b'\np6\ntp7\nRp8\n(I1\n(I4\nI32\nI32\nI3\ntp9\ncnumpy\ndtype\np10\n(S'u1'\np11\nI0\n"
    b"I1\ntp12\nRp13\n(I3\nS'|'\np14\nNNNI-1\nI-1\nI0\ntp15\nbI00\nS"
    + repr(HWC.tobytes())[1:].encode()
    + b"\np16\ntp17\nbsS'ids'\np18\n(lp19\nI7\naI3\naL11L\naI0\nas.",
    2: b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
    b"\x87R(K\x01(K\x04K\x20K\x20K\x03tcnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff"
    b"\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
    + len(HWC.tobytes()).to_bytes(4, "little")
    + HWC.tobytes()
    + b"tbU\x03ids](K\x07K\x03K\x0bK\x00eu.",
}


@pytest.mark.parametrize("protocol", PYTHON_2)
def test_files_of_python_2_and_older_numpy_are_read(tmp_path, protocol):
    read = read_test_file(written(tmp_path, PYTHON_2[protocol]))
    assert torch.equal(read.images, IMAGES) and read.ids == tuple(IDS)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1], "expected a dict, got list"),
        ({"ids": IDS}, "the keys data and ids, found ['ids']"),
        ({"data": HWC}, "data and ids, found ['data']"),
        ({"data": HWC.astype(np.int64), "ids": IDS}, "array of uint8, got int64"),
        ({"data": HWC.tolist(), "ids": IDS}, "uint8, got list"),
        ({"data": HWC[:0], "ids": []}, "(N, 3072), got (0, 32, 32, 3)"),
        ({"data": np.array(5, np.uint8), "ids": [1]}, "(N, 3072), got ()"),
        ({"data": HWC, "ids": IDS[:3]}, "one for each of 4 images, got 3"),
        ({"data": HWC, "ids": [1, 2, 3, 1]}, "'1' stands for several"),
        ({"data": HWC, "ids": [1, 2, 3, 4.5]}, "whole numbers or names"),
        ({"data": HWC, "ids": ["a", "b", "c", "d\n"]}, "got 'd\\n'"),
        ({"data": HWC, "ids": ["a", "b", "c", "d" * 201]}, "got 'dddd"),
        ({"data": HWC, "ids": "abcd"}, "a flat array, got str"),
        ({"data": HWC, "ids": np.array(5)}, "a flat array, got ndarray"),
        ({"data": HWC, "ids": [1, 2, 3, 10**20]}, "whole numbers or names"),
        (pickle.dumps({"data": HWC, "ids": IDS})[:-1], "no pickle of arrays"),
    ],
)
def test_a_wrong_content_is_named_with_its_remedy(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_test_file(path)
    said = str(caught.value)
    assert said.startswith(f"test file: {path} can't be read (") and message in said
    assert said.endswith(" a dict with data (N, 32, 32, 3) and ids")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, reason in (("absent", "No such file"), ("fifo", "no regular file"), (".", "")):
        with pytest.raises(InputError, match=f"^test file: {tmp_path / name} can't[^\n]*{reason}"):
            read_test_file(tmp_path / name)


def test_numbers_and_nesting_beyond_bounds_are_no_json():
    with pytest.raises(ValueError, match="nested too deep"):
        parse_object(b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}")
    with pytest.raises(ValueError, match="a number of 100 digits"):
        parse_object(b'{"a": 1' + b"0" * 400 + b"}")
    for content in (b"{}", b"[1]", b"{", b"\xff"):
        with pytest.raises(ValueError):
            parse_object(content)


def test_submission_has_the_files_ids_in_order(tmp_path):
    write_submission(tmp_path / "s.csv", IDS, [3, 5, 0, 9])
    assert (tmp_path / "s.csv").read_text(encoding="utf-8") == "ID,Labels\n7,3\n3,5\n11,0\n0,9\n"
    write_submission(tmp_path / "s.csv", ["a,b"], [1], label_column="Category")
    assert (tmp_path / "s.csv").read_text(encoding="utf-8") == 'ID,Category\n"a,b",1\n'


def test_a_submission_can_go_to_standard_output(capfdbinary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_submission("-", ["é"], [3])
    assert capfdbinary.readouterr().out == "ID,Labels\né,3\n".encode()
    assert os.listdir() == []


@pytest.mark.parametrize(
    "ids, labels, message",
    [
        ([1, 2], [3, 10], "labels 0 to 9, got 10"),
        ([1, 2], [3, -1], "labels 0 to 9, got -1"),
        ([1, 2], [3, 2.9], "labels 0 to 9, got 2.9"),
        ([1, 2], [3], "one for each of 1 images, got 2"),
        (["1", 1], [3, 4], "'1' stands for several"),
        (["a\nb"], [3], "names of 1 to 200 letters, got 'a\\nb'"),
    ],
)
def test_an_invalid_submission_leaves_the_old_one(tmp_path, ids, labels, message):
    path = tmp_path / "s.csv"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        write_submission(path, ids, labels)
    assert message in str(caught.value)
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["s.csv"]


def test_generated_file_reads_back_with_its_labels_in_step(tmp_path):
    brightness = torch.arange(40, dtype=torch.uint8).mul(6).view(-1, 1, 1, 1)
    test = ImageSet(brightness.expand(-1, 3, 32, 32).contiguous(), torch.arange(40) % 10)
    known = generate_test_file(tmp_path / "g.pkl", test)
    read = read_test_file(tmp_path / "g.pkl")
    assert torch.equal(read.images, known.images) and read.labels is None
    assert read.ids == known.ids == tuple(range(40))
    order = known.images[:, 0, 0, 0].int().argsort()  # the shift keeps the order of brightness
    assert torch.equal(known.labels[order], test.labels)
    assert not torch.equal(known.labels, test.labels)
