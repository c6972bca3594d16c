"""Reads a picture file (PNG, JPEG, WebP, GIF, BMP or TIFF) as a CIFAR-10 image."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin
from torch import Tensor

from cifar_lib.errors import Unusable, explained
from cifar_lib.files import read_regular

# Pillow knows more formats, but not all of them are safe. For EPS, for example, it runs a program.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000  # in a picture: 200 MB once it is decoded
MAX_BYTES = 4 * MAX_PIXELS  # of a file: the largest picture, uncompressed, at 4 bytes per pixel
# A JPEG may have more pixels, such as the 108 million of some phones, because it can be decoded at
# an eighth of its width and height.
MAX_JPEG_PIXELS = 150_000_000
# A JPEG may spread its pixels over several scans (a progressive one does). Then the whole picture
# is held in memory, at 6 bytes per pixel, and each scan is a pass over all of it. These two limits
# are only for JPEGs of more than MAX_PIXELS.
MAX_BUFFERED_PIXELS = 64_000_000
MAX_SCANS = 20
# If a picture of 16 bits doesn't say which value is white, its brightest value must be at least
# this high, a quarter of the range (or 0). If it is lower, the 8, 10, 12 or 14 bits of a camera or
# scanner were probably stored in 16 bits without being scaled up.
DIMMEST_16_BIT_WHITE = 1 << 14


def read_picture(path: str | os.PathLike) -> Tensor:
    """Read a picture file and return it as a CIFAR-10 image, uint8 (3, 32, 32).

    The image is the picture's central square, scaled to 32x32 with anti-aliasing. Transparent
    pixels become white. An animation gives its first frame. Values of 12, 16 or 32 bits are scaled
    so that white becomes 255.

    Raises InputError if the file isn't a picture, if the picture is too large, or if its values
    can't be scaled to 8 bits reliably.
    """
    remedy = f"give a {', '.join(PICTURE_FORMATS[:-1])} or {PICTURE_FORMATS[-1]} file"
    # Pillow raises all kinds of errors for a broken file. Its warnings are suppressed: a picture is
    # either refused with an error, or good enough.
    with explained(f"picture: {path} can't be read", remedy, Exception):
        content = read_regular(Path(path), MAX_BYTES)
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
    opened = _open_picture(content)
    bits, white = _depth(opened, content)
    picture = ImageOps.exif_transpose(opened)  # upright, as the file says; this decodes it
    if bits > 8:
        picture = _in_8_bits(picture, opened, bits, white)
    return picture.convert("RGBA")


def _open_picture(content: bytes) -> Image.Image:
    """Return the picture in a file's `content`, not yet decoded, if it isn't too large.

    A large JPEG will be decoded at an eighth of its width and height.

    Raises Unusable if the picture is too large.
    """
    try:
        opened = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
    except Image.DecompressionBombError as error:
        raise Unusable(f"it has far more than {MAX_PIXELS:,} pixels", "scale it down") from error

    size = f"{opened.width} x {opened.height} pixels"
    pixels = opened.width * opened.height
    limit = MAX_PIXELS
    if isinstance(opened, JpegImagePlugin.JpegImageFile) and pixels > MAX_PIXELS:
        buffered, scans = _scans(content, opened.layers)
        limit = MAX_BUFFERED_PIXELS if buffered else MAX_JPEG_PIXELS
        if buffered and scans > MAX_SCANS:
            remedy = "scale it down, or save it as a JPEG that isn't progressive"
            raise Unusable(f"{size} in {scans} scans, over {MAX_SCANS}", remedy)
        opened.draft(None, (opened.width // 8, opened.height // 8))  # the size to decode it at
    if pixels > limit:
        raise Unusable(f"{size}, over {limit:,}", "scale it down")
    return opened


def _scans(content: bytes, components: int) -> tuple[bool, int]:
    """Return whether a JPEG has several scans, so that it must be held whole, and how many.

    `components` is the number of its colour channels. If a phone has put further pictures into the
    file after this one, their scans are counted too.
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


