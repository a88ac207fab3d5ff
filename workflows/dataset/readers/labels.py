"""Labels: from folders, files or columns to numbers in one class list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from workflows.dataset.readers.files import Files, clean
from workflows.dataset.readers.sidecars import CAPTIONS, LABELS, Ask, find_asides
from workflows.dataset.readers.tables import Table, open_table, parse_table
from workflows.dataset.readers.text import alike, in_order
from workflows.errors import UserError

SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
MOST_CLASSES = 100_000
FURTHER = "an image has one"
BOXES = "boxes, not captions"
WITHOUT = "without it: --labels none, or --labels folders"


@dataclass(frozen=True)
class Described:
    """Labels and captions of named images, in the order of the names; () where there are none. asides: names of the files beside
    them that hold their captions. used: all files of the source that were.
    """

    classes: tuple[str, ...] = ()
    labels: tuple[int | None, ...] = ()
    labelled: str = ""
    captions: tuple[str | None, ...] = ()
    captioned: str = ""
    asides: tuple[str | None, ...] = ()
    used: frozenset[str] = frozenset()
    tables: tuple[bytes, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Own:
    """What a source of named images has besides them: tables of labels and captions, and `others`, the names of all other files,
    which `read` reads. zips: the names begin with the zip files', of which there are several.
    """

    others: Sequence[str] = ()
    read: Callable[[Sequence[str]], Iterator[bytes | str]] = lambda names: iter(())
    labels: Table | None = None
    captions: Table | None = None
    zips: bool = False


def label_table(files: Files, ask: Ask) -> tuple[Table | None, bytes]:
    """The file that `labels` names, if it names one, and its content."""
    if ask.labels in (None, "none", "folders"):
        return None, b""
    name, content = open_table(files, str(ask.labels))
    table = parse_table(name, content, column=ask.label_column, defaults=LABELS)
    if not table.classes and all(value is None for value in table.values.values()):
        raise UserError(f"{name}: there are no labels in it")
    return table, content


def caption_table(files: Files, ask: Ask) -> tuple[Table | None, bytes]:
    if ask.captions in (None, "none"):
        return None, b""
    name, content = open_table(files, str(ask.captions))
    table = parse_table(name, content, column=ask.caption_column, defaults=CAPTIONS, what="caption")
    if table.classes or not table.values:
        raise UserError(f"{name}: captions by path are expected")
    if not any(table.values.values()):
        raise UserError(f"{name}: there are no captions in it")
    return table, content


def describe(files: Files, names: Sequence[str], ask: Ask, own: Own) -> Described:
    """Labels and captions of images that are known by name: the user's files, else the source's own tables, else files beside the
    images, else folders. Raises UserError for several splits, unless the user tells what labels are.
    """
    if ask.labels is None:
        _one_split(files, _within(names) if own.zips else names)
    given, label_bytes = label_table(files, ask)
    texts, caption_bytes = caption_table(files, ask)
    class_list = given.classes if given else ()
    asides = find_asides(own.others, names, ask, own.read, labels=given is None or not given.values)
    classes, labels, labelled, notes = class_list, tuple[int | None, ...](), "", tuple[str, ...]()
    table = given if given and given.values else None if ask.labels in ("none", "folders") else own.labels
    if table and any(value not in (None, -1) for value in table.values.values()):
        values = _matched(files, names, table, "label", must=True)
        classes, labels = numbered(values, class_list or table.classes, table.name)
        labelled = table.name
    elif ask.labels not in ("none", "folders") and not own.labels and asides.labels:
        classes, labels = numbered(asides.labels, class_list, asides.labelled)
        labelled = asides.labelled
    elif ask.labels == "folders" or (ask.labels != "none" and not own.labels):
        depth_of = _depth_in_zips if own.zips else class_depth
        depth, notes = depth_of(files, names, must=ask.labels == "folders" or bool(class_list))
        if depth is not None:
            found = [name.split("/")[depth] for name in names]
            classes, labels = numbered(found, class_list, ask.labels or "folders")
            labelled = "folders"
    elif own.labels and ask.labels != "none":
        notes = (f"no labels: {own.labels.name} holds none: all are empty or -1",)
    captions, captioned, beside = tuple[str | None, ...](), "", tuple[str | None, ...]()
    told = texts or (own.captions if ask.captions is None else None)
    if told:
        found_captions = _matched(files, names, told, "caption", must=texts is not None)
        captions, captioned = tuple(None if text is None else str(text) for text in found_captions), told.name
        if told.further:
            files.leave("captions", FURTHER, told.further)
    elif ask.captions is None and any(asides.captions):
        beside, captioned = asides.captions, asides.captioned
    _check_named(files, ask, labels=labelled not in ("", "folders"), captions=bool(captioned))
    return Described(
        classes=classes,
        labels=labels,
        labelled=labelled,
        captions=captions,
        captioned=captioned,
        asides=beside,
        used=frozenset(
            name for name in (*beside, *(asides.label_files if labelled == asides.labelled else ())) if name
        ),
        tables=(label_bytes, caption_bytes),
        notes=notes,
    )


def _check_named(files: Files, ask: Ask, *, labels: bool, captions: bool) -> None:
    """Raises UserError where a column is named, and there is nothing that has columns."""
    wanted = (("label", ask.label_column, ask.labels, labels), ("caption", ask.caption_column, ask.captions, captions))
    for what, column, asked, taken in wanted:
        if column and asked not in ("none", "folders") and not taken:
            said = f"{files.source}: no {column} for {what}s: neither in a metadata file nor in files beside the images"
            raise UserError(said, hint=f"--{what}s FILE names a file that has this column")


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
        return in_order(names)
    if not numbers:
        return ()
    low, high = min(numbers), max(numbers)
    missing = next((i for i in range(min(high, MOST_CLASSES) + 1) if i not in numbers), None)
    if low < 0 or missing is not None:
        said = f"no image has {missing}" if missing is not None and low >= 0 else f"one is {low}"
        hint = 'numbers count from 0; a class list (["...", ...] in a JSON file) tells which classes there are'
        raise UserError(f"{where}: labels are numbers up to {high}, but {said}", hint=hint)
    return tuple(str(i) for i in range(high + 1))


def _matched(files: Files, names: Sequence[str], table: Table, what: str, *, must: bool) -> list[str | int | None]:
    """The table's value of each name, found by the name itself or by one that is written otherwise (composed accents, backslashes).
    An image has no caption where the table has none for it.

    Raises UserError where labels are lacking, and where the table has images that aren't there: all of them, or some if it `must`
    fit.
    """
    there = set(names)
    likes = {alike(name): name for name in names} if any(path not in there for path in table.values) else {}
    found: dict[str, str | int | None] = {}
    strange = []
    for path, value in table.values.items():
        name = path if path in there else likes.get(alike(path))
        if name is None:
            strange.append(path)
        elif what == "label" and found.get(name, value) != value:
            raise UserError(f"{table.name}: two values for {clean(name)}: {found[name]} and {value}")
        else:
            found[name] = value
    if strange and (must or not found):
        many = f"{len(strange):,} of its {len(table.values):,} images are"
        hint = WITHOUT if what == "label" else "without it: --captions none"
        raise UserError(f"{table.name}: {many} not in {files.source}, such as {clean(strange[0])}", hint=hint)
    if strange:
        files.leave(f"rows of {table.name}", "their images are not there", len(strange))
    lacking = [name for name in names if name not in found] if what == "label" else []
    if lacking:
        many = f"{len(lacking):,} of {len(names):,} images"
        raise UserError(f"{table.name}: no {what} for {many} of {files.source}, such as {clean(lacking[0])}")
    return [found.get(name) for name in names]


def class_depth(files: Files, names: Sequence[str], *, must: bool) -> tuple[int | None, tuple[str, ...]]:
    """Which of its folders is each name's class: the first in which they differ. (None, notes) where folders are no classes."""
    common, found, loose = _one_split(files, names)
    if loose is None and len(found) > 1:
        return common, ()
    if not must:
        several = len(found) > 1
        return None, (f"no labels: {clean(loose)} lies in no class's folder",) if loose and several else ()
    if loose is not None and found:
        raise UserError(f"{files.source}: {clean(loose)} lies in no class's folder", hint="--labels none: no classes")
    raise UserError(f"{files.source}: labels by folder need two folders, and all images lie in one")


