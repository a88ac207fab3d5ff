"""Columns of Parquet and Arrow tables: finding those of images, labels and captions, and turning rows into items."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workflows.dataset.readers.decode import MAX_BYTES
from workflows.dataset.readers.files import Files, clean
from workflows.dataset.readers.image_files import first_caption
from workflows.dataset.readers.labels import MOST_CLASSES, label_table
from workflows.dataset.readers.listing import Item, Listing
from workflows.dataset.readers.sidecars import CAPTIONS, LABELS, Ask
from workflows.dataset.readers.text import captions_of, label_of
from workflows.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES = ("image", "img", "jpg", "png", "webp", "image_bytes", "bytes", "content")
"""Usual names of an image column, by priority."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read. classes: class names of the label column, if known. others: unused columns."""

    image: str
    label: str | None
    caption: str | None
    classes: tuple[str, ...]
    described: bool
    """Whether the schema has the features of Hugging Face in its metadata."""
    others: tuple[str, ...] = ()

    def read(self) -> list[str]:
        """Returns the names of the columns that are read."""
        return [name for name in (self.image, self.label, self.caption) if name]


def columns_of(where: str, schema: pa.Schema, ask: Ask, names: dict[str, tuple[str, ...]]) -> Columns:
    """Chooses the columns: those that the user named, else by Hugging Face's features in the schema, else by their usual names.

    where: the file, for errors. names: class names by column, from files next to the table. Raises UserError if a column is
    missing, ambiguous or of a wrong type.
    """
    features = features_of(schema)
    for option, name in (("image", ask.image_column), ("label", ask.label_column), ("caption", ask.caption_column)):
        if name is not None and name not in schema.names:
            raise UserError(f"{where}: no column {name} for {option}s; there are {_shown(schema)}")
    names = names | _class_names(schema)
    label = None if ask.labels == "none" else ask.label_column or _label(schema, names)
    texts = [name for name in CAPTIONS if name in schema.names and kind_of(schema.field(name).type) == "text"]
    caption = None if ask.captions == "none" else ask.caption_column or next((n for n in texts if n != label), None)
    if caption is not None and kind_of(schema.field(caption).type) != "text":
        raise UserError(f"{where}: column {caption} is {schema.field(caption).type}, not text")
    image = ask.image_column or _image(where, schema, features)
    if kind_of(schema.field(image).type) != "bytes":
        kind = str(schema.field(image).type)[:60]
        raise UserError(f"{where}: column {image} is {kind}; the bytes of an image file are expected")
    if label is not None and kind_of(schema.field(label).type) not in ("text", "number"):
        raise UserError(f"{where}: column {label} is {schema.field(label).type}; labels must be names or whole numbers")
    classes = names.get(label, ()) if label else ()
    others = tuple(name for name in schema.names if name not in (image, label, caption))
    return Columns(image, label, caption, classes, bool(features), others)


def find_columns(
    files: Files, schemas: Sequence[tuple[str, pa.Schema]], ask: Ask, names: dict[str, tuple[str, ...]]
) -> tuple[Columns, bytes]:
    """Returns (the columns of files with these schemas, given as (name, schema); the content of the file that the user named for
    labels). The class list in that file takes precedence over that of the source.

    Raises UserError as `columns_of` does, for files that differ, or if the options do not fit tables.
    """
    columns = columns_of(clean(schemas[0][0]), merged(schemas), ask, names)
    _check_same(schemas, columns)
    if ask.labels == "folders":
        raise UserError("labels by folder are for images in folders; these are in tables", hint="name a label column")
    table, content = label_table(files, ask)
    if table is not None and table.values:
        raise UserError(
            f"{table.name}: labels by path are for images that have names; these are in tables",
            hint="a column of labels, or a file that lists the classes alone",
        )
    classes = table.classes if table else ()
    if classes and columns.label is None:
        raise UserError(f"{files.source}: a class list is given, but there is no label column", hint="--label-column")
    if classes and columns.classes and len(classes) != len(columns.classes):
        own = f"the source's column {columns.label} has {len(columns.classes):,}"
        raise UserError(f"{ask.labels} lists {len(classes):,} classes, but {own}")
    return replace(columns, classes=classes or columns.classes), content


