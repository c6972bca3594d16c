"""Reads a picture file of any common format as a CIFAR-10 image."""

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

# Pillow knows more formats, but not all of them are safe. For EPS, for example, it runs a program.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000  # in a picture: 200 MB once it is decoded
# A JPEG may have more pixels, such as the 108 million of some phones, because it can be decoded at
# an eighth of its width and height.
MAX_JPEG_PIXELS = 150_000_000
# A JPEG may spread its pixels over several scans (a progressive one does). Then the whole picture
# is held in memory, at 6 bytes per pixel, and each scan is a pass over all of it.
MAX_BUFFERED_PIXELS = 64_000_000
MAX_SCANS = 20
# The brightest value in a picture of 16 bits must be at least this high, a quarter of the range. If
# it is lower, the 8, 10, 12 or 14 bits of a camera or scanner were probably stored in 16 bits
# without being scaled up.
DIMMEST_16_BIT_WHITE = 1 << 14


class _Unusable(ValueError):
    """A picture that isn't damaged, but can't be used. Its `remedy` says what to do."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy


def read_picture(path: str | os.PathLike) -> Tensor:
    """Read a picture file and return it as a CIFAR-10 image, uint8 (3, 32, 32).

    The image is the picture's central square, scaled to 32x32 with anti-aliasing. Transparent
    pixels become white. An animation gives its first frame. Values of 12, 16 or 32 bits are scaled
    so that white becomes 255.

    Raises InputError if the file isn't a picture, if the picture is too large, or if it isn't clear
    which value is white.
    """
    remedy = f"give a file of one of {', '.join(PICTURE_FORMATS)}"
    # Pillow raises all kinds of errors for a broken file. Its warnings are suppressed, because the
    # error says the same.
    with explained(f"picture: {path} can't be read", remedy, Exception):
        content = read_regular(Path(path), 4 * MAX_PIXELS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = _decode(content)

    # Put the picture on white, and scale its central square to 32x32.
    background = Image.new("RGBA", picture.size, "white")
    opaque = Image.alpha_composite(background, picture).convert("RGB")
    square = ImageOps.fit(opaque, (32, 32), Image.Resampling.BOX)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)  # (32, 32, 3) -> (3, 32, 32)


def _decode(content: bytes) -> Image.Image:
    """Return the picture in a file's `content`: upright, RGBA, with 8 bits per value."""
    file = _open_picture(content)
    bits, white = _depth(file, content)
    picture = ImageOps.exif_transpose(file)  # upright, as the file says; this decodes it
    if bits > 8:
        picture = _in_8_bits(picture, file, bits, white)
    return picture.convert("RGBA")


