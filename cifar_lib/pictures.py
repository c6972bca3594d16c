"""A picture file of any kind as a CIFAR-10 image."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin
from torch import Tensor

from cifar_lib.errors import explained
from cifar_lib.files import read_regular

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # EPS, say, would run a program
MAX_PIXELS = 50_000_000  # of a picture: 200 MB once it is decoded
# JPEG can be decoded at an eighth of its size, so that it may be larger: a phone's 108 megapixels.
# One of several scans (progressive) is held whole, 6 bytes per pixel, and each scan goes over it.
MAX_JPEG_PIXELS, MAX_BUFFERED_PIXELS, MAX_SCANS = 150_000_000, 64_000_000, 20
# The brightest value of a picture of 16 bits is at least this: a quarter of the range. With less,
# 8, 10, 12 or 14 bits, as cameras and scanners give them, were put into 16 without being scaled.
DIMMEST_16_BIT_WHITE = 1 << 14


class _Unusable(ValueError):
    """A picture that is one, but can't be used; `remedy`: what to do."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy


def read_picture(path: str | os.PathLike) -> Tensor:
    """Return a picture file as a CIFAR-10 image, uint8 (3, 32, 32).

    It is the picture's central square, scaled down with anti-aliasing, on white; of an animation,
    its first frame. Values of 12, 16 or 32 bits are scaled by what the file says is white.

    Raises InputError for what isn't a picture, for one that is too large, and for values whose
    brightness isn't known.
    """
    remedy = f"give a file of one of {', '.join(PICTURE_FORMATS)}"
    # Whatever Pillow stumbles over in a broken file; the error says what its warnings do.
    with explained(f"picture: {path} can't be read", remedy, Exception):
        content = read_regular(Path(path), 4 * MAX_PIXELS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = _decode(content)

    # Transparent pixels become white, and the central square becomes 32x32.
    background = Image.new("RGBA", picture.size, "white")
    opaque = Image.alpha_composite(background, picture).convert("RGB")
    square = ImageOps.fit(opaque, (32, 32), Image.Resampling.BOX)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)  # (32, 32, 3) -> (3, 32, 32)


def _decode(content: bytes) -> Image.Image:
    """The picture upright, in 8 bits per value, RGBA."""
    file = _open_picture(content)
    bits, white = _depth(file, content)
    picture = ImageOps.exif_transpose(file)
    if bits > 8:
        picture = _in_8_bits(picture, file, bits, white)
    return picture.convert("RGBA")


def _open_picture(content: bytes) -> Image.Image:
    """The picture, not yet decoded; a large JPEG will be decoded at an eighth of its size."""
    try:
        file = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
    except Image.DecompressionBombError as error:
        raise _Unusable(str(error), "scale it down") from error
    size, pixels = f"{file.width} x {file.height} pixels", file.width * file.height
    limit = MAX_PIXELS
    if isinstance(file, JpegImagePlugin.JpegImageFile) and pixels > MAX_PIXELS:
        buffered, scans = _scans(content, file.layers)
        limit = MAX_BUFFERED_PIXELS if buffered else MAX_JPEG_PIXELS
        if buffered and scans > MAX_SCANS:
            raise _Unusable(f"{size} in {scans} scans", "scale it down")
        file.draft(None, (file.width // 8, file.height // 8))
    if pixels > limit:
        raise _Unusable(f"{size}, over {limit:,}", "scale it down")
    return file


def _scans(content: bytes, components: int) -> tuple[bool, int]:
    """Whether a JPEG must be held whole because its first scan isn't all of it, and its number of
    scans (pictures that a phone has put behind it are counted, too)."""
    progressive, place = False, 2
    while content[place + 1] != 0xDA:  # the start of a scan
        progressive |= content[place + 1] in (0xC2, 0xC6, 0xCA, 0xCE)  # start of a frame
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    buffered = progressive or content[place + 4] < components
    return buffered, content[place:].count(b"\xff\xda")


def _depth(file: Image.Image, content: bytes) -> tuple[int, int | None]:
    """The bits of a value in the file, and which value is white, if the file says so."""
    if file.format == "PNG":
        return content[24], _significant_bits(content)  # 24: in the header, behind the size
    if file.format == "TIFF":
        tags = file.tag_v2
        bits = max(tags.get(258, (1,)))  # BitsPerSample
        kinds = set(tags.get(339, (1,)))  # SampleFormat: 1 unsigned, 2 signed, 3 floating-point
        if kinds - {1}:
            kind = "floating-point" if 3 in kinds else "signed"
            raise _Unusable(f"its values are {kind} numbers", "save it with 8 bits per value")
        stated = max(tags.get(281, (0,)))  # MaxSampleValue
        return bits, stated or (4095 if bits == 12 else None)
    return 8, None


def _significant_bits(content: bytes) -> int | None:
    """White by a PNG's sBIT chunk, where that says that fewer bits count than are stored."""
    place = 8
    while (kind := content[place + 4 : place + 8]) not in (b"", b"IDAT"):
        if kind == b"sBIT":
            return (1 << content[place + 8]) - 1
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    return None


def _in_8_bits(
    picture: Image.Image, file: Image.Image, bits: int, white: int | None
) -> Image.Image:
    """The picture of a file of more than 8 bits per value, scaled so that `white` becomes 255."""
    remedy = "stretch it to the full range, or save it with 8 bits per value"
    grey = picture.mode.startswith("I")
    if grey:
        values = np.asarray(picture)  # uint16 or int32 (H, W)
        largest = int(values.max())
    else:  # of colours Pillow has kept the upper 8 bits
        largest = 256 * max(picture.getchannel(c).getextrema()[1] for c in _colours(picture))

    # PNG's sBIT leaves room for both: it asks for scaled values, and some programs don't scale.
    if file.format == "PNG" and white is not None and largest > white:
        white = None
    if white is None:
        white = 65535
        if bits > 16:
            raise _Unusable(f"it has {bits} bits per value and says no maximum", remedy)
        if 0 < largest < DIMMEST_16_BIT_WHITE:
            what = f"of 16 bits per value it uses only those up to {largest:,}"
            raise _Unusable(f"{what}, and says no maximum", remedy)
    if largest > white or (grey and values.min() < 0):
        raise _Unusable(f"it has values outside of 0 to {white:,}, its maximum", remedy)
    if not grey:
        if white < 65535:
            raise _Unusable(f"its colours have {bits} bits, and white is {white:,}", remedy)
        return picture

    scaled = np.multiply(values, 255 / white, dtype=np.float32).round().astype(np.uint8)
    white_is_zero = file.format == "TIFF" and file.tag_v2.get(262) == 0  # the photometric tag
    return Image.fromarray(255 - scaled if white_is_zero else scaled)


def _colours(picture: Image.Image) -> tuple[str, ...]:
    return tuple(band for band in picture.getbands() if band not in "Aa")
