"""The untrusted pickle in, the submission out."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from cifar_lib import kaggle
from cifar_lib.data import ImageSet
from cifar_lib.errors import InputError
from cifar_lib.files import parse_object
from cifar_lib.kaggle import read_test_file, write_submission
from notebooks.course.corruptions import FAMILIES, generate_test_file, shifted
from notebooks.course.stand_in import generate_stand_in

N = 4
IMAGES = generate_stand_in(N, 0)[0].images
HWC = IMAGES.permute(0, 2, 3, 1).contiguous().numpy()
IDS = [7, 3, 11, 0]


def zipfile_of(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("test.pkl", content)
    return file.getvalue()


def array_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def written(tmp_path, content):
    path = tmp_path / "test.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, 4))
    return path


@pytest.mark.parametrize(
    "data",
    [HWC, IMAGES.flatten(1).numpy(), IMAGES.numpy(), HWC.reshape(N, 3072)],
    ids=["hwc", "planes", "chw", "pixels"],
)
@pytest.mark.parametrize("keys", [("data", "ids"), (b"data", b"ids")], ids=["str", "bytes"])
@pytest.mark.parametrize("ids", [IDS, tuple(IDS), np.array(IDS), list(np.array(IDS))])
def test_every_honest_variant_reads_the_same(tmp_path, data, keys, ids):
    read = read_test_file(written(tmp_path, dict(zip(keys, (data, ids), strict=True))))
    assert torch.equal(read.images, IMAGES) and read.ids == tuple(IDS) and read.labels is None


@pytest.mark.parametrize(
    "ids",
    [
        range(10, 14),
        *(np.arange(10, 14, dtype=kind) for kind in ("u1", "i2", "<u4", ">u4", "u8", "f4", "f8")),
        np.arange(10, 14)[:, None],
        np.array([10, np.int32(11), 12.0, np.uint8(13)], dtype=object),
    ],
    ids=lambda ids: str(getattr(ids, "dtype", "range")),
)
@pytest.mark.parametrize("protocol", range(6))
def test_whatever_counts_images_is_an_id(tmp_path, protocol, ids):
    content = pickle.dumps({"data": HWC, "ids": ids}, protocol)
    read = read_test_file(written(tmp_path, content)).ids
    assert read == (10, 11, 12, 13) and all(type(i) is int for i in read)


@pytest.mark.parametrize(
    "ids",
    [
        [b"a", "b", "c", "d"],
        np.array(["a", "b", "c", "d"]),
        np.array([b"a", b"b", b"c", b"d"]),
        np.array(["a", "b", "c", "d"], dtype=object),
    ],
)
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
        (
            {"data": HWC, "ids": np.array([1, 2, 3, None], dtype=object)},
            "names of 1 to 200 letters",
        ),
        ({"data": HWC, "ids": np.array([1, 2, 3, np.nan])}, "numbers or names of 1 to 200 letters"),
        ({"data": HWC, "ids": np.array([[1, 2], [3, 4]], dtype=object)}, "a plain list of them"),
        ({"data": HWC, "ids": np.ones((4, 2))}, "a list or a flat array, got (4, 2)"),
        ({"data": HWC, "ids": range(5)}, "one for each of 4 images, got 5"),
        ({"data": HWC, "ids": range(10**9)}, "it counts to over 1,000,000"),
        ({"data": HWC.astype(object), "ids": IDS}, "a plain list of them"),
        ({"data": HWC.transpose(1, 2, 3, 0), "ids": IDS}, "(N, 3072), got (32, 32, 3, 4)"),
        ({"data": HWC[:0], "ids": []}, "(N, 3072), got (0, 32, 32, 3)"),
        ({"data": np.array(5, np.uint8), "ids": [1]}, "(N, 3072), got ()"),
        ({"data": HWC, "ids": IDS[:3]}, "one for each of 4 images, got 3"),
        ({"data": HWC, "ids": [1, 2, 3, 1]}, "'1' stands for several"),
        ({"data": HWC, "ids": [1, 2, 3, 4.5]}, "whole numbers or names"),
        ({"data": HWC, "ids": ["a", "b", "c", "d\n"]}, "got 'd\\n'"),
        ({"data": HWC, "ids": ["a", "b", "c", "d" * 201]}, "got 'dddd"),
        ({"data": HWC, "ids": "abcd"}, "a flat array, got str"),
        ({"data": HWC, "ids": np.array(5)}, "a flat array, got ()"),
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


def order_of(source: str) -> str:
    return source.partition(", ")[2]


def layouts(images: torch.Tensor) -> dict[str, np.ndarray]:
    """The same images in both orders and all shapes, those for another order included."""
    planes, pixels = images.contiguous(), images.permute(0, 2, 3, 1).contiguous()
    shapes = {"(N, 3072)": (3072,), "(N, 32, 32, 3)": (32, 32, 3), "(N, 3, 32, 32)": (3, 32, 32)}
    return {
        f"{order} as {name}": values.reshape(-1, *shape).numpy()
        for order, values in (("plane after plane", planes), ("pixel after pixel", pixels))
        for name, shape in shapes.items()
    }


def check_layouts(path, images: torch.Tensor) -> None:
    for name, data in layouts(images).items():
        read = read_test_file(written(path, {"data": data, "ids": list(range(len(data)))}))
        assert torch.equal(read.images, images), name
        assert order_of(read.source) == name.partition(" as ")[0]


@pytest.mark.parametrize("count", [1, 2, 30])
def test_the_order_of_the_values_is_told_by_smoothness(tmp_path, count):
    check_layouts(tmp_path, generate_stand_in(count, 0, seed=5)[0].images)


@pytest.mark.parametrize("family", FAMILIES)
def test_shifted_real_images_are_read_in_the_right_order(tmp_path, family, cifar10):
    check_layouts(tmp_path, shifted(cifar10[1].images[:300], family, 5))
    check_layouts(tmp_path, shifted(cifar10[1].images[:300], family, 5)[:1])


def test_flat_and_grey_images_keep_the_order_that_their_shape_says(tmp_path):
    flat = torch.tensor([[200, 30, 90], [7, 7, 7]], dtype=torch.uint8)
    data = {"data": flat[:, None, None].expand(2, 32, 32, 3).numpy(), "ids": [0, 1]}
    assert torch.equal(read_test_file(written(tmp_path, data)).images[:, :, 5, 9], flat)
    grey = generate_stand_in(50, 0)[0].images[:, :1].expand(-1, 3, -1, -1)
    check_layouts(tmp_path, grey)


def test_images_that_are_noise_are_refused(tmp_path):
    generator = np.random.default_rng(0)
    images = generate_stand_in(60, 0)[0].images.permute(0, 2, 3, 1).numpy()
    noise = generator.integers(0, 256, images.shape, dtype=np.uint8)
    places = generator.permuted(images.reshape(60, 1024, 3), axis=1).reshape(images.shape)
    across_images = images.transpose(1, 2, 3, 0).reshape(images.shape)
    for data in (noise, places, across_images, noise.reshape(60, 3072)):
        path = written(tmp_path, {"data": data, "ids": list(range(60))})
        with pytest.raises(InputError, match="expected images, got noise.*: write data .* anew"):
            read_test_file(path)


def test_the_thresholds_are_those_of_real_images(cifar10):
    across, down, anywhere = kaggle._steps(cifar10[1].images)
    assert (across + down) / 2 / anywhere == pytest.approx(0.26, abs=0.005)
    noisy = kaggle._steps(shifted(cifar10[1].images[:2000], "noise", 5))
    assert (noisy[0] + noisy[1]) / 2 / noisy[2] == pytest.approx(0.51, abs=0.015)
    values = cifar10[1].images[:2000]
    planes_as_pixels = values.reshape(-1, 32, 32, 3).permute(0, 3, 1, 2)
    pixels_as_planes = values.permute(0, 2, 3, 1).reshape(-1, 3, 32, 32)
    for wrong, expected in ((planes_as_pixels, 0.45), (pixels_as_planes, 0.29)):
        ratio = max(kaggle._steps(values)[:2]) / max(kaggle._steps(wrong)[:2])
        assert ratio == pytest.approx(expected, abs=0.015)


STRANGERS = {
    "a zip archive": zipfile_of(b"content"),
    "gzip-compressed": gzip.compress(b"content"),
    "bzip2-compressed": bz2.compress(b"content"),
    "xz-compressed": lzma.compress(b"content"),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "a web page": b"\n<!DOCTYPE html>\n<html><body>404</body></html>",
    "JSON": b'{"data": [], "ids": []}',
    "a safetensors file": safetensors.torch.save({"weight": torch.zeros(3)}),
    "a NumPy .npy file": array_file(HWC),
    "a CSV table": b"ID,Labels\n0,3\n1,5\n",
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_file_that_is_something_else_is_called_what_it_is(tmp_path, kind):
    with pytest.raises(InputError) as caught:
        read_test_file(written(tmp_path, STRANGERS[kind]))
    assert f"can't be read (it is {kind}" in str(caught.value)


def test_what_is_no_file_is_named(tmp_path):
    cases = {"absent": "No such file", ".": ""}
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(tmp_path / "fifo")
        cases["fifo"] = "no regular file"
    for name, reason in cases.items():
        path = re.escape(str(tmp_path / name))
        with pytest.raises(InputError, match=f"^test file: {path} can't[^\n]*{reason}"):
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


def test_a_folder_is_no_place_for_a_submission(tmp_path):
    for name in (f"{tmp_path}/results/", tmp_path):
        with pytest.raises(InputError, match=": it is a folder: name a file in it$"):
            write_submission(name, IDS, [3, 5, 0, 9])
    assert os.listdir(tmp_path) == []


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