def _open_picture(content: bytes) -> Image.Image:
    """Return the picture in a file's `content`, not yet decoded, if it isn't too large.

    A large JPEG will be decoded at an eighth of its width and height.

    Raises _Unusable if the picture is too large.
    """
    try:
        file = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
    except Image.DecompressionBombError as error:
        raise _Unusable(str(error), "scale it down") from error

    size = f"{file.width} x {file.height} pixels"
    pixels = file.width * file.height
    limit = MAX_PIXELS
    if isinstance(file, JpegImagePlugin.JpegImageFile) and pixels > MAX_PIXELS:
        buffered, scans = _scans(content, file.layers)
        limit = MAX_BUFFERED_PIXELS if buffered else MAX_JPEG_PIXELS
        if buffered and scans > MAX_SCANS:
            raise _Unusable(f"{size} in {scans} scans", "scale it down")
        file.draft(None, (file.width // 8, file.height // 8))  # the size to decode it at
    if pixels > limit:
        raise _Unusable(f"{size}, over {limit:,}", "scale it down")
    return file


def _scans(content: bytes, components: int) -> tuple[bool, int]:
    """Return whether a JPEG has several scans, so that it must be held whole, and how many.

    `components` is the number of its colour channels. If a phone has put further pictures into the
    file, behind this one, their scans are counted too.
    """
    # Two bytes for the start of the picture are followed by segments. Each consists of 0xFF, a byte
    # that says which kind of segment it is, two bytes for its length, and its data. Go through them
    # to the first scan, and look for a segment of a progressive frame.
    progressive = False
    place = 2
    while content[place + 1] != 0xDA:  # the start of a scan
        progressive |= content[place + 1] in (0xC2, 0xC6, 0xCA, 0xCE)  # a progressive frame
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")

    # A scan's data begin with the number of its components. If some are missing, more scans follow.
    buffered = progressive or content[place + 4] < components
    return buffered, content[place:].count(b"\xff\xda")


def _depth(file: Image.Image, content: bytes) -> tuple[int, int | None]:
    """Return how many bits a value has in the file, and which value is white.

    The second number is None if the file doesn't say it.

    Raises _Unusable if the values are signed or floating-point numbers.
    """
    if file.format == "PNG":
        bits = content[24]  # in the header, after width and height
        return bits, _white_of_significant_bits(content)
    if file.format == "TIFF":
        tags = file.tag_v2
        bits = max(tags.get(258, (1,)))  # BitsPerSample
        kinds = set(tags.get(339, (1,)))  # SampleFormat: 1 unsigned, 2 signed, 3 floating-point
        if kinds - {1}:
            kind = "floating-point" if 3 in kinds else "signed"
            raise _Unusable(f"its values are {kind} numbers", "save it with 8 bits per value")
        stated = max(tags.get(281, (0,)))  # MaxSampleValue
        # Values of 12 bits aren't scaled up in the file, so white is the largest of them, 2^12 - 1.
        return bits, stated or (4095 if bits == 12 else None)
    return 8, None


def _white_of_significant_bits(content: bytes) -> int | None:
    """Return the largest value of a PNG's significant bits, or None if their number isn't given.

    Its sBIT chunk says how many bits the values had before they were stored with more.
    """
    # A signature of 8 bytes is followed by chunks. Each has 4 bytes for the length of its data, 4
    # for its kind, the data, and 4 for a checksum. The pixels begin with the first IDAT chunk.
    place = 8
    while (kind := content[place + 4 : place + 8]) not in (b"", b"IDAT"):
        if kind == b"sBIT":
            return (1 << content[place + 8]) - 1
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    return None


def _in_8_bits(
    picture: Image.Image, file: Image.Image, bits: int, white: int | None
) -> Image.Image:
    """Return a `picture` of more than 8 bits per value, scaled so that `white` becomes 255.

    `file` is the file that it was read from. `bits` and `white` are the results of `_depth` for it.

    Raises _Unusable if it isn't clear which value is white.
    """
    remedy = "stretch it to the full range, or save it with 8 bits per value"

    # Find the largest value. Pillow reads all bits of grey values, but only 8 bits of colours.
    grey = picture.mode.startswith("I")
    if grey:
        values = np.asarray(picture)  # uint16 or int32 (H, W)
        largest = int(values.max())
    else:
        largest = 256 * max(picture.getchannel(c).getextrema()[1] for c in _colours(picture))

    # Find out which value is white. The values of a PNG with an sBIT chunk should be scaled up to
    # all bits, but some programs don't scale them. If a value is above sBIT's white, they must have
    # been scaled, so sBIT's white doesn't count.
    if file.format == "PNG" and white is not None and largest > white:
        white = None
    # If the white value is unknown, take the full range of 16 bits, unless that isn't plausible.
    if white is None:
        white = 65535
        if bits > 16:
            raise _Unusable(f"it has {bits} bits per value and says no maximum", remedy)
        if 0 < largest < DIMMEST_16_BIT_WHITE:
            what = f"of 16 bits per value it uses only those up to {largest:,}"
            raise _Unusable(f"{what}, and says no maximum", remedy)
    if largest > white or (grey and values.min() < 0):
        raise _Unusable(f"it has values outside of 0 to {white:,}, its maximum", remedy)

    # Of colours, Pillow has kept the upper 8 bits. They are right as they are if white is 65535.
    # If white is less, Pillow has dropped bits that count.
    if not grey:
        if white < 65535:
            raise _Unusable(f"its colours have {bits} bits, and white is {white:,}", remedy)
        return picture

    # Scale grey values. A TIFF may count from white to black.
    scaled = np.multiply(values, 255 / white, dtype=np.float32).round().astype(np.uint8)  # (H, W)
    white_is_zero = file.format == "TIFF" and file.tag_v2.get(262) == 0  # PhotometricInterpretation
    return Image.fromarray(255 - scaled if white_is_zero else scaled)


def _colours(picture: Image.Image) -> tuple[str, ...]:
    """Return the names of the picture's channels, without that of transparency."""
    return tuple(band for band in picture.getbands() if band not in "Aa")
