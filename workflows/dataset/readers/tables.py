"""Parser of files of labels, captions or class names: JSON, JSON lines, CSV, TSV, or a text file with a class per line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workflows.dataset.readers.files import Files, clean
from workflows.dataset.readers.text import NUMBER, NotText, captions_of, json_of, label_of, text_of, written_label
from workflows.errors import UserError

PATHS = ("file_name", "filename", "path", "file", "image", "name", "key")
"""Names that the column of image paths may have."""
MAX_TABLE = 2**30
"""The largest file that is read, in bytes."""
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt")
MISSING = ("nan", "NaN", "NA", "<NA>", "null", "NULL", "None")
"""What programs write for a missing number."""
MOST_NAMES = 20
"""The largest number of column names that an error lists."""
DELIMITERS = ",;\t|"
What = Literal["label", "caption"]
Value = str | int | None
"""A label or a caption; None if it is empty."""


@dataclass(frozen=True)
class Table:
    """A parsed file.

    name      of the file, for errors
    values    the label or caption by image path, None if it is empty; {} if the file only lists classes
    classes   the class list, if the file has one
    further   number of captions beyond the first of an image
    """

    name: str
    values: dict[str, Value]
    classes: tuple[str, ...] = ()
    further: int = 0


def open_table(files: Files, where: str) -> tuple[str, bytes]:
    """Finds and reads a file that the user names: below the root of the source, or at a separate path or address.

    Returns (name, content). Raises UserError if it does not exist, can't be read, is too large, or has another suffix.
    """
    if not where.lower().endswith(SUFFIXES):
        raise UserError(f"{where} is not a file of labels or captions", hint=f"such files end in {' '.join(SUFFIXES)}")
    places = [(Files(where), "")] if "://" in where else [(files, where), (Files(where), "")]
    if "://" in where and where.partition("://")[0] == files.source.partition("://")[0]:
        places = [(Files(where, files.fs), "")]  # the same store: use the same file system options
    for place, name in places:
        path = f"{place.root.rstrip('/')}/{name}" if name else place.path
        try:
            if place.fs.isfile(path):
                if (place.fs.size(path) or 0) > MAX_TABLE:
                    raise UserError(f"{where} has more than {MAX_TABLE:,} bytes")
                return where, place.fs.cat_file(path)
        except PermissionError as error:
            raise UserError(f"{where} can't be read: permission denied") from error
    raise UserError(f"{where} does not exist, neither below {files.source} nor as a path of its own")


def parse_table(
    name: str, content: bytes, *, column: str | None, defaults: Sequence[str], what: What = "label"
) -> Table:
    """Parses a file of labels or captions by image path. The format depends on the suffix of `name`.

    JSON         {path: value}, [[path, value], ...], [{"file_name": path, column: value}, ...],
                 {"labels": any of these, "classes": [...]}, or ["class", ...]: only the classes
    JSON lines   {"file_name": path, column: value} per line
    CSV, TSV     with a header that names a column of paths, or two columns without a header; ; and | also separate cells
    text         a class per line

    The values are in `column`; without it, in the first of `defaults` that exists, else in the only other column. Labels become
    names or whole numbers. Captions are kept as they are; if an image has several, the first is used.

    Raises UserError for a file that can't be parsed, has no such column, or has two labels for an image.
    """
    low = name.lower()
    try:
        if low.endswith(".json"):
            pairs, classes = _of_json(name, json_of(content, "it", once=True), column, defaults)
            return _table(name, pairs, classes, what)
        text = text_of(content, "it")
        if low.endswith(".txt"):
            return Table(name, {}, _unique(name, [row.strip() for row in text.split("\n") if row.strip()]))
        rows, written = (_csv_rows(text), True) if low.endswith((".csv", ".tsv")) else (_json_rows(text), False)
        return _table(name, _of_rows(name, rows, column, defaults), (), what, written=written)
    except (NotText, csv.Error) as error:
        raise UserError(f"{name} can't be read: {' '.join(str(error).split())[:160]}") from error


def columns_in(name: str, content: bytes) -> list[str]:
    """Returns the column names of a CSV or JSON lines file, without those of path columns. Raises UserError if it can't be read."""
    try:
        text = text_of(content, name)
        rows = _csv_rows(text) if name.lower().endswith((".csv", ".tsv")) else _json_rows(text)
    except (NotText, csv.Error) as error:
        raise UserError(f"{name} can't be read: {' '.join(str(error).split())[:160]}") from error
    found = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    return [key for key in found if key not in PATHS]


def _of_json(name: str, values: Any, column: str | None, defaults: Sequence[str]) -> tuple[list[Any], tuple[str, ...]]:
    """Returns the (path, value) pairs and the class list of a JSON file."""
    classes: tuple[str, ...] = ()
    if isinstance(values, dict) and ("labels" in values or "classes" in values) and _nested(values):
        classes = _unique(name, values.get("classes") or [])
        values = values.get("labels") or {}
    if isinstance(values, dict):
        return list(values.items()), classes
    if not isinstance(values, list):
        raise UserError(f"{name}: an object or a list is expected, not {type(values).__name__}")
    if values and all(isinstance(value, str) for value in values):
        return [], _unique(name, values)
    return _of_rows(name, values, column, defaults) if all(isinstance(v, dict) for v in values) else values, classes


