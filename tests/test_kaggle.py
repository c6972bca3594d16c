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
from cifar_lib.kaggle import PIXELS, PLANES, read_test_file, write_submission
from notebooks.course.corruptions import FAMILIES, generate_test_file, shifted
from notebooks.course.stand_in import generate_stand_in

N = 4
IMAGES = generate_stand_in(N, 0)[0].images
HWC = IMAGES.permute(0, 2, 3, 1).contiguous().numpy()
IDS = [7, 3, 11, 0]


def written(tmp_path, content):
    path = tmp_path / "test.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, 4))
    return path


NUMBERS = [
    IDS,
    tuple(IDS),
    [np.int64(7), np.int32(3), 11.0, np.uint8(0)],
    *(np.array(IDS, kind) for kind in ("u1", "i2", "<u4", ">u4", "u8", "f4", "f8", object)),
    np.array(IDS)[:, None],
]
NAMES = [[b"a", "b", "c", "d"], *(np.array([*"abcd"], kind) for kind in ("U", "S", object))]
READ = [(ids, tuple(IDS)) for ids in NUMBERS] + [(ids, tuple("abcd")) for ids in NAMES]
READ += [(range(10, 14), (10, 11, 12, 13)), (["é" * 200, 10**20 - 1, 2.0**53 - 1, -3], None)]


