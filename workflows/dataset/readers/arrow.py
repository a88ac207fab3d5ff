"""Reader of images in a column of Arrow files, as `datasets.save_to_disk` writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from workflows.dataset.readers.columns import find_columns, items, kind_of, merged
from workflows.dataset.readers.files import File, Files, clean, one_line
from workflows.dataset.readers.listing import Item, Listing, Unit
from workflows.dataset.readers.parquet import Tables
from workflows.dataset.readers.sidecars import Ask
from workflows.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


def list_arrow(files: Files, chosen: Sequence[File], ask: Ask, names: dict[str, tuple[str, ...]]) -> Tables:
    """Lists Arrow files, one per unit, because streams have no index.

    names: class names by column. Raises UserError for files with different columns, for labels that are names without a class
    list, or if no file can be read.
    """
    found = [(file.name, _schema(files, file.name)) for file in chosen]
    schemas = [(name, schema) for name, schema in found if not isinstance(schema, str)]
    if not schemas:
        raise UserError(f"{files.source}: no file can be read; {clean(found[0][0])}: {found[0][1]}")
    columns, table = find_columns(files, schemas, ask, names)
    if columns.label and not columns.classes and kind_of(merged(schemas).field(columns.label).type) != "number":
        raise UserError(
            f"{clean(schemas[0][0])}: the labels in column {columns.label} are names, but there is no list of them",
            hint='--labels FILE with the list of classes (["...", ...] in JSON), or --labels none',
        )
    units = tuple(Unit("arrow", (file.name,), size=file.size or 0) for file in chosen)
    return Tables(units, None, columns, table)


def read_arrow(listing: Listing, unit: Unit, files: Files) -> Iterator[Item]:
    """Yields an item per row. If the stream breaks, one item with an error stands for the rest."""
    import pyarrow as pa

    (name,) = unit.files
    row, error = 0, ""
    try:
        with files.open(name) as stream:
            for batch in _batches(stream):
                keys = [f"{clean(name)}#{row + i}" for i in range(len(batch))]
                for item in items(batch, range(len(batch)), keys, listing, files):
                    row += 1
                    yield item
    except (pa.ArrowException, UnicodeDecodeError, KeyError) as broken:
        error = f"broken after {row:,} rows: {one_line(broken)}"
    except OSError as lost:
        error = files.explain(lost)
    if error:
        yield Item(f"{clean(name)}#{row}", None, error=error)


def _schema(files: Files, name: str) -> pa.Schema | str:
    import pyarrow as pa

    try:
        with files.open(name) as stream:
            return _reader(stream).schema
    except pa.ArrowException as error:
        return f"it is not an Arrow stream: {one_line(error)}"
    except OSError as error:
        return files.explain(error)


def _batches(stream: Any) -> Iterator[pa.RecordBatch]:
    reader = _reader(stream)
    return map(reader.get_batch, range(reader.num_record_batches)) if hasattr(reader, "get_batch") else iter(reader)


def _reader(stream: Any) -> Any:
    """Opens a reader of the streaming format, or of the file format, which has an index."""
    import pyarrow as pa

    start = stream.read(6)
    stream.seek(0)
    if not start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):  # pyarrow would take other bytes for a length
        raise pa.ArrowInvalid("it has no Arrow in it")
    return pa.ipc.open_file(stream) if start == b"ARROW1" else pa.ipc.open_stream(stream)
