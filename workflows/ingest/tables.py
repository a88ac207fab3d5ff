"""Labels and captions in a file beside the images: JSON, JSON lines, CSV, or a list of class names."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from workflows.ingest.files import Files, clean
from workflows.runtime.errors import UserError

PATHS = ("file_name", "filename", "path", "file", "image", "name", "key")
"""What the column of the images' names may be called."""
MAX_TABLE = 2**30
SUFFIXES = (".json", ".jsonl", ".csv", ".txt")


@dataclass(frozen=True)
class Table:
    """`values` by the image's path; none where the file only lists the `classes`. `name` is the file's, for errors."""

    name: str
    values: dict[str, str | int]
    classes: tuple[str, ...] = ()


def open_table(files: Files, where: str) -> tuple[str, bytes]:
    """(name below the source's root or address, content) of a file that the user names: within the source, or anywhere.

    Raises UserError when it isn't there, or is of no kind that can be read.
    """
    if not where.lower().endswith(SUFFIXES):
        raise UserError(f"{where} is no file of labels or captions", hint=f"they end in {' '.join(SUFFIXES)}")
    places = [(Files(where), "")] if "://" in where else [(files, where), (Files(where), "")]
    if "://" in where and where.partition("://")[0] == files.source.partition("://")[0]:
        places = [(Files(where, files.fs), "")]  # the same store, with the same options
    for place, name in places:
        path = f"{place.root.rstrip('/')}/{name}" if name else place.path
        try:
            if place.fs.isfile(path):
                if (place.fs.size(path) or 0) > MAX_TABLE:
                    raise UserError(f"{where} has more than {MAX_TABLE:,} bytes")
                return where, place.fs.cat_file(path)
        except PermissionError as error:
            raise UserError(f"{where} may not be read: permission denied") from error
    raise UserError(f"{where} is not there, neither below {files.source} nor by itself")


def parse_table(name: str, content: bytes, *, column: str | None, defaults: Sequence[str]) -> Table:
    """A file of values by path.

    JSON         {path: value}, [[path, value], ...], [{"file_name": path, column: value}, ...], {"labels": any of these,
                 "classes": [...]}, or ["class", ...]: the classes alone
    JSON lines   {"file_name": path, column: value} a line
    CSV          with a header that names a column of paths; or two columns without
    text         a class a line

    The column of values is `column`, else the first of `defaults` that there is, else the only other one. Raises UserError.
    """
    try:
        text = content.decode("utf-8-sig")
        if name.lower().endswith(".txt"):
            return Table(name, {}, _unique(name, [row.strip() for row in text.splitlines() if row.strip()]))
        if name.lower().endswith(".csv"):
            return Table(name, _by_path(name, _csv_rows(text), column, defaults))
        if name.lower().endswith(".jsonl"):
            rows = [json.loads(row) for row in text.splitlines() if row.strip()]
            return Table(name, _by_path(name, rows, column, defaults))
        return _json(name, json.loads(text), column, defaults)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, RecursionError) as error:
        raise UserError(f"{name} can't be read: {' '.join(str(error).split())[:120]}") from error


def _json(name: str, values: Any, column: str | None, defaults: Sequence[str]) -> Table:
    classes: tuple[str, ...] = ()
    if isinstance(values, dict) and ("labels" in values or "classes" in values) and _nested(values):
        classes = _unique(name, values.get("classes") or [])
        values = values.get("labels") or {}
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return Table(name, {}, _unique(name, values))
    if isinstance(values, dict):
        pairs: list[Any] = [list(pair) for pair in values.items()]
        return Table(name, _pairs(name, pairs), classes)
    if isinstance(values, list) and all(isinstance(value, dict) for value in values):
        return Table(name, _by_path(name, values, column, defaults), classes)
    if isinstance(values, list):
        return Table(name, _pairs(name, values), classes)
    raise UserError(f"{name}: an object or a list is expected, not {type(values).__name__}")


def _nested(values: dict[str, Any]) -> bool:
    """Whether `labels` and `classes` are sections, and not the names of images."""
    return all(value is None or isinstance(value, (dict, list)) for value in values.values())


def _csv_rows(text: str) -> list[Any]:
    csv.field_size_limit(MAX_TABLE)
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    header = [cell.strip() for cell in rows[0]] if rows else []
    if not any(cell in PATHS for cell in header) and len(header) == 2:
        return rows
    return [dict(zip(header, row, strict=False)) for row in rows[1:]]


def _by_path(name: str, rows: list[Any], column: str | None, defaults: Sequence[str]) -> dict[str, str | int]:
    if not rows:
        return {}
    if isinstance(rows[0], list):
        return _numbers(_pairs(name, rows))
    if not isinstance(rows[0], dict):
        raise UserError(f"{name}: rows with names are expected, such as file_name and {defaults[0]}")
    names = list(rows[0])
    path = next((key for key in PATHS if key in names and key != column), None)
    if path is None:
        raise UserError(f"{name}: no column of paths among {', '.join(names)}", hint=f"it is called {', '.join(PATHS)}")
    others = [key for key in names if key != path]
    wanted = column or next((key for key in defaults if key in others), others[0] if len(others) == 1 else None)
    if wanted is None or wanted not in others:
        said = f"no column {column}" if column else f"no column {' or '.join(defaults)}"
        raise UserError(f"{name}: {said}; there are {', '.join(others) or 'no others'}")
    values = _pairs(name, [[row.get(path), row.get(wanted)] for row in rows])
    return _numbers(values) if name.lower().endswith(".csv") else values


def _pairs(name: str, pairs: Iterable[Any]) -> dict[str, str | int]:
    out: dict[str, str | int] = {}
    for pair in pairs:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(f"{name}: a path and a value are expected, not {clean(str(pair))[:60]}")
        path, value = pair[0].strip().removeprefix("./").lstrip("/"), pair[1]
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise UserError(f"{name}: a name or a whole number is expected for {clean(path)}, not {value!r}")
        if path in out and out[path] != value:
            raise UserError(f"{name}: two values for {clean(path)}: {out[path]} and {value}")
        out[path] = value
    return out


def _numbers(values: dict[str, str | int]) -> dict[str, str | int]:
    """CSV doesn't tell numbers from names: numbers if all are."""
    if values and all(isinstance(value, str) and value.lstrip("-").isdecimal() for value in values.values()):
        return {path: int(value) for path, value in values.items()}
    return values


def _unique(name: str, classes: Iterable[Any]) -> tuple[str, ...]:
    found = tuple(classes)
    if not all(isinstance(value, str) for value in found):
        raise UserError(f"{name}: classes are names")
    twice = next((value for value, n in Counter(found).items() if n > 1), None)
    if twice is not None:
        raise UserError(f"{name}: the class {twice} is there twice")
    return found