@pytest.mark.parametrize(("ids", "expected"), READ)
def test_whatever_counts_or_names_the_images_is_carried(tmp_path, ids, expected):
    for names, protocol in ((("data", "ids"), 4), ((b"data", b"ids"), 2)):
        content = pickle.dumps(dict(zip(names, (HWC, ids), strict=True)), protocol)
        read = read_test_file(written(tmp_path, content))
        assert read.ids == (expected or tuple(ids)) and read.labels is None
        assert {type(name) for name in read.ids} <= {int, str}
        assert torch.equal(read.images, IMAGES)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1], "expected a dict, got list"),
        ({"ids": IDS}, "the keys data and ids, found ['ids']"),
        ({"data": HWC}, "data and ids, found ['data']"),
        ({"data": HWC.astype(np.int64), "ids": IDS}, "array of uint8, got int64"),
        ({"data": HWC.tolist(), "ids": IDS}, "uint8, got list"),
        ({"data": HWC.transpose(1, 2, 3, 0), "ids": IDS}, "(N, 3072), got (32, 32, 3, 4)"),
        ({"data": HWC[:0], "ids": []}, "(N, 3072), got (0, 32, 32, 3)"),
        ({"data": np.array(5, np.uint8), "ids": [1]}, "(N, 3072), got ()"),
        ({"data": HWC, "ids": "abcd"}, "a list or a flat array, got str"),
        ({"data": HWC, "ids": np.array(5)}, "a flat array, got ()"),
        ({"data": HWC, "ids": np.ones((4, 2))}, "a flat array, got (4, 2)"),
        ({"data": HWC, "ids": IDS[:3]}, "one for each of 4 images, got 3"),
        ({"data": HWC, "ids": range(10**9)}, "it holds a range of over 1,000,000"),
        ({"data": HWC, "ids": [1, 2, 3, "1"]}, "'1' is the id of several"),
        ({"data": HWC, "ids": np.array([1, 2, 3, None], object)}, "characters, got None"),
        ({"data": HWC, "ids": [1, 2, 3, 4.5]}, "whole numbers of at most 20 digits, or names"),
        ({"data": HWC, "ids": [1, 2, 3, 2.0**53]}, "whole numbers of at most 20 digits, or names"),
        ({"data": HWC, "ids": [1, 2, 3, 10**20]}, "whole numbers of at most 20 digits, or names"),
        ({"data": HWC, "ids": [1, 2, 3, True]}, "whole numbers of at most 20 digits, or names"),
        ({"data": HWC, "ids": [*"abc", ""]}, "got ''"),
        ({"data": HWC, "ids": [*"abc", "d\n"]}, "got 'd\\n'"),
        ({"data": HWC, "ids": [*"abc", "d" * 201]}, "got 'dddd"),
    ],
)
def test_a_wrong_content_is_named_with_its_remedy(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_test_file(path)
    said = str(caught.value)
    assert said.startswith(f"test file: {path} can't be read (") and message in said
    assert said.endswith(" a dict with data (N, 32, 32, 3) and ids")


def check_layouts(path, images: torch.Tensor) -> None:
    """The images are read from both orders in all shapes, those for another order included."""
    orders = {PLANES: images.contiguous(), PIXELS: images.permute(0, 2, 3, 1).contiguous()}
    for order, values in orders.items():
        for shape in kaggle.SHAPES:
            data = values.reshape(-1, *shape).numpy()
            read = read_test_file(written(path, {"data": data, "ids": list(range(len(data)))}))
            assert torch.equal(read.images, images), (order, shape)
            assert read.source == f"test.pkl, {order}"


def test_the_order_of_the_values_is_told_by_smoothness(tmp_path):
    for count in (1, 2, 30):
        check_layouts(tmp_path, generate_stand_in(count, 0, seed=5)[0].images)
    grey = generate_stand_in(50, 0)[0].images[:, :1].expand(-1, 3, -1, -1)
    check_layouts(tmp_path, grey)

    # However numpy has stored them.
    backwards = np.asfortranarray(grey.permute(0, 2, 3, 1).numpy())
    read = read_test_file(written(tmp_path, {"data": backwards, "ids": list(range(50))}))
    assert torch.equal(read.images, grey)

    # Nothing contradicts what the shape says.
    flat = torch.tensor([[200, 30, 90], [7, 7, 7]], dtype=torch.uint8)
    data = {"data": flat[:, None, None].expand(2, 32, 32, 3).numpy(), "ids": [0, 1]}
    assert torch.equal(read_test_file(written(tmp_path, data)).images[:, :, 5, 9], flat)


@pytest.mark.parametrize("family", FAMILIES)
def test_shifted_real_images_are_read_in_the_right_order(tmp_path, family, cifar10):
    images = shifted(cifar10[1].images[:300], family, 5)
    check_layouts(tmp_path, images)
    check_layouts(tmp_path, images[:1])


def test_images_that_are_noise_are_refused(tmp_path):
    generator = np.random.default_rng(0)
    images = generate_stand_in(60, 0)[0].images.permute(0, 2, 3, 1).numpy()
    noise = generator.integers(0, 256, images.shape, dtype=np.uint8)
    places = generator.permuted(images.reshape(60, 1024, 3), axis=1).reshape(images.shape)
    across_images = images.transpose(1, 2, 3, 0).reshape(images.shape)
    for data in (noise, noise[:20], places, across_images, noise.reshape(60, 3072)):
        path = written(tmp_path, {"data": data, "ids": list(range(len(data)))})
        with pytest.raises(
            InputError, match="expected images, got what looks like noise.*: write the data again"
        ):
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


def file_of(write, *arguments) -> bytes:
    file = io.BytesIO()
    write(file, *arguments)
    return file.getvalue()


STRANGERS = [
    (file_of(lambda file: zipfile.ZipFile(file, "w").writestr("a", b"")), "it is a zip archive"),
    (gzip.compress(b"content"), "it is gzip-compressed"),
    (bz2.compress(b"content"), "it is bzip2-compressed"),
    (lzma.compress(b"content"), "it is xz-compressed"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "it is a Git LFS pointer"),
    (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "it is a web page"),
    (b'{"data": [], "ids": []}', "it is JSON"),
    (safetensors.torch.save({"weight": torch.zeros(3)}), "it is a safetensors file"),
    (file_of(np.save, HWC), "it is a NumPy .npy file"),
    (b"ID,Labels\n0,3\n1,5\n", "it is a CSV table"),
    (b"", "it is empty): download it again"),
    (b"a,b\n", "it isn't a pickle of arrays"),
    (b"words\nonly\n", "it isn't a pickle of arrays: it has the instruction b'w'"),
    (b"a, b\nc\n", "it isn't a pickle of arrays"),
    (b"\0,1\n2,3\n", r"it isn't a pickle of arrays: it has the instruction b'\x00'"),
    (b" \n\n", "it isn't a pickle of arrays: it has the instruction b' '"),
]


@pytest.mark.parametrize(("content", "kind"), STRANGERS, ids=[kind for _, kind in STRANGERS])
def test_a_file_that_is_something_else_is_called_what_it_is(tmp_path, content, kind):
    with pytest.raises(InputError, match=re.escape(f"can't be read ({kind}")):
        read_test_file(written(tmp_path, content))


def test_a_submission_has_the_files_ids_in_order(tmp_path, capfdbinary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_submission("s.csv", IDS, [3, 5, 0, 9])
    assert (tmp_path / "s.csv").read_bytes() == b"ID,Labels\n7,3\n3,5\n11,0\n0,9\n"
    write_submission("s.csv", ["a,b"], torch.tensor([1]), label_column="Category")
    assert (tmp_path / "s.csv").read_bytes() == b'ID,Category\n"a,b",1\n'
    write_submission("-", ["é"], [3])
    assert capfdbinary.readouterr().out == "ID,Labels\né,3\n".encode()
    assert os.listdir() == ["s.csv"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"labels": [3, 10]}, "labels 0 to 9, got 10"),
        ({"labels": [3, -1]}, "labels 0 to 9, got -1"),
        ({"labels": [3, 2.9]}, "labels 0 to 9, got 2.9"),
        ({"labels": [3]}, "one for each of 1 images, got 2"),
        ({"ids": ["1", 1]}, "'1' is the id of several"),
        ({"label_column": ""}, "a printable column name, got ''"),
        ({"label_column": "a\nb"}, "a printable column name, got 'a\\nb'"),
        ({"inputs": ["other.csv", "s.csv"]}, "it is an input of this command"),
        ({"path": "."}, ": it names a folder: name a file in it"),
        ({"path": "results/"}, ": it names a folder: name a file in it"),
    ],
)
def test_an_invalid_submission_leaves_the_old_one(tmp_path, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.csv").write_text("old", encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)):
        write_submission(**{"path": "s.csv", "ids": [1, 2], "labels": [3, 4]} | changed)
    assert (tmp_path / "s.csv").read_text(encoding="utf-8") == "old"
    assert os.listdir() == ["s.csv"]


def test_a_generated_file_reads_back_with_its_labels_in_step(tmp_path):
    brightness = torch.arange(40, dtype=torch.uint8).mul(6).view(-1, 1, 1, 1)
    test = ImageSet(brightness.expand(-1, 3, 32, 32).contiguous(), torch.arange(40) % 10)
    known = generate_test_file(tmp_path / "g.pkl", test)
    read = read_test_file(tmp_path / "g.pkl")
    assert torch.equal(read.images, known.images) and read.labels is None
    assert read.ids == known.ids == tuple(range(40))
    order = known.images[:, 0, 0, 0].int().argsort()  # the shift keeps the order of brightness
    assert torch.equal(known.labels[order], test.labels)
    assert not torch.equal(known.labels, test.labels)
