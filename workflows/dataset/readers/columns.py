"""Which columns of a table hold images, labels and captions, and what a row of them is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workflows.dataset.readers.decode import MAX_BYTES
from workflows.dataset.readers.files import Files, clean
from workflows.dataset.readers.image_files import one_of
from workflows.dataset.readers.labels import MOST_CLASSES
from workflows.dataset.readers.listing import Item, Listing
from workflows.dataset.readers.sidecars import CAPTIONS, LABELS, Ask
from workflows.dataset.readers.text import captions_of, label_of
from workflows.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES = ("image", "img", "jpg", "png", "webp", "image_bytes", "bytes", "content")


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns. classes: those of the label column, where the source names them. others: columns not taken."""

    image: str
    label: str | None
    caption: str | None
    classes: tuple[str, ...]
    described: bool
    """Whether the schema carries Hugging Face's features."""
    others: tuple[str, ...] = ()

    def read(self) -> list[str]:
        return [name for name in (self.image, self.label, self.caption) if name]


def columns_of(where: str, schema: pa.Schema, ask: Ask, names: dict[str, tuple[str, ...]]) -> Columns:
    """What the user named, else what the schema says of itself (Hugging Face's features), else what has a usual name.

    names: of classes, by column, from files beside the table. Raises UserError, with the columns that there are.
    """
    features = features_of(schema)
    for option, name in (("image", ask.image_column), ("label", ask.label_column), ("caption", ask.caption_column)):
        if name is not None and name not in schema.names:
            raise UserError(f"{where}: no column {name} for {option}s; there are {_shown(schema)}")
    names = names | _class_names(schema)
    label = None if ask.labels == "none" else ask.label_column or _label(schema, names)
    texts = [name for name in CAPTIONS if name in schema.names and _is_text(schema.field(name).type)]
    caption = None if ask.captions == "none" else ask.caption_column or next((n for n in texts if n != label), None)
    if caption is not None and not _is_text(schema.field(caption).type):
        raise UserError(f"{where}: column {caption} is {schema.field(caption).type}, no text")
    image = ask.image_column or _image(where, schema, features)
    if not is_bytes(schema.field(image).type):
        kind = str(schema.field(image).type)[:60]
        raise UserError(f"{where}: column {image} is {kind}; the bytes of an image's file are expected")
    if label is not None and not is_label(schema.field(label).type):
        raise UserError(f"{where}: column {label} is {schema.field(label).type}, no label: names or whole numbers are")
    classes = names.get(label, ()) if label else ()
    others = tuple(name for name in schema.names if name not in (image, label, caption))
    return Columns(image, label, caption, classes, bool(features), others)


def features_of(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Hugging Face's description of the columns in a schema's metadata; {} without."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def is_bytes(kind: Any) -> bool:
    """Bytes, or Hugging Face's {bytes, path}."""
    import pyarrow.types as t

    if t.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)
    return bool(t.is_binary(kind) or t.is_large_binary(kind) or t.is_binary_view(kind))