def features_of(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Returns Hugging Face's features by column from the metadata of a schema; {} if there are none."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def merged(schemas: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """Merges the schemas of files, given as (name, schema). A column gets its type from the first file where it is not empty."""
    import pyarrow as pa
    import pyarrow.types as t

    fields: dict[str, Any] = {}
    for _, schema in schemas:
        for field in schema:
            if field.name not in fields or t.is_null(fields[field.name].type):
                fields[field.name] = field
    described = next((schema for _, schema in schemas if features_of(schema)), schemas[0][1])
    return pa.schema(fields.values(), metadata=described.metadata)


def _check_same(schemas: Sequence[tuple[str, pa.Schema]], columns: Columns) -> None:
    """Raises UserError if a column that is read is missing in a file, or if its kind or its class names differ between files.

    Types of one kind may differ in width. An empty column matches any kind.
    """
    for column in columns.read():
        first: tuple[str, Any] | None = None
        having = next(name for name, schema in schemas if column in schema.names)
        hint = {columns.label: "--labels none", columns.caption: "--captions none"}.get(column, "")
        for name, schema in schemas:
            if column not in schema.names:
                raise UserError(f"{clean(name)} has no column {column}, which {clean(having)} has", hint=hint)
            if schema.names.count(column) > 1:
                raise UserError(f"{clean(name)} has the column {column} twice", hint=hint)
            type_ = schema.field(column).type
            if kind_of(type_) == "null":
                continue
            first = first or (name, type_)
            if kind_of(type_) != kind_of(first[1]):
                types = f"{str(type_)[:60]} in {clean(name)} and {str(first[1])[:60]} in {clean(first[0])}"
                raise UserError(f"column {column} is {types}")
    named = [(name, found) for name, schema in schemas if (found := _class_names(schema).get(columns.label or ""))]
    other = next((pair for pair in named if pair[1] != named[0][1]), None)
    if other:
        shown = " and ".join(f"{', '.join(found[:3])} in {clean(name)}" for name, found in (named[0], other))
        raise UserError(
            f"the class names of column {columns.label} differ between the files, such as {shown}", hint="--labels none"
        )


def _class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Returns the class names by column, from the metadata of the schema."""
    features = features_of(schema).items()
    return {name: tuple(f["names"]) for name, f in features if f.get("_type") == "ClassLabel" and "names" in f}


def kind_of(type_: Any) -> str:
    """Returns the kind of a type, whatever its width: null, bytes, text, number, or the type itself.

    Bytes may be Hugging Face's struct {bytes, path}. Text and numbers may be in a dictionary or a list, as a label may be a list of
    one element. Floats and decimals can hold whole numbers, so their values decide whether they are labels.
    """
    import pyarrow.types as t

    if t.is_struct(type_) and type_.get_field_index("bytes") >= 0 and kind_of(type_.field("bytes").type) == "bytes":
        return "bytes"
    if t.is_binary(type_) or t.is_large_binary(type_) or t.is_binary_view(type_):
        return "bytes"
    if t.is_null(type_):
        return "null"
    value = type_
    while t.is_dictionary(value) or t.is_list(value) or t.is_large_list(value) or t.is_fixed_size_list(value):
        value = value.value_type
    if t.is_string(value) or t.is_large_string(value) or t.is_string_view(value):
        return "text"
    if t.is_integer(value) or t.is_floating(value) or t.is_boolean(value) or t.is_decimal(value):
        return "number"
    return str(type_)


def items(
    batch: pa.RecordBatch, rows: Sequence[int], keys: Sequence[str], listing: Listing, files: Files
) -> Iterator[Item]:
    """Yields an item for each of these rows of a batch."""
    of = {name: i for i, name in enumerate(listing.classes)}
    image, label, caption = (
        None if name is None else batch.column(name)
        for name in (listing.image_column, listing.label_column, listing.caption_column)
    )
    for row, key in zip(rows, keys, strict=True):
        content = _content(image, row)
        error = content if isinstance(content, str) else None
        number: int | None = None
        texts: list[str] = []
        try:
            number = None if label is None else label_number(label[row].as_py(), of, listing)
            texts = [] if caption is None else captions_of(caption[row].as_py())
        except ValueError as wrong:
            error = error or str(wrong)
        known = content if isinstance(content, bytes) and error is None else None
        yield Item(key, known, number, first_caption(texts, files), error)


def label_number(value: Any, of: dict[str, int], listing: Listing) -> int | None:
    """Returns the class number of a label, or None if it is empty or -1. of: numbers by class name.

    Raises ValueError, for the error of the item, if the label is not valid or not in the class list.
    """
    try:
        label = label_of(value)
    except ValueError as error:
        raise ValueError(f"its label is {error}") from error
    if label is None or label == -1:
        return None
    if isinstance(label, str) or listing.label_names:
        label = str(label)
        if label not in of:
            raise ValueError(f"label {clean(label)[:60]} is not in the class list")
        return of[label]
    if listing.classes and not 0 <= label < len(listing.classes):
        raise ValueError(f"label {str(label)[:20]} is not among the {len(listing.classes)} classes")
    if not 0 <= label < MOST_CLASSES:
        raise ValueError(f"label {str(label)[:20]} is not a class: classes are numbers from 0 to {MOST_CLASSES - 1:,}")
    return label


def _content(column: Any, row: int) -> bytes | str:
    """Returns the bytes in a cell of the image column, or why there are none."""
    import pyarrow.types as t

    cell, path = column[row], None
    if t.is_struct(column.type):
        cell, path = cell.get("bytes") if cell.is_valid else cell, cell
    if not cell.is_valid:
        given = path["path"].as_py() if path is not None and path.is_valid and "path" in path else None
        return f"the image is not in the table but at {clean(str(given))[:80]}" if given else "no image in this row"
    if cell.as_buffer().size > MAX_BYTES:
        return f"an image of {cell.as_buffer().size:,} bytes, more than {MAX_BYTES:,}"
    content: bytes = cell.as_py()
    return content


def _image(where: str, schema: pa.Schema, features: dict[str, dict[str, Any]]) -> str:
    fit = [field.name for field in schema if kind_of(field.type) == "bytes"]
    declared = [name for name in fit if features.get(name, {}).get("_type") == "Image"]
    usual = [name for name in IMAGES if name in fit]
    for candidates in (declared, usual[:1], fit):
        if len(candidates) == 1:
            return candidates[0]
    if fit:
        raise UserError(f"{where}: which column is the image? {', '.join(fit)}", hint="name it: --image-column")
    raise UserError(f"{where}: no column holds the bytes of images; there are {_shown(schema)}")


def _label(schema: pa.Schema, names: dict[str, tuple[str, ...]]) -> str | None:
    """Chooses the label column: one with class names, preferably with a usual name; else one with a usual name."""
    named = [name for name in names if name in schema.names]
    usual = [n for n in LABELS if n in schema.names and kind_of(schema.field(n).type) in ("text", "number")]
    return next((name for name in usual if name in named), next(iter([*named, *usual]), None))


def _shown(schema: pa.Schema) -> str:
    return ", ".join(f"{clean(field.name)} ({str(field.type)[:30]})" for field in schema)
