"""Decoding of text and JSON, and conversion of values to labels and captions."""

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
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.0*)?")
"""A whole number as programs write it. "001" is not one, but a name."""
VALUE = re.compile(r"[+-]?\d+(\.\d+)?")
BOX = re.compile(r"\d+(\s+-?\d+(\.\d+)?(e-?\d+)?){4,}")


class NotText(ValueError):
    """The bytes are not the expected text or JSON. The message is one line."""


def text_of(content: bytes, what: str) -> str:
    """Decodes text as UTF-8, or as its byte order mark says; the mark is removed. Raises NotText, which names `what`."""
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        byte, where = content[error.start : error.start + 1].hex(), 1 + content.count(b"\n", 0, error.start)
        raise NotText(f"{what} is not UTF-8 text (byte 0x{byte} in line {where})") from error


def json_of(content: bytes, what: str, *, once: bool = False) -> Any:
    """Parses JSON. once: a name with two different values is an error. Raises NotText, which names `what`."""

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
        raise NotText(f"{what} is not JSON ({' '.join(str(error).split())[:80]})") from error


def label_of(value: Any) -> str | int | None:
    """Returns a label as a name or a whole number, or None if it is empty.

    Whole floats, bools and lists of one element are converted. Raises ValueError that describes any other value.
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
    """Like `label_of`, for text: a label is a number if it looks like one as programs write it (NUMBER)."""
    text = text.strip()
    return int(text.partition(".")[0]) if NUMBER.fullmatch(text) else text or None


def are_names(labels: Collection[str | int | None]) -> bool:
    """Whether distinct labels from text are all names, although some look like numbers.

    They are if most of them are names, or if the names are numerals such as "001", which make "100" a name as well. A word among
    numbers is a mistake of the source.
    """
    names = [label for label in labels if isinstance(label, str)]
    return bool(names) and (2 * len(names) > len(labels) or all(VALUE.fullmatch(name) for name in names))


def captions_of(value: Any) -> list[str]:
    """Returns the captions in a value: none, one, or several. Raises ValueError for a value that is not text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, (list, tuple)):
        return [caption for one in value for caption in captions_of(one)]
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [str(value)]
    raise ValueError(f"{repr(value)[:40]}, which is not text")


def are_boxes(text: str) -> bool:
    """Whether a sidecar file holds bounding boxes in the format of YOLO: lines of a class number and at least four coordinates."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return bool(lines) and all("." in line and BOX.fullmatch(line) for line in lines)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sorts class names into label order: names that are numbers first, by value, then the others alphabetically."""

    def key(name: str) -> tuple[bool, float, str]:
        number = VALUE.fullmatch(name) is not None
        return not number, float(name) if number else 0.0, name

    return tuple(sorted(names, key=key))


def normalised(name: str) -> str:
    """Normalises a path, so that different spellings compare equal: composed accents, slashes, no outer spaces, no "./"."""
    path = unicodedata.normalize("NFC", name).replace("\\", "/").strip()
    return posixpath.normpath(path).lstrip("/")
