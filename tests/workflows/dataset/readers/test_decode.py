"""From a file's bytes to a square of pixels, and what is refused on the way."""

import io
import struct
import zlib

import numpy as np
import pytest
from pictures import array, encoded
from PIL import Image, ImageOps

from workflows.dataset.readers.decode import BY_NAME, MAX_BYTES, START, SUFFIXES, BadImage, decode, starts_as_image


def formula(content, size, channels):
    """What a folder's images were made by before `decode` was there."""
    with Image.open(io.BytesIO(content)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = ((n - side) // 2 for n in image.size)
    box = (left, top, left + side, top + side)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3), np.float32) / 255
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("width", "height", "size"), [(40, 30, 8), (500, 400, 16), (7, 7, 16), (64, 64, 64)])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_bit_for_bit_the_former_formula(channels, width, height, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "JPEG"):
        content = encoded(array(1, width, height), kind, exif=exif)
        pixels = decode(content, size=size, channels=channels)
        assert pixels.dtype == np.uint8
        assert np.array_equal(np.asarray(pixels, np.float32) / 255, formula(content, size, channels))


def test_each_way_of_holding_colours():
    rgb = np.zeros((6, 6, 3), np.uint8) + np.array([200, 30, 90], np.uint8)
    image = Image.fromarray(rgb)
    whole = {
        "RGB": image,
        "P": image.quantize(4),
        "RGBA": image.convert("RGBA"),
        "1": Image.new("1", (6, 6), 1),
        "L": Image.new("L", (6, 6), 77),
    }
    expected = {"1": (255, 255, 255), "L": (77, 77, 77)}
    for mode, one in whole.items():
        pixels = decode(encoded(one), size=6, channels=3)
        assert np.array_equal(
            pixels, np.broadcast_to(np.reshape(expected.get(mode, (200, 30, 90)), (3, 1, 1)), (3, 6, 6))
        )
    grey = decode(encoded(image), size=6, channels=1)
    assert grey.shape == (1, 6, 6)
    assert grey[0, 0, 0] == round(0.299 * 200 + 0.587 * 30 + 0.114 * 90)
    cmyk = decode(encoded(image.convert("CMYK"), "JPEG", quality=100), size=6, channels=3)
    assert abs(cmyk.astype(int)[:, 3, 3] - [200, 30, 90]).max() < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_is_white(mode):
    alpha = np.zeros((4, 8), np.uint8)
    alpha[:, 2:4], alpha[:, 4:] = 128, 255
    black = np.zeros((4, 8), np.uint8)
    if mode in ("RGBA", "LA"):
        image = Image.fromarray(np.stack([black] * (3 if mode == "RGBA" else 1) + [alpha], -1), mode)
        left, middle, right = 255, 127, 0
        content = encoded(image)
    else:
        values = np.where(alpha == 255, 40, 7).astype(np.uint8)
        image = Image.fromarray(values) if mode != "RGB" else Image.fromarray(np.stack([values] * 3, -1))
        if mode == "P":
            image = image.convert("P")
        content = encoded(image, transparency=7 if mode != "RGB" else (7, 7, 7))
        left, middle, right = 255, 255, 40
    pixels = decode(content, size=4, channels=3)  # the central square: columns 2 to 5
    assert set(pixels[:, :, 0].ravel()) <= {middle, middle + 1}
    assert set(pixels[:, :, 3].ravel()) == {right}
    assert decode(content, size=4, channels=1)[0, 0, 3] == right
    assert left == 255


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode(content, size=5, channels=3)[:, 2, 2].tolist() == [255, 0, 0]


READ = {
    "AVIF": {"quality": 100},
    "JPEG2000": {},
    "QOI": {},
    "BMP": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "GIF": {},
}
BY_SUFFIX = {
    "TGA": ".tga",
    "ICO": ".ico",
    "PCX": ".PCX",
    "SGI": ".sgi",
    "DDS": ".dds",
    "DIB": ".dib",
    "PPM": ".pnm",
}


@pytest.mark.parametrize("kind", [*READ, *BY_SUFFIX])
def test_other_kinds_of_files_are_read(kind):
    """By their content, whatever they are called; those that have no mark of their own by their suffix."""
    image = Image.new("RGB", (16, 16), (200, 30, 90))
    content = encoded(image, kind, **READ.get(kind, {}))
    pixels = decode(content, size=4, channels=3, name=f"a{BY_SUFFIX.get(kind, '.jpg')}")
    assert abs(pixels.astype(int)[:, 1, 1] - [200, 30, 90]).max() < 4
    assert starts_as_image(content[:START]) == (kind in READ or kind == "PPM")


def test_every_suffix_of_pillow_is_known_or_left_out_on_purpose():
    from PIL import Image as pillow

    programs_or_no_pictures = {"EPS", "WMF", "FITS", "GRIB", "HDF5", "BUFR", "MPEG", "IPTC", "IM"}
    for suffix, kind in pillow.registered_extensions().items():
        if kind in pillow.OPEN and kind not in programs_or_no_pictures:
            assert suffix in SUFFIXES, (suffix, kind)
    assert {pillow.registered_extensions()[suffix] for suffix in BY_NAME} == set(BY_NAME.values())


@pytest.mark.parametrize(
    "text", [b"GIF is a format", b"BM is short for", b"P6 of the list", b"II. Part", b"{}", b"", b"RIFF WAVEfmt"]
)
def test_text_does_not_start_as_an_image(text):
    assert not starts_as_image(text)


def test_a_raw_photograph_or_heic_does_not_pass_for_an_image():
    assert not starts_as_image(b"\0\0\0\x18ftypheic" + bytes(20))
    with pytest.raises(BadImage, match="not an image that can be read"):
        decode(b"\0\0\0\x18ftypheic" + bytes(200), size=8, channels=3)


