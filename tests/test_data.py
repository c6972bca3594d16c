import hashlib
import os
import pickle
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torchvision.datasets import CIFAR10

from cifar_lib import data
from cifar_lib.data import CAT, DOG, FOLDER, ImageSet, find_cifar10, load_cifar10, read_picture
from cifar_lib.errors import InputError
from cifar_lib.evaluate import confusion_matrix
from notebooks.course.stand_in import generate_stand_in


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """An empty working directory on a machine without CIFAR-10."""
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.setattr(data, "KAGGLE_INPUT", tmp_path / "kaggle")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A folder of two images a batch, in the real format, whose md5 are taken for the real ones."""
    folder = place(tmp_path / "tiny")
    listed = []
    for i, (name, _) in enumerate(CIFAR10.train_list + CIFAR10.test_list):
        pixels = np.full((2, 3072), i, dtype=np.uint8)
        pixels[:, 1] = 77  # row 0, column 1, red
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i, 9 - i]}, 2))
        listed.append((name, hashlib.md5((folder / name).read_bytes()).hexdigest()))
    monkeypatch.setattr(CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(CIFAR10, "test_list", listed[5:])
    return folder


def place(folder: Path, whole: bool = False) -> Path:
    """CIFAR-10's folder in `folder`: without a file, or with all of them, each empty."""
    (folder / FOLDER).mkdir(parents=True)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list if whole else ():
        (folder / FOLDER / name).touch()
    return folder / FOLDER


# Where it is found


def test_places_are_searched_in_order(nowhere, monkeypatch):
    assert find_cifar10() is None
    kaggle = place(nowhere / "kaggle" / "datasets" / "somebody" / "some-dataset", whole=True)
    assert find_cifar10() == kaggle
    place(nowhere / "work" / "data", whole=True)
    assert find_cifar10() == Path("data") / FOLDER
    variable = place(nowhere / "variable", whole=True)
    monkeypatch.setenv("CIFAR10_ROOT", str(variable.parent))
    assert find_cifar10() == variable
    explicit = place(nowhere / "explicit", whole=True)
    assert find_cifar10(explicit.parent) == explicit
    assert find_cifar10(str(explicit)) == explicit  # the folder itself may be named too


def test_a_folder_that_lacks_files_does_not_hide_a_whole_one(nowhere):
    place(nowhere / "work" / "data")
    place(nowhere / "kaggle" / "a")
    half = place(nowhere / "kaggle" / "b", whole=True)
    (half / "test_batch").unlink()
    assert find_cifar10() is None
    assert find_cifar10(nowhere / "kaggle" / "b") == half  # named: reading it says what is missing
    whole = place(nowhere / "kaggle" / "c", whole=True)
    assert find_cifar10() == whole


def test_a_named_place_without_it_is_an_error_even_if_another_has_it(nowhere, monkeypatch):
    place(nowhere / "work" / "data")
    monkeypatch.setenv("CIFAR10_ROOT", str(nowhere))
    with pytest.raises(InputError, match=rf"CIFAR10_ROOT: expected {FOLDER}/ in {nowhere}, found"):
        load_cifar10()
    with pytest.raises(InputError, match="the given path: .*absent"):
        load_cifar10(nowhere / "absent")


def test_files_are_read_as_channels_first_images(tiny):
    train, test = load_cifar10(tiny)
    assert train.images.shape == (10, 3, 32, 32) and train.images.dtype == torch.uint8
    assert train.images.is_contiguous() and train.labels.dtype == torch.int64
    assert train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert test.labels.tolist() == [5, 4] and len(test) == 2
    assert train.images[2:4].unique().tolist() == [1, 77]
    assert (train.images == 77).nonzero()[:, 1:].unique(dim=0).tolist() == [[0, 0, 1]]
    assert train.source == test.source == data.REAL


def test_a_batch_that_is_not_whole_is_named(tiny, monkeypatch):
    def refused(reason: str) -> None:
        message = (
            f"^{re.escape(str(path))}[^\n]*{reason}[^\n]*: delete the folder to download it again"
        )
        with pytest.raises(InputError, match=message):
            load_cifar10(tiny)

    path = tiny / "data_batch_1"
    with monkeypatch.context() as broken_disk:
        broken_disk.setattr(Path, "read_bytes", lambda _: os.close(-1))
        refused("can't be read .Bad file descriptor")
    path = tiny / "test_batch"
    content = path.read_bytes()
    for other in (content[:-1], b"", content[:99] + b"x" + content[100:]):
        path.write_bytes(other)
        refused("expected md5 [0-9a-f]{32}, the file differs")
    path.unlink()
    refused("can't be read .No such file")
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(path)
        refused("can't be read .it is no regular file")


# Splits and statistics


