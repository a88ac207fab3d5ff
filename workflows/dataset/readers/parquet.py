"""Reader of images in a column of Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from workflows.dataset.readers.columns import Columns, find_columns, items
from workflows.dataset.readers.files import File, Files, clean, one_line
from workflows.dataset.readers.labels import MOST_CLASSES, numbered
from workflows.dataset.readers.listing import Item, Listing, Unit, indices_of
from workflows.dataset.readers.sidecars import Ask
from workflows.dataset.readers.spread import evenly, grouped
from workflows.dataset.readers.text import label_of
from workflows.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS = 16
"""Rows in memory at once, besides the pages of Parquet."""
READERS = 8
"""Threads that read footers and label columns."""


@dataclass(frozen=True)
class Footer:
    """The footer of a file: its schema, and rows and bytes of each row group. error: why the file can't be read, if so."""

    schema: pa.Schema | None
    rows: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Tables:
    """A listing of Parquet or Arrow files, for the Listing. table: content of the file that the user named for labels."""

    units: tuple[Unit, ...]
    available: int | None
    columns: Columns
    table: bytes
    notes: tuple[str, ...] = ()


def list_parquet(files: Files, chosen: Sequence[File], ask: Ask, names: dict[str, tuple[str, ...]]) -> Tables:
    """Lists Parquet files in units of whole row groups.

    A file that can't be read becomes a unit of about as many broken items as it should have rows. Class names come from the file
    that `ask.labels` names, the schema, or `names` (by column); else the label column is read to find them. Raises UserError
    for files with different columns, or if no file can be read.
    """
    with ThreadPoolExecutor(READERS) as pool:
        footers = list(pool.map(lambda file: _footer(files, file.name), chosen))
    whole = [(file, footer) for file, footer in zip(chosen, footers, strict=True) if footer.schema is not None]
    if not whole:
        raise UserError(f"{files.source}: no file can be read; {clean(chosen[0].name)}: {footers[0].error}")
    schemas = [(file.name, footer.schema) for file, footer in whole if footer.schema is not None]
    if not any(sum(footer.rows) for _, footer in whole):
        raise UserError(f"{files.source}: the files have no rows")
    columns, table = find_columns(files, schemas, ask, names)
    notes: tuple[str, ...] = ()
    if columns.label is not None and not columns.classes:
        columns, notes = _with_classes(files, columns, ask, [name for name, _ in schemas])
    units: list[Unit] = []
    footers, offset = _with_lost_rows(chosen, footers), 0
    available = sum(sum(footer.rows) for footer in footers)
    for file, footer in zip(chosen, footers, strict=True):
        start = 0
        for a, b in grouped(list(footer.sizes), ask.unit_bytes):
            rows = sum(footer.rows[a:b])
            if len(evenly(available, ask.limit, first=offset, last=offset + rows)):
                size = sum(footer.sizes[a:b])
                units.append(Unit("parquet", (file.name,), first=start, last=start + rows, offset=offset, size=size))
            start, offset = start + rows, offset + rows
    return Tables(tuple(units), available, columns, table, notes)


def _with_classes(files: Files, columns: Columns, ask: Ask, names: Sequence[str]) -> tuple[Columns, tuple[str, ...]]:
    """Reads the label column of the files for the class list. Returns (the columns, notes). A column without any label becomes an
    unused column.

    Raises UserError if the user named that column.
    """
    label = str(columns.label)
    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(lambda name: _distinct(files, name, label), names)
        found = sorted({value for part in parts for value in part if value is not None}, key=str)
    classes, _ = numbered(found, (), f"column {label}")
    if classes:
        return replace(columns, classes=classes), ()
    note = f"no labels in column {label}: all are empty or -1"
    if ask.label_column:
        raise UserError(f"{files.source}: {note}", hint="--labels none: no classes")
    return replace(columns, label=None, others=(*columns.others, label)), (note,)