def test_a_random_square_is_the_keys_and_lies_anywhere():
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (20, 200, 3))
    for image in (ramp, ramp.transpose(1, 0, 2)):
        content = encoded(np.ascontiguousarray(image))

        def first(key, content=content):
            return int(decode(content, size=20, channels=3, crop="random", rng_key=key)[0, 0, 0])

        corners = [first(f"key {i}") for i in range(300)]
        assert corners == [first(f"key {i}") for i in range(300)]
        assert (min(corners) < 5, max(corners) > 175, max(corners) <= 180) == (True, True, True)
        assert np.mean(corners) == pytest.approx(90, abs=5 * 181 / np.sqrt(12 * 300))
    square = encoded(array(3, 9, 9))
    centre = decode(square, size=9, channels=3)
    assert np.array_equal(decode(square, size=9, channels=3, crop="random", rng_key="a"), centre)


def header_of(width, height):
    """A PNG of a few bytes that claims to be of this size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(b"\x00" * 100)), (b"IEND", b"")):
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


RGB16 = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\x00" + bytes(12) + b"\x00" + bytes(12))),
        (b"IEND", b""),
    )
)
RGB16_TIFF = (
    struct.pack("<2sHIH", b"II", 42, 8, 8)
    + b"".join(
        struct.pack("<HHII", tag, kind, count, value)
        for tag, kind, count, value in (
            (256, 3, 1, 2),
            (257, 3, 1, 2),
            (258, 3, 3, 110),
            (262, 3, 1, 2),
            (273, 4, 1, 116),
            (277, 3, 1, 3),
            (278, 3, 1, 2),
            (279, 4, 1, 24),
        )
    )
    + struct.pack("<I3H", 0, 16, 16, 16)
    + bytes(24)
)
JPEG = encoded(array(4, 64, 64), "JPEG")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"\x00" * 100, "not an image that can be read"),
        (b"  <!DOCTYPE html><html>404", "not an image but HTML or XML"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "not an image but a Git LFS pointer; `git lfs pull`",
        ),
        (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "not an image but HTML or XML"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read"),
        (JPEG[: len(JPEG) // 2], "broken: .*truncated"),
        (JPEG[:20], "broken|not an image"),
        (encoded(array(4, 64, 64))[:200], "broken: "),
        (encoded(array(4, 64, 64), "WEBP")[:100], "broken|not an image"),
        (encoded(array(4, 64, 64), "BMP")[:500], "broken: .*truncated"),
        (header_of(100_000, 100_000), "more than 89,478,485 pixels"),
        pytest.param(
            header_of(10_000, 9_000),
            "10000x9000: more than 89,478,485 pixels",
            marks=pytest.mark.filterwarnings("ignore:Image size"),
        ),
        (header_of(65_501, 1), "a side of more than 65,500 pixels"),
        (header_of(2100, 100), "2100x100: one side is more than 20 times the other"),
        (encoded(Image.fromarray(np.zeros((9, 9), np.uint16))), "more than 8 bits a channel"),
        (encoded(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), "more than 8 bits a channel"),
        (RGB16, "more than 8 bits a channel"),
        (RGB16_TIFF, "more than 8 bits a channel"),
        (b"P6 2 2 65535\n" + bytes(24), "more than 8 bits a channel"),
        (b"P6 2 2 1023\n" + bytes(24), "more than 8 bits a channel"),
        (b"P3 1 1 65535 1 2 3\n", "more than 8 bits a channel"),
        (encoded(Image.fromarray(np.zeros((9, 9), np.uint16)), "JPEG2000"), "more than 8 bits a channel"),
    ],
)
def test_what_is_no_image_is_refused_in_a_line(content, said):
    with pytest.raises(BadImage, match=said) as caught:
        decode(content, size=8, channels=3)
    assert "\n" not in str(caught.value)
    assert "at 0x" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "content", [b"P6 1 1 100\n\x32\x32\x32", b"P3 1 1 255 127 127 127\n", b"P6 1 1 255\n\x7f\x7f\x7f"]
)
def test_a_ppm_of_8_bits_or_fewer_is_read(content):
    assert abs(decode(content, size=1, channels=3).astype(int) - 127).max() <= 1


def test_bytes_that_are_too_many_are_not_looked_at(monkeypatch):
    monkeypatch.setattr("workflows.dataset.readers.decode.MAX_BYTES", 100)
    with pytest.raises(BadImage, match="bytes, more than 100"):
        decode(JPEG, size=8, channels=3)
    assert MAX_BYTES >= 2**26


def test_the_limit_of_pixels(recwarn, monkeypatch):
    large = header_of(13_500, 13_500)  # more than twice Pillow's limit, at which it refuses
    with pytest.raises(BadImage, match="more than 89,478,485 pixels"):
        decode(large, size=8, channels=1)
    monkeypatch.setattr("workflows.dataset.readers.decode.MAX_PIXELS", 1199)
    with pytest.raises(BadImage, match="40x30: more than 1,199 pixels"):
        decode(encoded(array(5, 40, 30)), size=8, channels=3)
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_decoder_gets_away_with_broken_bytes():
    """Any damage of any format is an image or a BadImage, never another error."""
    rng = np.random.default_rng(0)
    refused = 0
    for kind in ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "QOI"):
        whole = np.frombuffer(encoded(array(6, 24, 24), kind), np.uint8)
        for _ in range(60):
            content = whole.copy()
            content[rng.integers(0, len(content), 8)] = rng.integers(0, 256, 8)
            try:
                assert decode(content.tobytes(), size=8, channels=3).shape == (3, 8, 8)
            except BadImage:
                refused += 1
    assert refused > 50
