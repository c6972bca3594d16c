"""Pictures of one's own as CIFAR-10 images: of any size, depth and orientation."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cifar_lib import pictures
from cifar_lib.errors import InputError
from cifar_lib.pictures import read_picture

UPRIGHT_IS_CLOCKWISE = Image.Exif()
UPRIGHT_IS_CLOCKWISE[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise


def test_a_picture_becomes_its_central_square_averaged_down(tmp_path):
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, :32], picture[:, 96:] = 255, 255  # cut off
    picture[:32, 32:96] = (200, 100, 50)
    picture[32:34, 32:34, 0] = [[0, 40], [80, 120]]
    Image.fromarray(picture).save(tmp_path / "a b.png")
    image = read_picture(tmp_path / "a b.png")
    assert image[:, :16].flatten(1).unique(dim=1).flatten().tolist() == [200, 100, 50]
    assert image.shape == (3, 32, 32) and image[0, 16, 0] == 60 and image[:, 17:].max() == 0


def test_a_picture_is_turned_upright_on_white_and_an_animation_is_its_first_frame(tmp_path):
    picture = Image.new("RGB", (40, 40), "black")
    picture.paste("white", (0, 0, 40, 20))  # above, so that it comes to lie on the right
    picture.save(tmp_path / "turned.png", exif=UPRIGHT_IS_CLOCKWISE)
    turned = read_picture(tmp_path / "turned.png")
    assert turned[:, :, 20:].min() == 255 and turned[:, :, :12].max() == 0

    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").min() == 255
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("white", "black")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "x.gif").min() == 255


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
    stated = chunk(b"sBIT", bytes([significant_bits or 0] * (3 if colours else 1)))
    middle = chunk(b"gAMA", bytes(4)) + (stated if significant_bits else b"")
    pixels = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + pixels


RAMP = np.linspace(0, 255, 32)  # each row of the pictures below, black to white


def greys(white: int, kind: type = np.uint16) -> np.ndarray:
    return np.tile(RAMP / 255 * white, (32, 1)).round().astype(kind)


IN_COLOUR = np.repeat(greys(65535)[..., None], 3, axis=2)
# What a file says, how bright its brightest value comes out, and how far others may be from RAMP:
# of 16 bits of a colour Pillow keeps the upper 8.
DEPTHS = {
    "TIFF, 8 bits, dark": (tiff_of(greys(50, np.uint8), 8), 50, 0.5),
    "TIFF, 12 bits packed": (tiff_of(greys(4095), 12), 255, 0.5),
    "TIFF, 12 bits in 16, maximum": (tiff_of(greys(4095), 16, maximum=4095), 255, 0.5),
    "TIFF, 16 bits": (tiff_of(greys(65535), 16), 255, 0.5),
    "TIFF, 16, white is 0": (tiff_of(greys(65535)[:, ::-1], 16, photometric=0), 255, 0.5),
    "TIFF, 32, maximum": (tiff_of(greys(10**6, np.uint32), 32, maximum=10**6), 255, 0.5),
    "PNG, 12 bits in 16, stated": (png_of(greys(4095), 12), 255, 0.5),
    "PNG, 12 scaled to 16, stated": (png_of(greys(4095) * 16 + greys(4095) // 256, 12), 255, 0.5),
    "PNG, 16 bits": (png_of(greys(65535)), 255, 0.5),
    "PNG, 16 bits, just bright enough": (png_of(greys(16384)), 63.75, 0.5),
    "PNG, 16 bits, black": (png_of(greys(0)), 0, 0),
    "PNG, 16 bits, colours": (png_of(IN_COLOUR), 255, 1),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_a_picture_of_any_depth_is_scaled_by_what_its_file_says(tmp_path, name):
    content, brightest, rounding = DEPTHS[name]
    (tmp_path / "ramp").write_bytes(content)
    image = read_picture(tmp_path / "ramp")[:, 7].numpy()
    assert np.abs(image - RAMP * brightest / 255).max() <= rounding + 0.01


def saved(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def gif_of(side: int) -> bytes:
    """A small file that says of itself that it is that large."""
    small = saved(Image.new("L", (8, 8)), "GIF")
    return small[:6] + struct.pack("<HH", side, side) + small[10:]


SAVE, KINDS, SMALLER = "save it with 8 bits per value", "give a PNG, JPEG", "scale it down"
REFUSED = {
    # Nobody knows which value is white.
    "TIFF, 32 bits": (
        tiff_of(greys(10**6, np.uint32), 32),
        "32 bits per value, and doesn't say",
        SAVE,
    ),
    "TIFF, 8, signed": (tiff_of(greys(99, np.int8), 8, sample_format=2), "signed numbers", SAVE),
    "TIFF, floats": (saved(Image.new("F", (8, 8)), "TIFF"), "are floating-point numbers", SAVE),
    "TIFF, wrong maximum": (
        tiff_of(greys(9999), 16, maximum=255),
        "outside the range 0 to 255",
        SAVE,
    ),
    "TIFF, beyond int32": (
        tiff_of(greys(2**32 - 1, np.uint32), 32, maximum=2**32 - 1),
        "outside the range 0 to 4,294,967,295",
        SAVE,
    ),
    "PNG, 14 bits in 16": (png_of(greys(16383)), "none above 16,383, and doesn't say", SAVE),
    "PNG, 12 in 16, colours": (png_of(IN_COLOUR >> 4), "16 bits per value, but none above", SAVE),
    "PNG, 12 in 16, colours, stated": (png_of(IN_COLOUR >> 4, 12), "white is 4,095", SAVE),
    # These aren't pictures, or aren't whole. EPS would be run.
    "PNG's beginning": (b"\x89PNG\r\n\x1a\n", "", KINDS),
    "GIF's beginning": (b"GIF89a", "", KINDS),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify", KINDS),
    "half a JPEG": (saved(Image.effect_noise((64, 64), 50), "JPEG")[:999], "truncated", KINDS),
    # These would fill the memory; the second is over Pillow's own limit.
    "too large": (gif_of(13_300), "13300 x 13300 pixels, over 50,000,000", SMALLER),
    "far too large": (gif_of(13_400), "far more than 50,000,000 pixels", SMALLER),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_or_of_unknown_brightness_is_refused_in_one_line(tmp_path, name):
    content, reason, remedy = REFUSED[name]
    (tmp_path / "x.jpg").write_bytes(content)
    message = rf"^picture: .*x.jpg can't be read \((?!['(]).*{reason}.*\): .*{remedy}.*$"
    with pytest.raises(InputError, match=message) as caught:
        read_picture(tmp_path / "x.jpg")
    assert "<_io" not in str(caught.value)  # the buffer that Pillow can't identify


def test_a_large_jpeg_is_decoded_scaled_down_within_limits(tmp_path, monkeypatch):
    across, down = np.meshgrid(np.linspace(0, 255, 1200), np.linspace(0, 255, 800))
    picture = Image.fromarray(np.stack([across, down, 255 - across], 2).astype(np.uint8))
    plain, progressive = tmp_path / "plain.jpg", tmp_path / "progressive.jpg"
    for path in (plain, progressive):
        picture.save(path, exif=UPRIGHT_IS_CLOCKWISE, progressive=path == progressive)
    whole = [read_picture(path).int() for path in (plain, progressive)]
    monkeypatch.setattr(pictures, "MAX_PIXELS", 10**5)
    for path, expected in zip((plain, progressive), whole, strict=True):
        assert pictures._open_picture(path.read_bytes()).size == (150, 100)
        assert (read_picture(path).int() - expected).abs().max() <= 2

    scans = progressive.read_bytes().count(b"\xff\xda")
    too_many = rf"1200 x 800 pixels in {scans} scans, over {scans - 1}\): .*isn't progressive$"
    too_large = r"1200 x 800 pixels, over 959,999\): scale it down$"
    for path, limit, value, message in (
        (progressive, "MAX_SCANS", scans - 1, too_many),
        (progressive, "MAX_BUFFERED_PIXELS", 959_999, too_large),
        (plain, "MAX_JPEG_PIXELS", 959_999, too_large),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(pictures, limit, value + 1)
            read_picture(path)
            patch.setattr(pictures, limit, value)
            with pytest.raises(InputError, match=message):
                read_picture(path)