def _of_rows(name: str, rows: list[Any], column: str | None, defaults: Sequence[str]) -> list[Any]:
    """Returns the (path, value) pairs of rows, which are such pairs or objects."""
    if not rows or isinstance(rows[0], list):
        return rows
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{name}: rows must be objects with fields such as file_name and {defaults[0]}")
    names = list(dict.fromkeys(key for row in rows for key in row))
    path = next((key for key in PATHS if key in names and key != column), None)
    if path is None:
        hint = f"its name must be one of {', '.join(PATHS)}"
        raise UserError(f"{name}: no column of paths among {_few(names)}", hint=hint)
    others = [key for key in names if key != path]
    usual = next((key for key in defaults if key in others), others[0] if len(others) == 1 else None)
    wanted = column or usual
    if wanted is None or wanted not in others:
        missing = column or " or ".join(defaults)
        raise UserError(f"{name}: no column {missing}; there are {_few(others) or 'no others'}")
    return [[row.get(path), row.get(wanted)] for row in rows]


def _table(name: str, pairs: list[Any], classes: tuple[str, ...], what: What, *, written: bool = False) -> Table:
    """Makes the table of (path, value) pairs. written: values are text, so labels are numbers only if all look like numbers."""
    is_text = written and what == "label"
    texts = [pair[1] for pair in pairs if is_text and len(pair) == 2 and pair[1] and pair[1].strip() not in MISSING]
    numbers = bool(texts) and all(NUMBER.fullmatch(text.strip()) for text in texts)
    out: dict[str, Value] = {}
    further = 0
    for pair in pairs:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(f"{name}: a path and a value are expected, not {clean(str(pair))[:60]}")
        path, value = pair
        if is_text and value:
            value = _written(value.strip(), numbers=numbers)
        try:
            values = [label_of(value)] if what == "label" else captions_of(value)
        except ValueError as error:
            expected = "a name or a whole number" if what == "label" else "a text"
            raise UserError(f"{name}: {expected} is expected for {clean(path)}, not {error}") from error
        value = values[0] if values else None
        if what == "caption":
            before = out.get(path)
            further += len(values) - (before is None and bool(values))
            value = value if before is None else before
        elif path in out and out[path] != value:
            raise UserError(f"{name}: two values for {clean(path)}: {out[path]} and {value}")
        out[path] = value
    return Table(name, out, classes, further)


def _written(text: str, *, numbers: bool) -> Value:
    """Converts the text of a CSV cell to a label. -1 means no label, even if the other labels are names."""
    if numbers:
        return None if text in MISSING else written_label(text)
    return None if text == "-1" else text


def _few(names: Sequence[str]) -> str:
    """The first MOST_NAMES names as text. There may be one for each image, if paths are the keys."""
    return clean(", ".join(names[:MOST_NAMES])) + (
        f", and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    )


def _nested(values: dict[str, Any]) -> bool:
    """Whether the keys `labels` and `classes` are sections of the file rather than names of images."""
    return all(value is None or isinstance(value, (dict, list)) for value in values.values())


def _json_rows(text: str) -> list[Any]:
    """Parses JSON lines. Only a line feed ends a line, as strings may contain the other line separators of Unicode."""
    rows = []
    for number, row in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(row)] if row.strip() else []
        except (json.JSONDecodeError, RecursionError) as error:
            raise NotText(f"line {number} is not JSON ({error})") from error
    return rows


def _csv_rows(text: str) -> list[Any]:
    """Returns lists of cells, or dicts if there is a header. Raises NotText for an unclosed quote, or more cells than columns."""
    csv.field_size_limit(MAX_TABLE)
    mark = _delimiter(re.split(r"[\r\n]", text, maxsplit=1)[0])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    try:
        lines = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise NotText(
            f"line {reader.line_num}: put the cell in quotes, and double a quote inside it ({error})"
        ) from error
    header = [cell.strip() for cell in lines[0][1]] if lines else []
    named = any(cell in PATHS for cell in header)
    if not named and len(header) == 2:
        return [row for _, row in lines]
    for number, row in lines[1:]:
        if named and any(cell.strip() for cell in row[len(header) :]):
            counts = f"line {number} has {len(row)} cells, but the first line has {len(header)}"
            raise NotText(f"{counts}: put a text that contains {mark!r} in quotes")
    return [dict(zip(header, row, strict=False)) for _, row in lines[1:]]


def _delimiter(head: str) -> str:
    """Returns the first delimiter that gives a column named as in PATHS, else the first that gives two cells, else a comma."""
    cells = {mark: [cell.strip() for cell in next(csv.reader([head], delimiter=mark), [])] for mark in DELIMITERS}
    named = [mark for mark in DELIMITERS if len(cells[mark]) > 1 and set(cells[mark]) & set(PATHS)]
    return next(iter([*named, *(mark for mark in DELIMITERS if len(cells[mark]) == 2)]), ",")


def _unique(name: str, classes: Iterable[Any]) -> tuple[str, ...]:
    found = tuple(classes)
    if not all(isinstance(value, str) for value in found):
        raise UserError(f"{name}: classes must be names")
    twice = next((value for value, n in Counter(found).items() if n > 1), None)
    if twice is not None:
        raise UserError(f"{name}: the class {twice} is listed twice")
    return found