def test_split_is_stratified_disjoint_and_by_seed():
    labels = torch.arange(200) % 10
    train, validation = data.stratified_split(labels, 50, seed=3)
    assert train.dtype == torch.int64 and labels[validation].bincount().tolist() == [5] * 10
    assert torch.cat([train, validation]).sort().values.tolist() == list(range(200))
    assert all(torch.equal(part, part.sort().values) for part in (train, validation))
    assert torch.equal(data.stratified_split(labels, 50, seed=3)[1], validation)
    assert not torch.equal(data.stratified_split(labels, 50, seed=4)[1], validation)


@pytest.mark.parametrize("n_validation", [0, 5, 195, 201])
def test_a_split_without_every_class_in_both_parts_is_refused(n_validation):
    with pytest.raises(InputError, match=f"can't split 200 images into {200 - n_validation} and"):
        data.stratified_split(torch.arange(200) % 10, n_validation, seed=0)


@pytest.fixture(scope="module")
def random_images() -> torch.Tensor:
    """More than a chunk of 2,000, of other colours in each channel."""
    top = torch.tensor([256, 100, 30]).view(3, 1, 1)
    noise = torch.rand(2100, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return (noise * top).to(torch.uint8)


def test_channel_statistics_are_torchs_in_float64(random_images):
    mean, std = data.channel_statistics(random_images)
    pixels = random_images.double().transpose(0, 1).flatten(1) / 255
    np.testing.assert_allclose(mean, pixels.mean(1), rtol=1e-13)
    np.testing.assert_allclose(std, pixels.std(1, correction=0), rtol=1e-12)
    assert mean.dtype == std.dtype == np.float64
    assert data.channel_histogram(random_images)[1, 42] == (random_images[:, 1] == 42).sum()


def test_normalize_is_channel_by_channel(random_images):
    images, mean, std = random_images[:50], (0.1, 0.5, 0.9), (0.2, 1.0, 3.0)
    before = images.clone()
    centred = images.double() / 255 - torch.tensor(mean).view(3, 1, 1)
    result = data.normalize(images, mean, std)
    expected = centred / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-6)
    assert result.dtype == torch.float32 and result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


# Image sets


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (torch.tensor([3, 0, 3]), [3, 0, 3]),
        (np.array([4, 1]), [4, 1]),
        (slice(1, 4, 2), [1, 3]),
        (torch.tensor([True, False, False, False, True]), [0, 4]),
        (torch.tensor([], dtype=torch.int64), []),
    ],
)
def test_indexing_carries_labels_and_ids_where_there_are_any(index, expected):
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 32, 32)
    whole = ImageSet(images, torch.arange(5) * 10, ids=("a", "b", "c", "d", "e"), source="a file")
    part = whole[index]
    assert part.images[:, 0, 0, 0].tolist() == expected
    assert part.labels.tolist() == [10 * i for i in expected]
    assert part.ids == tuple("abcde"[i] for i in expected)
    assert part.source == "a file" and len(part) == len(expected)
    bare = ImageSet(images)[index].to("cpu")
    assert bare.labels is None and bare.ids is None


# The stand-in


