"""An image file's bytes -> a square of pixels. What can't be an image of ours is refused with a reason, in one line."""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "PSD", "QOI")
"""What Pillow may try, whatever the file is called: their first bytes tell them from anything else."""
BY_NAME = {
    ".blp": "BLP",
    ".bw": "SGI",
    ".cur": "CUR",
    ".dcx": "DCX",
    ".dds": "DDS",
    ".dib": "DIB",
    ".flc": "FLI",
    ".fli": "FLI",
    ".ftc": "FTEX",
    ".ftu": "FTEX",
    ".gbr": "GBR",
    ".icb": "TGA",
    ".icns": "ICNS",
    ".ico": "ICO",
    ".msp": "MSP",
    ".pcd": "PCD",
    ".pcx": "PCX",
    ".pxr": "PIXAR",
    ".ras": "SUN",
    ".rgb": "SGI",
    ".rgba": "SGI",
    ".sgi": "SGI",
    ".tga": "TGA",
    ".vda": "TGA",
    ".vst": "TGA",
    ".xbm": "XBM",
    ".xpm": "XPM",
}
"""Formats that other bytes may be taken for, by the suffixes by which alone they are known."""
SUFFIXES = (
    *(
        ".apng",
        ".avif",
        ".avifs",
        ".bmp",
        ".gif",
        ".j2c",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpc",
        ".jpe",
        ".jpeg",
        ".jpf",
        ".jpg",
    ),
    *(".jpx", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".tif", ".tiff", ".webp"),
    *BY_NAME,
)
"""Of all formats that Pillow reads, but for those that hold no pictures (FITS, GRIB, HDF5, BUFR, MPEG), that it gives up (IM), or
that it hands to another program or library (EPS, WMF, FPX).
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
"""The first bytes of FORMATS."""
START = 32
MAX_BYTES = 256 * 2**20
"""Of an image's file. Larger ones are not read."""
MAX_PIXELS = 89_478_485
"""Pillow's own limit, at which it warns; here it is an error."""
MAX_SIDE = 65_500
MAX_ASPECT = 20
"""The longer side over the shorter one, above which a central square shows nearly nothing of the image."""

# Pillow's warning of many pixels is an error here, and not told twice.
warnings.filterwarnings("ignore", message="Image size .* exceeds limit of .* pixels")


class BadImage(ValueError):
    """Why these bytes are not taken as an image: one line."""


def decode(
    image: bytes,
    *,
    size: int,
    channels: int,
    crop: Literal["center", "random"] = "center",
    rng_key: str = "",
    name: str = "",
) -> np.ndarray:
    """uint8 [channels, size, size]: the first frame, turned upright by its EXIF, over white where it is transparent, in RGB
    (3 channels) or grey (1), cut to its largest square, and scaled by `square`.

    The square lies in the centre, or (`random`) where `rng_key` puts it: the same key gives the same place. Smaller images are
    enlarged. Colour profiles are not applied. `name` is the file's, by whose suffix some formats are known. Raises BadImage for
    what is no image, cut off, of more than 8 bits a channel, of more than MAX_PIXELS, or of absurd sides.
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
    """The box of a PIL image, antialiased (Lanczos): uint8 [c, size, size]."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3))
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def starts_as_image(start: bytes) -> bool:
    """Whether a file whose first START bytes these are is one of FORMATS."""
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
    """In RGB or grey, without transparency."""
    from PIL import Image

    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    return image.convert("RGB" if channels == 3 else "L")


def _corner(size: tuple[int, int], crop: str, key: str) -> tuple[int, int]:
    """(left, top) of a largest square."""
    free = [n - min(size) for n in size]
    if crop == "center":
        return free[0] // 2, free[1] // 2
    assert crop == "random", crop
    share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    left, top = ((n + 1) * share >> 64 for n in free)
    return left, top


def _bits(opened: Any, image: bytes) -> int:
    """Bits a channel, of the header: Pillow cuts colours of 16 bits to 8 and doesn't say so. Other formats than these have 8."""
    if opened.format == "PNG":
        return image[24] if image[12:16] == b"IHDR" else 8
    if opened.format == "TIFF":
        return int(max(opened.tag_v2.get(258, (1,))))
    if opened.format == "PPM" and isinstance(
        opened.tile[0][3], tuple
    ):  # (mode, the largest value), where that isn't 255
        return int(opened.tile[0][3][-1]).bit_length()
    if opened.format == "JPEG2000":  # of the components in the stream's first segment, SIZ
        siz = image[image.find(b"\xff\x4f\xff\x51") + 4 :]
        depths = siz[38 : 38 + 3 * int.from_bytes(siz[36:38], "big") : 3]
        return max(((depth & 127) + 1 for depth in depths), default=8)
    return 8 * image[3] if opened.format == "SGI" else 8


def _no_image(image: bytes) -> str:
    start = image[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"<head", b"<body")):
        return "not an image but HTML or XML"
    if start.startswith(b"version https://git-lfs"):
        return "not an image but a pointer of Git LFS, in whose place `git lfs pull` puts it"
    return f"not an image that can be read ({', '.join(FORMATS)})"


def _reason(error: Exception) -> str:
    """An error of Pillow as one line, without addresses."""
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the file", str(error) or type(error).__name__)
    return f"broken: {' '.join(text.split())[:160]}"