def merged(schemas: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """The schema of several files (by name): all their columns, with the type of the first file that has values in them."""
    import pyarrow as pa
    import pyarrow.types as t

    fields: dict[str, Any] = {}
    for _, schema in schemas:
        for field in schema:
            if field.name not in fields or t.is_null(fields[field.name].type):
                fields[field.name] = field
    described = next((schema for _, schema in schemas if features_of(schema)), schemas[0][1])
    return pa.schema(fields.values(), metadata=described.metadata)


def check_same(schemas: Sequence[tuple[str, pa.Schema]], columns: Columns) -> None:
    """Raises UserError where a file lacks a column that is read, or has it of another kind or with other names of classes. Widths
    may differ, and columns that are empty are of any kind.
    """
    for column in columns.read():
        told: tuple[str, Any] | None = None
        having = next(name for name, schema in schemas if column in schema.names)
        hint = {columns.label: "--labels none", columns.caption: "--captions none"}.get(column, "")
        for name, schema in schemas:
            if column not in schema.names:
                raise UserError(f"{clean(name)} has no column {column}, which {clean(having)} has", hint=hint)
            if schema.names.count(column) > 1:
                raise UserError(f"{clean(name)} has the column {column} twice", hint=hint)
            kind = schema.field(column).type
            if _kind(kind) == "null":
                continue
            told = told or (name, kind)
            if _kind(kind) != _kind(told[1]):
                types = f"{str(kind)[:60]} in {clean(name)} and {str(told[1])[:60]} in {clean(told[0])}"
                raise UserError(f"column {column} is {types}")
    named = [(name, found) for name, schema in schemas if (found := _class_names(schema).get(columns.label or ""))]
    other = next((pair for pair in named if pair[1] != named[0][1]), None)
    if other:
        shown = " and ".join(f"{', '.join(found[:3])} in {clean(name)}" for name, found in (named[0], other))
        raise UserError(
            f"column {columns.label} has classes of other names in each file, such as {shown}", hint="--labels none"
        )


def _class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Names of the classes by column, as a schema itself tells them."""
    told = features_of(schema).items()
    return {name: tuple(f["names"]) for name, f in told if f.get("_type") == "ClassLabel" and "names" in f}


def _kind(kind: Any) -> str:
    """What values of a type are, whatever their width."""
    import pyarrow.types as t

    if t.is_null(kind):
        return "null"
    return "bytes" if is_bytes(kind) else "text" if _is_text(kind) else "number" if is_number(kind) else str(kind)


def items(
    batch: pa.RecordBatch, rows: Sequence[int], keys: Sequence[str], listing: Listing, files: Files
) -> Iterator[Item]:
    """The rows of a batch, one by one."""
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
        yield Item(key, known, number, one_of(texts, files), error)


def label_number(value: Any, of: dict[str, int], listing: Listing) -> int | None:
    """A label's number; None where the source gives none (empty, -1). Raises ValueError with why it has none."""
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
        raise ValueError(f"label {str(label)[:20]} is no class: they are numbers from 0 to {MOST_CLASSES - 1:,}")
    return label


def _content(column: Any, row: int) -> bytes | str:
    """A cell's bytes, or why there are none."""
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
    fit = [field.name for field in schema if is_bytes(field.type)]
    told = [name for name in fit if features.get(name, {}).get("_type") == "Image"]
    usual = [name for name in IMAGES if name in fit]
    for some in (told, usual[:1], fit):
        if len(some) == 1:
            return some[0]
    if fit:
        raise UserError(f"{where}: which column is the image? {', '.join(fit)}", hint="name it: --image-column")
    raise UserError(f"{where}: no column of images' bytes; there are {_shown(schema)}")


def _label(schema: pa.Schema, names: dict[str, tuple[str, ...]]) -> str | None:
    """A column with class names, else one that is usually called so."""
    named = [name for name in names if name in schema.names]
    usual = [name for name in LABELS if name in schema.names]
    usual = [name for name in usual if is_label(schema.field(name).type)]
    return next((name for name in usual if name in named), next(iter([*named, *usual]), None))


def is_label(kind: Any) -> bool:
    return _is_text(kind) or is_number(kind)


def _within(kind: Any) -> Any:
    """The type of the values: of a dictionary's, and of a list's, as there are lists of one."""
    import pyarrow.types as t

    if t.is_dictionary(kind) or t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        return _within(kind.value_type)
    return kind


def _is_text(kind: Any) -> bool:
    import pyarrow.types as t

    kind = _within(kind)
    return bool(t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind))


def is_number(kind: Any) -> bool:
    """Whole numbers, or what may hold them: values tell."""
    import pyarrow.types as t

    kind = _within(kind)
    return bool(t.is_integer(kind) or t.is_floating(kind) or t.is_boolean(kind) or t.is_decimal(kind))


def _shown(schema: pa.Schema) -> str:
    return ", ".join(f"{clean(field.name)} ({str(field.type)[:30]})" for field in schema)