def test_stand_in_is_deterministic_balanced_and_marked():
    first, second = generate_stand_in(120, 40), generate_stand_in(120, 40)
    for ours, again, n in zip(first, second, (120, 40), strict=True):
        assert ours.images.shape == (n, 3, 32, 32) and ours.images.dtype == torch.uint8
        assert ours.labels.bincount().tolist() == [n // 10] * 10
        assert torch.equal(ours.images, again.images) and torch.equal(ours.labels, again.labels)
        assert ours.source == data.STAND_IN
        assert len(ours.images.flatten(1).unique(dim=0)) == n
    assert not torch.equal(generate_stand_in(120, 40, seed=1)[0].images, first[0].images)
    assert not torch.equal(first[0].images[:40], first[1].images)


def test_cat_and_dog_are_the_hardest_to_tell_apart_in_the_stand_in():
    train, test = generate_stand_in(1200, 500)
    coarse = [F.avg_pool2d(part.images.float(), 4).flatten(1).numpy() for part in (train, test)]
    guesses = KNeighborsClassifier(5).fit(coarse[0], train.labels).predict(coarse[1])
    matrix = confusion_matrix(F.one_hot(torch.tensor(guesses), 10), test.labels)
    pairs = np.triu(matrix + matrix.T, k=1)
    assert pairs[CAT, DOG] >= 10
    assert pairs[CAT, DOG] > 2 * (pairs.sum() - pairs[CAT, DOG])
    assert matrix.trace() > 0.8 * 500  # and yet it can be learnt


# The real one


def test_constants_are_what_the_real_training_images_give(cifar10):
    for part, n in zip(cifar10, (50_000, 10_000), strict=True):
        assert part.labels.bincount().tolist() == [n // 10] * 10
    images = cifar10[0].images
    mean, std = data.channel_statistics(images)
    assert tuple(mean.round(4)) == data.CIFAR10_MEAN
    assert tuple(std.round(4)) == data.CIFAR10_STD
    own = torch.cat([chunk.flatten(2).double().std(2) for chunk in images.split(2000)])
    assert tuple((own.mean(0) / 255).numpy().round(4)) == data.PUBLISHED_STD


# Pictures of one's own


def test_a_picture_becomes_its_central_square_averaged_down(tmp_path):
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, :32], picture[:, 96:] = 255, 255  # cut off
    picture[:32, 32:96] = (200, 100, 50)
    Image.fromarray(picture).save(tmp_path / "a b.png")
    image = read_picture(tmp_path / "a b.png")
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert image[:, :16].flatten(1).unique(dim=1).flatten().tolist() == [200, 100, 50]
    assert image[:, 16:].max() == 0


def test_a_picture_is_turned_as_its_camera_says_and_transparency_is_white(tmp_path):
    picture = Image.new("RGB", (40, 40), "black")
    picture.paste("white", (0, 0, 40, 20))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: white comes to lie on the right
    picture.save(tmp_path / "turned.png", exif=exif)
    turned = read_picture(tmp_path / "turned.png")
    assert turned[:, :, 20:].min() == 255 and turned[:, :, :12].max() == 0
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").min() == 255


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("white", "black")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "x.gif").min() == 255


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_greys_of_16_bits_are_scaled_not_cut_off(tmp_path, suffix):
    ramp = np.tile(np.linspace(0, 65535, 32), (32, 1)).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{suffix}")
    image = read_picture(tmp_path / f"ramp.{suffix}")
    assert image[:, 0].tolist() == [np.linspace(0, 255, 32).round().tolist()] * 3


GREYS = np.tile(np.linspace(0, 1, 32), (32, 1))  # (32, 32), black to white
RAMP = np.linspace(0, 255, 32).round()


def tiff_of(values: np.ndarray, bits: int, **tags: int) -> bytes:
    """An uncompressed grey TIFF (32, 32) as a camera's or a scanner's program writes it."""
    numbers = {"width": 256, "height": 257, "bits": 258, "photometric": 262, "maximum": 281}
    numbers |= {"strip": 273, "rows": 278, "size": 279, "sample_format": 339}
    tags = {"width": 32, "height": 32, "bits": bits, "photometric": 1, "rows": 32} | tags
    pixels = values.tobytes()
    if bits == 12:  # two values in three bytes
        high, low = values.ravel()[::2].astype(int), values.ravel()[1::2].astype(int)
        triples = [high >> 4, (high & 15) << 4 | low >> 8, low & 255]
        pixels = np.stack(triples, 1).astype(np.uint8).tobytes()
    tags |= {"size": len(pixels), "strip": 8 + 2 + 12 * (len(tags) + 2) + 4}
    entries = sorted((numbers[name], value) for name, value in tags.items())
    directory = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + pixels


