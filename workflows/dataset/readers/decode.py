"""Decoder of image files into squares of pixels. A file that can't be used is refused with a one-line reason."""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np


def words(text: str) -> frozenset[str]:
    """Splits a list that is written as one text."""
    return frozenset(text.split())


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "PSD", "QOI")
"""Formats that Pillow tries whatever the name of the file: their first bytes identify them."""
BY_NAME = {
    **{f".{kind.lower()}": kind for kind in words("BLP CUR DCX DDS DIB GBR ICNS ICO MSP PCD PCX XBM XPM")},
    **dict.fromkeys((".bw", ".rgb", ".rgba", ".sgi"), "SGI"),
    **dict.fromkeys((".icb", ".tga", ".vda", ".vst"), "TGA"),
    **dict.fromkeys((".flc", ".fli"), "FLI"),
    **dict.fromkeys((".ftc", ".ftu"), "FTEX"),
    **{".pxr": "PIXAR", ".ras": "SUN"},
}
"""Suffix -> format, for formats whose first bytes do not identify them. They are tried by suffix only."""
SUFFIXES = words(
    """
    .apng .avif .avifs .bmp .gif .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx
    .pbm .pfm .pgm .png .pnm .ppm .psd .qoi .tif .tiff .webp
    """
).union(BY_NAME)
"""Suffixes of all formats that Pillow reads, without those that hold no pictures (FITS, GRIB, HDF5, BUFR, MPEG), that it is giving
up (IM), or that it hands to another program or library (EPS, WMF, FPX).
"""
STARTS = (
    re.compile(rb"\xff\xd8\xff"),
    re.compile(rb"\x89PNG\r\n\x1a\n"),
    re.compile(rb"GIF8[79]a"),
    re.compile(rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}", re.DOTALL),
    re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"),
    re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    re.compile(rb"P[1-6]\s+[\d#]"),
    re.compile(rb".{4}ftypavi[fs]", re.DOTALL),
    re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
    re.compile(rb"8BPS\x00\x01"),
    re.compile(rb"qoif"),
)
"""Patterns of the first bytes of FORMATS."""
START = 32
"""Bytes that the patterns need."""
MAX_BYTES = 256 * 2**20
"""Larger image files are not read."""
MAX_PIXELS = 89_478_485
"""The limit at which Pillow warns; here it is an error."""
MAX_SIDE = 65_500
MAX_ASPECT = 20
"""The largest ratio of the sides: above it, a central square shows nearly nothing of the image."""

# Too many pixels are an error here, so Pillow's warning would only repeat it.
warnings.filterwarnings("ignore", message="Image size .* exceeds limit of .* pixels")


class BadImage(ValueError):
    """The bytes can't be used as an image. The message is one line."""


def decode(
    image: bytes,
    *,
    size: int,
    channels: int,
    crop: Literal["center", "random"] = "center",
    rng_key: str = "",
    name: str = "",
) -> np.ndarray:
    """Decodes an image into uint8 [channels, size, size].

    Takes the first frame, turns it upright by its EXIF, lays it over white where it is transparent, converts it to RGB (3 channels)
    or grey (1), crops it to its largest square, and scales that by `square`. The square is in the centre, or (crop="random") at a
    place that depends only on `rng_key`. Smaller images are enlarged. Colour profiles are not applied.

    name: the file's name, because some formats are known only by suffix. Raises BadImage for bytes that are not an image, are
    truncated, or have more than 8 bits per channel, more than MAX_PIXELS, or extreme sides.
    """
    import numpy as np
    from PIL import ImageOps

    opened = _open(image, name)
    try:
        upright = _flat(ImageOps.exif_transpose(opened), channels)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        raise BadImage(_reason(error)) from error
    side = min(upright.size)
    left, top = _corner(upright.size, crop, rng_key)
    return np.ascontiguousarray(square(upright, size, (left, top, left + side, top + side)))


def square(image: Any, size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    """Scales a box (left, top, right, bottom) of a PIL image with antialiasing (Lanczos) to uint8 [c, size, size]."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3))
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def starts_as_image(start: bytes) -> bool:
    """Whether the first START bytes of a file are those of one of FORMATS."""
    return any(pattern.match(start) for pattern in STARTS)


def _open(image: bytes, name: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    if not image:
        raise BadImage("an empty file")
    if len(image) > MAX_BYTES:
        raise BadImage(f"a file of {len(image):,} bytes, more than {MAX_BYTES:,}")
    try:
        named = BY_NAME.get(os.path.splitext(name)[1].lower())
        opened = Image.open(io.BytesIO(image), formats=(*FORMATS, *([named] if named else [])))
    except UnidentifiedImageError as error:
        raise BadImage(_no_image(image)) from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels") from error
    except MemoryError:
        raise
    except Exception as error:  # a broken header
        raise BadImage(_reason(error)) from error
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height}: more than {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"{width}x{height}: a side of more than {MAX_SIDE:,} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height}: one side is more than {MAX_ASPECT} times the other")
    if _bits(opened, image) > 8 or opened.mode.startswith(("I", "F")):
        raise BadImage("more than 8 bits a channel (16-bit, or floating point): its range is not known")
    return opened


def _flat(image: Any, channels: int) -> Any:
    """Converts to RGB (3 channels) or grey, with transparent parts on white."""
    from PIL import Image

    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    return image.convert("RGB" if channels == 3 else "L")


def _corner(size: tuple[int, int], crop: str, key: str) -> tuple[int, int]:
    """Returns (left, top) of the square: central, or at a place that the key determines."""
    free = [n - min(size) for n in size]
    if crop == "center":
        return free[0] // 2, free[1] // 2
    assert crop == "random", crop
    share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    left, top = ((n + 1) * share >> 64 for n in free)
    return left, top


def _bits(opened: Any, image: bytes) -> int:
    """Returns the bits per channel from the header, because Pillow silently reduces 16 bits to 8. All other formats have 8."""
    if opened.format == "PNG":
        return image[24] if image[12:16] == b"IHDR" else 8
    if opened.format == "TIFF":
        return int(max(opened.tag_v2.get(258, (1,))))
    if opened.format == "PPM" and isinstance(opened.tile[0][3], tuple):  # (mode, largest value) if that isn't 255
        return int(opened.tile[0][3][-1]).bit_length()
    if opened.format == "JPEG2000":  # depths of the components, in the first segment of the stream (SIZ)
        siz = image[image.find(b"\xff\x4f\xff\x51") + 4 :]
        depths = siz[38 : 38 + 3 * int.from_bytes(siz[36:38], "big") : 3]
        return max(((depth & 127) + 1 for depth in depths), default=8)
    return 8 * image[3] if opened.format == "SGI" else 8


def _no_image(image: bytes) -> str:
    start = image[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"<head", b"<body")):
        return "not an image but HTML or XML"
    if start.startswith(b"version https://git-lfs"):
        return "not an image but a Git LFS pointer; `git lfs pull` downloads the image"
    return f"not an image that can be read ({', '.join(FORMATS)})"


def _reason(error: Exception) -> str:
    """Returns an error of Pillow as one line, without memory addresses."""
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the file", str(error) or type(error).__name__)
    return f"broken: {' '.join(text.split())[:160]}"
