"""Labels: from folders, files or columns to numbers in one class list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from workflows.ingest.files import Files, clean
from workflows.ingest.tables import Table, open_table, parse_table
from workflows.runtime.errors import UserError

LABELS = ("label", "labels", "class", "class_name", "cls", "fine_label")
CAPTIONS = ("caption", "text", "prompt", "txt")
"""What the columns may be called when the user names none."""
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Ask:
    """What the user asked for: the options of `list_source`."""

    labels: str | None = None
    captions: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    unit_bytes: int = 64 * 2**20
    limit: int | None = None


@dataclass(frozen=True)
class Described:
    """Labels and captions of named images, in the order of the names; () where there are none."""

    classes: tuple[str, ...] = ()
    labels: tuple[int | None, ...] = ()
    labelled: str = ""
    captions: tuple[str | None, ...] = ()
    captioned: str = ""
    tables: tuple[bytes, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()


def label_table(files: Files, ask: Ask) -> tuple[Table | None, bytes]:
    """The file that `labels` names, if it names one, and its content."""
    if ask.labels in (None, "none", "folders"):
        return None, b""
    name, content = open_table(files, str(ask.labels))
    return parse_table(name, content, column=ask.label_column, defaults=LABELS), content


def caption_table(files: Files, ask: Ask) -> tuple[Table | None, bytes]:
    if ask.captions in (None, "none"):
        return None, b""
    name, content = open_table(files, str(ask.captions))
    table = parse_table(name, content, column=ask.caption_column, defaults=CAPTIONS)
    if table.classes:
        raise UserError(f"{name}: captions by path are expected")
    return table, content


def describe(
    files: Files, names: Sequence[str], ask: Ask, *, own_labels: Table | None = None, own_captions: Table | None = None
) -> Described:
    """Labels and captions of images that are known by name: the user's files, else the source's own, else folders."""
    given, label_bytes = label_table(files, ask)
    texts, caption_bytes = caption_table(files, ask)
    class_list = given.classes if given else ()
    if given and given.values:
        own_labels = given
    notes: tuple[str, ...] = ()
    classes, labels, labelled = class_list, tuple[int | None, ...](), ""
    if ask.labels not in ("none", "folders") and own_labels and own_labels.values:
        values = _matched(files, names, own_labels, "label")
        classes, labels = numbered(values, class_list or own_labels.classes, own_labels.name)
        labelled = own_labels.name
    elif ask.labels == "folders" or (ask.labels != "none" and not own_labels):
        found, notes = _folders(files, names, must=ask.labels == "folders" or bool(class_list))
        if found:
            classes, labels = numbered(found, class_list, ask.labels or "folders")
            labelled = "folders"
    texts = texts or (own_captions if ask.captions is None else None)
    captions = tuple(str(text) for text in _matched(files, names, texts, "caption")) if texts else ()
    return Described(
        classes=classes,
        labels=labels,
        labelled=labelled,
        captions=captions,
        captioned=texts.name if texts else "",
        tables=(label_bytes, caption_bytes),
        notes=notes,
    )


def numbered(
    values: Sequence[str | int | None], classes: tuple[str, ...], where: str
) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    """(class list, number of each value). Without a class list it is the names in order, or the numbers 0, 1, ..., each of which
    must occur. None and -1 are no label. Raises UserError for values outside of the list, and for names mixed with numbers.
    """
    distinct = set(values) - {None, -1}
    names = {value for value in distinct if isinstance(value, str)}
    numbers = {value for value in distinct if isinstance(value, int)}
    if names and numbers:
        raise UserError(f"{where}: labels are names ({min(names)}) and numbers ({min(numbers)})")
    if len(distinct) > MOST_CLASSES:
        raise UserError(f"{where}: {len(distinct):,} different labels, more than {MOST_CLASSES:,}: are these classes?")
    classes = classes or _classes(names, numbers, where)
    known = set(classes) if names else set(range(len(classes)))
    strange = sorted(distinct - known)  # type: ignore[type-var]
    if strange:
        there = "number" if numbers else "name"
        raise UserError(f"{where}: label {strange[0]} is no {there} of the class list, which has {_few(classes)}")
    of: dict[str | int | None, int] = {name: i for i, name in enumerate(classes)} if names else {}
    of |= {number: number for number in numbers}
    return classes, tuple(of.get(value) for value in values)


def _classes(names: set[str], numbers: set[int], where: str) -> tuple[str, ...]:
    if names:
        return tuple(sorted(names))
    if not numbers:
        return ()
    low, high = min(numbers), max(numbers)
    missing = next((i for i in range(min(high, MOST_CLASSES) + 1) if i not in numbers), None)
    if low < 0 or missing is not None:
        said = f"no image has {missing}" if missing is not None and low >= 0 else f"one is {low}"
        hint = 'numbers count from 0; a class list (["...", ...] in a JSON file) tells which classes there are'
        raise UserError(f"{where}: labels are numbers up to {high}, but {said}", hint=hint)
    return tuple(str(i) for i in range(high + 1))


def _matched(files: Files, names: Sequence[str], table: Table, what: str) -> list[str | int]:
    """The table's value of each name. Raises UserError where the table and the source have different images."""
    there = set(names)
    strange = [name for name in table.values if name not in there]
    if strange:
        many = f"{len(strange):,} of its {len(table.values):,} images are"
        raise UserError(f"{table.name}: {many} not in {files.source}, such as {clean(strange[0])}")
    lacking = [name for name in names if name not in table.values]
    if lacking:
        many = f"{len(lacking):,} of {len(names):,} images"
        raise UserError(f"{table.name}: no {what} for {many} of {files.source}, such as {clean(lacking[0])}")
    return [table.values[name] for name in names]


def _folders(files: Files, names: Sequence[str], *, must: bool) -> tuple[list[str], tuple[str, ...]]:
    """The class of each name: the first folder in which they differ. ([], notes) where folders are no classes."""
    parents = [name.split("/")[:-1] for name in names]
    low, high = min(parents), max(parents)
    common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    loose = next((name for name, parent in zip(names, parents, strict=True) if len(parent) == common), None)
    found = sorted({parent[common] for parent in parents if len(parent) > common})
    if found and {name.lower() for name in found} <= SPLITS and loose is None:
        hint = f"name one of them: {files.source.rstrip('/')}/{'/'.join([*parents[0][:common], found[0]])}; or --labels none"
        raise UserError(f"{files.source} holds the splits {', '.join(found)}, which are no classes", hint=hint)
    if loose is None and len(found) > 1:
        return [parent[common] for parent in parents], ()
    if not must:
        several = len(found) > 1
        return [], (f"no labels: {clean(loose)} lies in no class's folder",) if loose and several else ()
    if loose is not None and found:
        raise UserError(f"{files.source}: {clean(loose)} lies in no class's folder", hint="--labels none: no classes")
    raise UserError(f"{files.source}: labels by folder need two folders, and all images lie in one")


def _few(classes: tuple[str, ...]) -> str:
    shown = ", ".join(clean(name) for name in classes[:3]) + (", ..." if len(classes) > 3 else "")
    return f"{len(classes):,}: {shown}"