def png_of(values: np.ndarray, significant_bits: int | None = None) -> bytes:
    """A PNG of 16 bits per value, uint16 (H, W) or (H, W, 3), with or without a chunk sBIT."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    height, width, *colours = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if colours else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [chunk(b"IHDR", header)]
    if significant_bits:
        parts += [chunk(b"sBIT", bytes([significant_bits] * (3 if colours else 1)))]
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def greys(white: int, kind: type = np.uint16) -> np.ndarray:
    return (GREYS * white).round().astype(kind)


IN_COLOUR = np.repeat(greys(65535)[..., None], 3, axis=2)
DEPTHS = {
    "TIFF, 12 bits packed": tiff_of(greys(4095), 12),
    "TIFF, 12 bits in 16, maximum stated": tiff_of(greys(4095), 16, maximum=4095),
    "TIFF, 8 bits in 16, maximum stated": tiff_of(greys(255), 16, maximum=255),
    "TIFF, 16 bits": tiff_of(greys(65535), 16),
    "TIFF, 16 bits, white is zero": tiff_of(greys(65535)[:, ::-1], 16, photometric=0),
    "TIFF, 32 bits, maximum stated": tiff_of(greys(10**6, np.uint32), 32, maximum=10**6),
    "PNG, 12 bits in 16, stated": png_of(greys(4095), significant_bits=12),
    "PNG, 12 bits scaled to 16, stated": png_of(greys(4095) * 16 + greys(4095) // 256, 12),
    "PNG, 16 bits": png_of(greys(65535)),
    "PNG, 16 bits, colours": png_of(IN_COLOUR),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_a_picture_of_any_depth_is_scaled_by_what_its_file_says(tmp_path, name):
    (tmp_path / "ramp").write_bytes(DEPTHS[name])
    image = read_picture(tmp_path / "ramp")
    cut_off = 1 if "colours" in name else 0  # Pillow keeps the upper 8 of 16 bits of a colour
    assert np.abs(image[:, 7].numpy() - RAMP).max() <= cut_off


UNKNOWN_WHITE = {
    "TIFF, 8 bits in 16": (tiff_of(greys(255), 16), "up to 255, and says no maximum"),
    "TIFF, 12 bits in 16": (tiff_of(greys(4095), 16), "up to 4,095, and says no maximum"),
    "TIFF, 14 bits in 16": (tiff_of(greys(16383), 16), "up to 16,383, and says no maximum"),
    "TIFF, 32 bits": (tiff_of(greys(10**6, np.uint32), 32), "32 bits per value and says no"),
    "TIFF, 16 bits, signed": (tiff_of(greys(9999), 16, sample_format=2), "are signed numbers"),
    "TIFF, 8 bits, signed": (tiff_of(greys(99, np.int8), 8, sample_format=2), "signed numbers"),
    "TIFF, wrong maximum": (tiff_of(greys(9999), 16, maximum=255), "outside of 0 to 255"),
    "PNG, 8 bits in 16": (png_of(greys(255)), "up to 255, and says no maximum"),
    "PNG, 12 bits in 16": (png_of(greys(4095)), "up to 4,095, and says no maximum"),
    "PNG, 12 bits in 16, colours": (png_of(IN_COLOUR >> 4), "of 16 bits per value it uses only"),
    "PNG, 12 bits in 16, colours, stated": (png_of(IN_COLOUR >> 4, 12), "white is 4,095"),
}


@pytest.mark.parametrize("name", UNKNOWN_WHITE)
def test_values_of_unknown_brightness_are_refused(tmp_path, name):
    content, reason = UNKNOWN_WHITE[name]
    (tmp_path / "ramp").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_picture(tmp_path / "ramp")
    said = str(caught.value)
    assert reason in said and said.endswith("save it with 8 bits per value")


def test_a_black_picture_of_16_bits_is_black(tmp_path):
    (tmp_path / "night.png").write_bytes(png_of(greys(0)))
    assert read_picture(tmp_path / "night.png").max() == 0


def test_a_large_jpeg_is_decoded_scaled_down(tmp_path, monkeypatch):
    across, down = np.meshgrid(np.linspace(0, 255, 1200), np.linspace(0, 255, 800))
    picture = Image.fromarray(np.stack([across, down, 255 - across], 2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "phone.jpg"
    for progressive in (False, True):
        picture.save(path, quality=95, exif=exif, progressive=progressive)
        monkeypatch.setattr(data, "MAX_PIXELS", 10**6)
        whole = read_picture(path).int()
        monkeypatch.setattr(data, "MAX_PIXELS", 10**5)
        assert (read_picture(path).int() - whole).abs().max() <= 2
    scans = path.read_bytes().count(b"\xff\xda")
    for name, value, reason in (
        ("MAX_SCANS", scans - 1, f"1200 x 800 pixels in {scans} scans"),
        ("MAX_BUFFERED_PIXELS", 900_000, "1200 x 800 pixels, over 900,000"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(data, name, value)
            with pytest.raises(InputError, match=f"{reason}.*: scale it down$"):
                read_picture(path)
    picture.save(path)
    monkeypatch.setattr(data, "MAX_JPEG_PIXELS", 900_000)
    with pytest.raises(InputError, match="1200 x 800 pixels, over 900,000.*: scale it down$"):
        read_picture(path)


@pytest.mark.filterwarnings("error")
def test_what_is_no_picture_of_a_sane_size_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.jpg"

    def refused(reason: str, remedy: str = "give a file of one of PNG, JPEG") -> None:
        message = rf"^picture: [^\n]*{reason}[^\n]*: {remedy}[^\n]*$"
        with pytest.raises(InputError, match=message):
            read_picture(path)

    refused("No such file")
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    refused("truncated")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n{} loop\n"  # would be run
    for content in (b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", eps):
        path.write_bytes(content)
        refused("cannot identify image file\\)" if content == eps else "")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(path, format="TIFF")
    refused("its values are floating-point numbers", "save it with 8 bits per value")
    Image.new("1", (13_300, 13_300)).save(path, format="PNG")  # 22 kB
    refused("13300 x 13300 pixels, over 50,000,000", "scale it down")
    Image.new("1", (13_400, 13_400)).save(path, format="PNG")  # Pillow's own limit
    refused("exceeds limit of", "scale it down")
    path.unlink()
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(path)
        refused("no regular file")
