"""Reader of images in a column of Arrow files, as `datasets.save_to_disk` writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from workflows.dataset.readers.columns import check_same, columns_of, is_number, items, merged
from workflows.dataset.readers.files import File, Files, clean, line
from workflows.dataset.readers.listing import Item, Listing, Unit
from workflows.dataset.readers.parquet import Tables, class_list
from workflows.dataset.readers.sidecars import Ask
from workflows.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


def list_arrow(files: Files, chosen: Sequence[File], ask: Ask, names: dict[str, tuple[str, ...]]) -> Tables:
    """Lists Arrow files, one per unit, as streams have no index.

    names: class names by column. Raises UserError for files with different columns, for labels that are names without a class
    list, or if no file can be read.
    """
    schemas: list[tuple[str, Any]] = []
    error = ""
    for file in chosen:
        schema = _schema(files, file.name)
        if isinstance(schema, str):
            error = error or f"{clean(file.name)}: {schema}"
        else:
            schemas.append((file.name, schema))
    if not schemas:
        raise UserError(f"{files.source}: no file can be read; {error}")
    first_name, whole = schemas[0][0], merged(schemas)
    columns = columns_of(clean(first_name), whole, ask, names)
    check_same(schemas, columns)
    classes, table = class_list(files, ask, columns)
    if columns.label is not None and not classes and not is_number(whole.field(columns.label).type):
        raise UserError(
            f"{clean(first_name)}: the labels in column {columns.label} are names, but there is no list of them",
            hint='--labels FILE with the list of classes (["...", ...] in JSON), or --labels none',
        )
    labelled = f"column {columns.label}" if columns.label else ""
    units = tuple(Unit("arrow", (file.name,), size=file.size or 0) for file in chosen)
    return Tables(units, None, columns, classes, labelled, table)


def read_arrow(listing: Listing, unit: Unit, files: Files) -> Iterator[Item]:
    """Yields an item per row. If the stream breaks, one item with an error stands for the rest."""
    import pyarrow as pa

    (name,) = unit.files
    row, error = 0, ""
    try:
        with _opened(files, name) as batches:
            for batch in batches:
                keys = [f"{clean(name)}#{row + i}" for i in range(len(batch))]
                for item in items(batch, range(len(batch)), keys, listing, files):
                    row += 1
                    yield item
    except (pa.ArrowException, UnicodeDecodeError, KeyError) as broken:
        error = f"broken after {row:,} rows: {line(broken)}"
    except OSError as lost:
        error = files.lost(lost)
    if error:
        yield Item(f"{clean(name)}#{row}", None, error=error)


def _schema(files: Files, name: str) -> pa.Schema | str:
    import pyarrow as pa

    try:
        with files.open(name) as stream:
            return _reader(stream).schema
    except pa.ArrowException as error:
        return f"it is not an Arrow stream: {line(error)}"
    except OSError as error:
        return files.lost(error)


@contextmanager
def _opened(files: Files, name: str) -> Iterator[Iterator[pa.RecordBatch]]:
    with files.open(name) as stream:
        reader = _reader(stream)
        if hasattr(reader, "num_record_batches"):
            yield (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield iter(reader)


def _reader(stream: Any) -> Any:
    """Opens a reader of the streaming format, or of the file format, which has an index."""
    import pyarrow as pa

    start = stream.read(6)
    stream.seek(0)
    if not start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):  # pyarrow would take other bytes for a length
        raise pa.ArrowInvalid("it has no Arrow in it")
    return pa.ipc.open_file(stream) if start == b"ARROW1" else pa.ipc.open_stream(stream)