def _with_lost_rows(chosen: Sequence[File], footers: Sequence[Footer]) -> list[Footer]:
    """Gives a file that can't be read a footer with one row group. The number of rows is estimated from the size of the file and
    the rows per byte of the others, and is at least one.
    """
    whole = [(file, footer) for file, footer in zip(chosen, footers, strict=True) if footer.schema is not None]
    rows, size = sum(sum(footer.rows) for _, footer in whole), sum(file.size or 0 for file, _ in whole)
    out = []
    for file, footer in zip(chosen, footers, strict=True):
        lost = max(1, round((file.size or 0) * rows / size)) if size else 1
        out.append(footer if footer.schema is not None else replace(footer, rows=(lost,), sizes=(file.size or 0,)))
    return out


def read_parquet(listing: Listing, unit: Unit, files: Files) -> Iterator[Item]:
    """Yields one item per row of the unit."""
    (name,) = unit.files
    chosen = indices_of(listing, unit).tolist()
    footer = _footer(files, name)
    if footer.error:
        yield from (Item(f"{clean(name)}#{i}", None, error=footer.error) for i in chosen)
        return
    start = 0
    for group, rows in enumerate(footer.rows):
        wanted = [i for i in chosen if start <= i < start + rows]
        if wanted:
            yield from _row_group(listing, files, name, group, start, wanted)
        start += rows
    yield from (Item(f"{clean(name)}#{i}", None, error="changed since it was listed") for i in chosen if i >= start)


def _row_group(
    listing: Listing, files: Files, name: str, group: int, start: int, wanted: Sequence[int]
) -> Iterator[Item]:
    """Yields the wanted rows of a row group that begins at row `start`. If it breaks, the remaining items have an error."""
    import pyarrow as pa

    columns = [c for c in (listing.image_column, listing.label_column, listing.caption_column) if c]
    done, error = 0, "changed since it was listed"
    try:
        with _opened(files, name) as file:
            for batch in file.iter_batches(ROWS, [group], columns, use_threads=False):
                stop = start + len(batch)
                rows = [i for i in wanted if start <= i < stop]
                for item in items(
                    batch, [i - start for i in rows], [f"{clean(name)}#{i}" for i in rows], listing, files
                ):
                    done += 1
                    yield item
                start = stop
    except (pa.ArrowException, UnicodeDecodeError, KeyError) as broken:
        error = f"broken: {one_line(broken)}"
    except OSError as lost:
        error = files.explain(lost)
    yield from (Item(f"{clean(name)}#{i}", None, error=error) for i in wanted[done:])


@contextmanager
def _opened(files: Files, name: str) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file so that row groups are read page by page rather than as a whole."""
    import pyarrow.parquet as pq

    with files.open(name) as stream, pq.ParquetFile(stream, pre_buffer=False, buffer_size=2**20) as file:
        yield file


def _footer(files: Files, name: str) -> Footer:
    import pyarrow as pa

    try:
        with _opened(files, name) as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            sizes = tuple(group.total_byte_size for group in groups)
            return Footer(file.schema_arrow, tuple(group.num_rows for group in groups), sizes)
    except pa.ArrowException as error:
        return Footer(None, error=f"it is not a Parquet file: {one_line(error)}")
    except OSError as error:
        return Footer(None, error=files.explain(error))


def _distinct(files: Files, name: str, column: str) -> set[str | int | None]:
    """Returns the distinct labels in a column. Stops once there are more than MOST_CLASSES.

    Broken files are ignored here, because read_parquet reports them. Raises UserError for values that are not labels.
    """
    import pyarrow as pa
    import pyarrow.types as t

    found: set[str | int | None] = set()
    try:
        with _opened(files, name) as file:
            for batch in file.iter_batches(65536, columns=[column]):
                values = batch.column(0)
                simple = t.is_integer(values.type) or t.is_string(values.type) or t.is_large_string(values.type)
                found.update(label_of(value) for value in (values.unique() if simple else values).to_pylist())
                if len(found) > MOST_CLASSES:
                    break
    except pa.ArrowException:
        pass
    except ValueError as error:
        raise UserError(f"{clean(name)}: column {column} holds {error}", hint="--labels none: no classes") from error
    except OSError as error:
        files.explain(error)
    return found
