"""Text of files that anybody wrote: its encoding, and what a label or a caption is as a value."""

from __future__ import annotations

import codecs
import json
import math
import posixpath
import re
import unicodedata
from collections.abc import Collection, Iterable
from decimal import Decimal
from typing import Any

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.0*)?")
"""A whole number as programs write it: "001" is a name."""
VALUE = re.compile(r"[+-]?\d+(\.\d+)?")
BOX = re.compile(r"\d+(\s+-?\d+(\.\d+)?(e-?\d+)?){4,}")


class NotText(ValueError):
    """Why bytes are no text: one line."""


def text_of(content: bytes, what: str) -> str:
    """The text of a file: UTF-8, or what its byte order mark says, and without that mark. Raises NotText, which names `what`."""
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        byte, where = content[error.start : error.start + 1].hex(), 1 + content.count(b"\n", 0, error.start)
        raise NotText(f"{what} is no UTF-8 text (byte 0x{byte} in line {where})") from error


def json_of(content: bytes, what: str, *, once: bool = False) -> Any:
    """Raises NotText for what is no JSON either; if it shall be `once`, for a name with two values as well."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in found:
            if name in values and values[name] != value:
                raise NotText(f"{what} has two values for {name[:80]!r}")
            values[name] = value
        return values

    try:
        return json.loads(text_of(content, what), object_pairs_hook=pairs if once else None)
    except (json.JSONDecodeError, RecursionError) as error:
        raise NotText(f"{what} is no JSON ({' '.join(str(error).split())[:80]})") from error


def label_of(value: Any) -> str | int | None:
    """A label as a name or a whole number, None where there is none. Whole floats, bools, and lists of one are what they hold.

    Raises ValueError with what it is instead.
    """
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            raise ValueError(
                f"a list of {len(value)} values, such as one-hot or several classes; an image has one label"
            )
        return label_of(value[0]) if value else None
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    if isinstance(value, (bool, int)):
        return int(value)
    if isinstance(value, (float, Decimal)):
        if math.isnan(value):
            return None
        if math.isfinite(value) and value == int(value):
            return int(value)
    raise ValueError(f"{repr(value)[:40]}, which is neither a name nor a whole number")


def written_label(text: str) -> str | int | None:
    """As `label_of`, of text that doesn't tell numbers from names."""
    text = text.strip()
    return int(text.partition(".")[0]) if NUMBER.fullmatch(text) else text or None


def are_names(labels: Collection[str | int | None]) -> bool:
    """Whether different labels of a text are names: most of them are, or those that aren't belong to names such as "001", up to
    "100". A word among numbers is a mistake.
    """
    names = [label for label in labels if isinstance(label, str)]
    return bool(names) and (2 * len(names) > len(labels) or all(VALUE.fullmatch(name) for name in names))


def captions_of(value: Any) -> list[str]:
    """The captions that a value holds: none, one, or several. Raises ValueError for what is no text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, (list, tuple)):
        return [caption for one in value for caption in captions_of(one)]
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [str(value)]
    raise ValueError(f"{repr(value)[:40]}, which is no text")


def are_boxes(text: str) -> bool:
    """Whether a file beside an image tells where things are, as YOLO has it: lines of a class's number and at least four others."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return bool(lines) and all("." in line and BOX.fullmatch(line) for line in lines)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in the order of their numbers: those that are numbers by value, then the others by their letters."""

    def key(name: str) -> tuple[bool, float, str]:
        number = VALUE.fullmatch(name) is not None
        return not number, float(name) if number else 0.0, name

    return tuple(sorted(names, key=key))


def alike(name: str) -> str:
    """A path in the form in which the same one may be written elsewhere: composed accents, slashes, no spaces around, no "./"."""
    path = unicodedata.normalize("NFC", name).replace("\\", "/").strip()
    return posixpath.normpath(path).lstrip("/")
