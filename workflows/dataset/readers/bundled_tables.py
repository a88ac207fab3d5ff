"""Tables of labels and captions that come with a source: EDM's dataset.json, and Hugging Face's metadata files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workflows.dataset.readers.files import clean
from workflows.dataset.readers.huggingface import metadata
from workflows.dataset.readers.labels import WITHOUT
from workflows.dataset.readers.sidecars import Ask
from workflows.dataset.readers.tables import Table, parse_table
from workflows.errors import UserError

DATASET = "dataset.json"


def own_tables(
    names: Sequence[str], whole: Callable[[str], bytes], ask: Ask
) -> tuple[Table | None, Table | None, frozenset[str], tuple[str, ...]]:
    """Returns (labels, captions, the files that they come from, unused columns of these files).

    names: the files of the source, which `whole` reads. Metadata files come before dataset.json. Files that the options exclude
    are not read. Raises UserError for a table that can't be read.
    """
    labels, captions, used, others = metadata(names, whole, ask)
    wanted = labels is None and ask.labels not in ("none", "folders")
    if wanted and (found := [name for name in names if name.rpartition("/")[2] == DATASET]):
        try:
            labels, used = _edm(found, whole), used | set(found)
        except UserError as error:  # such as a dataset.json of another program
            raise UserError(str(error), hint=error.hint or WITHOUT) from error
    return labels, captions, used, others


def _edm(names: Sequence[str], whole: Callable[[str], bytes]) -> Table:
    """Returns the labels of all dataset.json files. The paths in each are relative to the folder of the file."""
    values: dict[str, str | int | None] = {}
    classes: tuple[str, ...] = ()
    for name in names:
        table = parse_table(clean(name), whole(name), column=None, defaults=("labels",))
        folder = "".join(name.rpartition("/")[:2])
        values |= {folder + path: value for path, value in table.values.items()}
        classes = classes or table.classes
    return Table(DATASET, values, classes)
