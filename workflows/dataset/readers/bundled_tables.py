"""Tables of labels and captions that come with a source: EDM's dataset.json, and Hugging Face's metadata files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workflows.dataset.readers.files import clean
from workflows.dataset.readers.sidecars import CAPTIONS, LABELS, WITHOUT, Ask
from workflows.dataset.readers.tables import Table, Value, What, columns_in, parse_table
from workflows.errors import UserError

DATASET = "dataset.json"
METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl")


def is_metadata(name: str) -> bool:
    """Whether the file is a metadata file, such as metadata.csv."""
    return name.rpartition("/")[2] in METADATA


def own_tables(
    names: Sequence[str], whole: Callable[[str], bytes], ask: Ask
) -> tuple[Table | None, Table | None, set[str], list[str]]:
    """Returns (labels, captions, the files that they come from, unused columns of these files).

    names: the files of the source, which `whole` reads. Paths in a table are relative to its folder. Metadata files come before
    dataset.json. Files that the options exclude are not read. Raises UserError for a table that can't be read.
    """
    wanted: list[tuple[What, str | None, Sequence[str]]] = []
    if ask.labels_in_files:
        wanted.append(("label", ask.label_column, LABELS))
    if ask.captions is None:
        wanted.append(("caption", ask.caption_column, CAPTIONS))
    known = {column for _, named, usual in wanted for column in (*usual, named)}
    values: dict[What, dict[str, Value]] = {"label": {}, "caption": {}}
    used, unused, further = list[str](), dict[str, None](), 0
    for name in filter(is_metadata, names) if wanted else ():
        content = whole(name)
        columns = columns_in(clean(name), content)
        if known.isdisjoint(columns):
            continue
        used.append(name)
        taken = set()
        for what, named, usual in wanted:
            if column := named or next((c for c in usual if c in columns), None):
                table = parse_table(clean(name), content, column=column, defaults=usual, what=what)
                values[what] |= _by_full_path(name, table)
                further += table.further
                taken.add(column)
        unused |= dict.fromkeys(column for column in columns if column not in taken)
    shown = clean(used[0]) if used else ""
    labels = Table(shown, values["label"]) if values["label"] else None
    captions = Table(shown, values["caption"], further=further) if values["caption"] else None
    found = [name for name in names if name.rpartition("/")[2] == DATASET] if ask.labels_in_files and not labels else []
    if found:
        try:
            tables = [parse_table(clean(name), whole(name), column=None, defaults=("labels",)) for name in found]
        except UserError as error:  # such as a dataset.json of another program
            raise UserError(str(error), hint=error.hint or WITHOUT) from error
        merged: dict[str, Value] = {}
        for name, table in zip(found, tables, strict=True):
            merged |= _by_full_path(name, table)
        labels = Table(DATASET, merged, next((table.classes for table in tables if table.classes), ()))
    return labels, captions, {*used, *found}, list(unused)


def _by_full_path(name: str, table: Table) -> dict[str, Value]:
    folder = "".join(name.rpartition("/")[:2])
    return {folder + path: value for path, value in table.values.items()}