def _depth_in_zips(files: Files, names: Sequence[str], *, must: bool) -> tuple[int | None, tuple[str, ...]]:
    """As `class_depth`, of names that begin with the zip files': they are classes if it must be and there are no folders."""
    depth, notes = class_depth(files, _within(names), must=False)
    if depth is not None:
        return depth + 1, notes
    if must:
        return class_depth(files, names, must=True)
    return None, notes or ("no labels: if the zip files are the classes: --labels folders",)


def _within(names: Sequence[str]) -> list[str]:
    return [name.partition("/")[2] for name in names]


def _one_split(files: Files, names: Sequence[str]) -> tuple[int, list[str], str | None]:
    """(how many folders all have in common, those that come next, an image in none of these). Raises UserError for splits."""
    parents = [name.split("/")[:-1] for name in names]
    low, high = min(parents), max(parents)
    common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    loose = next((name for name, parent in zip(names, parents, strict=True) if len(parent) == common), None)
    found = sorted({parent[common] for parent in parents if len(parent) > common})
    if found and {name.lower() for name in found} <= SPLITS and loose is None:
        place = "/".join([*parents[0][:common], found[0]])
        named = f"name one of them: {files.source.rstrip('/')}/{place}" if files.has(place) else "unpack one of them"
        hint = f"{named}; or --labels none"
        raise UserError(f"{files.source} holds the splits {', '.join(found)}, which are no classes", hint=hint)
    return common, found, loose


def _few(classes: tuple[str, ...]) -> str:
    shown = ", ".join(clean(name) for name in classes[:3]) + (", ..." if len(classes) > 3 else "")
    return f"{len(classes):,}: {shown}"