def _depth(opened: Image.Image, content: bytes) -> tuple[int, int | None]:
    """Return how many bits a value has in the file, and which value is white.

    The second number is None if the file doesn't say which.

    Raises Unusable if the values are signed or floating-point numbers.
    """
    if opened.format == "PNG":
        bits = content[24]  # in the header, after width and height
        return bits, _white_of_significant_bits(content)
    if opened.format == "TIFF":
        tags = opened.tag_v2
        bits = max(tags.get(258, (1,)))  # BitsPerSample
        kinds = set(tags.get(339, (1,)))  # SampleFormat: 1 unsigned, 2 signed, 3 floating-point
        if kinds - {1}:
            kind = "floating-point" if 3 in kinds else "signed"
            raise Unusable(f"its values are {kind} numbers", "save it with 8 bits per value")
        stated = max(tags.get(281, (0,)))  # MaxSampleValue
        # Values of 12 bits aren't scaled up in the file, so white is the largest of them, 2^12 - 1.
        return bits, stated or (4095 if bits == 12 else None)
    return 8, None


def _white_of_significant_bits(content: bytes) -> int | None:
    """Return the largest value that a PNG's significant bits can hold, or None if it doesn't say.

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
    picture: Image.Image, opened: Image.Image, bits: int, white: int | None
) -> Image.Image:
    """Convert `picture`, which has more than 8 bits per value, to 8 bits: `white` becomes 255.

    `opened` is the picture as Pillow opened it, with its file's format and tags. `bits` and `white`
    are the results of `_depth` for it.

    Raises Unusable if it isn't clear which value is white.
    """
    remedy = "stretch it to the full range, or save it with 8 bits per value"

    # Find the largest value. Pillow reads all bits of grey values without transparency, but only 8
    # bits of all others.
    grey = picture.mode.startswith("I")
    if grey:
        values = np.asarray(picture)  # uint16 or int32 (H, W)
        largest = int(values.max())
    else:
        largest = 256 * max(picture.getchannel(c).getextrema()[1] for c in _colours(picture))

    # Find out which value is white. The values of a PNG with an sBIT chunk should be scaled up to
    # all bits, but some programs don't scale them. If a value is above sBIT's white, they must have
    # been scaled, so sBIT's white doesn't count.
    if opened.format == "PNG" and white is not None and largest > white:
        white = None
    # If the white value is unknown, take the full range of 16 bits, unless that isn't plausible.
    if white is None:
        white = 65535
        if bits > 16:
            raise Unusable(f"it has {bits} bits per value, and doesn't say which is white", remedy)
        if 0 < largest < DIMMEST_16_BIT_WHITE:
            what = f"it has 16 bits per value, but none above {largest:,}"
            raise Unusable(f"{what}, and doesn't say which is white", remedy)
    if largest > white or (grey and values.min() < 0):
        raise Unusable(f"it has values outside the range 0 to {white:,}", remedy)

    # Of colours, Pillow has kept the upper 8 bits. They are right as they are if white is 65535.
    # If white is less, Pillow has dropped bits that count.
    if not grey:
        if white < 65535:
            raise Unusable(f"its colours have {bits} bits, and white is {white:,}", remedy)
        return picture

    # Scale grey values. A TIFF may count from white to black.
    scaled = np.multiply(values, 255 / white, dtype=np.float32).round().astype(np.uint8)  # (H, W)
    photometric_interpretation = 262
    white_is_zero = opened.format == "TIFF" and opened.tag_v2.get(photometric_interpretation) == 0
    return Image.fromarray(255 - scaled if white_is_zero else scaled)


def _colours(picture: Image.Image) -> tuple[str, ...]:
    """Return the names of the picture's channels, except that of transparency."""
    return tuple(band for band in picture.getbands() if band not in "Aa")
