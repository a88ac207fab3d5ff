"""Labels and captions of named images, and the class list: from files that the user names, tables, sidecar files, or folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workflows.dataset.readers.bundled_tables import own_tables
from workflows.dataset.readers.files import Files, Read, clean, whole
from workflows.dataset.readers.sidecars import CAPTIONS, LABELS, WITHOUT, Ask, find_sidecars
from workflows.dataset.readers.tables import Table, Value, open_table, parse_table
from workflows.dataset.readers.text import in_order, normalised
from workflows.errors import UserError

SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
MOST_CLASSES = 100_000
FURTHER = "beyond the first of an image"
BOXES = "boxes, not captions"


@dataclass(frozen=True)
class Described:
    """Labels and captions of named images, in the order of the names; () if there are none.

    caption_files   the sidecar file that holds the caption of each image
    used            the other files of the source that labels and captions come from
    tables          contents of the files that the user named, for the fingerprint
    """

    classes: tuple[str, ...]
    labels: tuple[int | None, ...]
    labelled: str
    captions: tuple[str | None, ...]
    captioned: str
    caption_files: tuple[str | None, ...]
    used: set[str]
    tables: tuple[bytes, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Named:
    """A source whose images have names.

    images   their names
    others   names of the other files, which `read` reads
    zips     whether there are several zip files; then each name begins with that of its zip file
    """

    images: list[str]
    others: list[str]
    read: Read
    zips: bool = False


def label_table(files: Files, ask: Ask) -> tuple[Table | None, bytes]:
    """Returns (the table in the file that `ask.labels` names, its content), or (None, b"") if it names no file.

    Raises UserError if the file can't be read or has no labels.
    """
    if ask.labels is None or not ask.labels_in_files:
        return None, b""
    name, content = open_table(files, ask.labels)
    table = parse_table(name, content, column=ask.label_column, defaults=LABELS)
    if not table.classes and all(value is None for value in table.values.values()):
        raise UserError(f"{name}: it holds no labels")
    return table, content


def caption_table(files: Files, ask: Ask) -> tuple[Table | None, bytes]:
    """Like `label_table`, for the file that `ask.captions` names."""
    if ask.captions is None or ask.captions == "none":
        return None, b""
    name, content = open_table(files, ask.captions)
    table = parse_table(name, content, column=ask.caption_column, defaults=CAPTIONS, what="caption")
    if table.classes or not table.values:
        raise UserError(f"{name}: captions by path are expected")
    if not any(table.values.values()):
        raise UserError(f"{name}: it holds no captions")
    return table, content


def describe(files: Files, source: Named, ask: Ask) -> Described:
    """Finds the labels and captions of images that are known by name.

    They come from the files that the user names, else from the tables of the source, else from sidecar files. Without any of these,
    labels come from folders. Raises UserError if they do not fit the images, or for several splits unless the user sets `labels`.
    """
    names = source.images
    own_labels, own_captions, used, unused = own_tables(
        source.others, lambda name: whole(name, source.read, files.source), ask
    )
    files.leave_columns(unused)
    if ask.labels is None:
        _one_split(files, _within(names) if source.zips else names)
    given, label_bytes = label_table(files, ask)
    given_captions, caption_bytes = caption_table(files, ask)
    labels_given = given is not None and bool(given.values)
    sidecars = find_sidecars(source.others, names, ask, source.read, labels=not labels_given)
    table = given if labels_given else own_labels
    class_list = given.classes if given else ()
    classes, labels, labelled, notes = class_list, tuple[int | None, ...](), "", tuple[str, ...]()
    if table and any(value not in (None, -1) for value in table.values.values()):
        values = _matched(files, names, table, "label", must=True)
        classes, labels = numbered(values, class_list or table.classes, table.name)
        labelled = table.name
    elif own_labels:
        notes = (f"no labels in {own_labels.name}: all are empty or -1",)
    elif sidecars.labels:
        classes, labels = numbered(sidecars.labels, class_list, sidecars.labelled)
        labelled = sidecars.labelled
        used.update(sidecars.label_files)
    elif ask.labels != "none":
        depth_of = _depth_in_zips if source.zips else class_depth
        depth, notes = depth_of(files, names, must=ask.labels == "folders" or bool(class_list))
        if depth is not None:
            classes, labels = numbered([name.split("/")[depth] for name in names], class_list, ask.labels or "folders")
            labelled = "folders"
    captions, captioned, caption_files = tuple[str | None, ...](), "", tuple[str | None, ...]()
    if by_path := given_captions or own_captions:
        texts = _matched(files, names, by_path, "caption", must=given_captions is not None)
        captions = tuple(None if text is None else str(text) for text in texts)
        captioned = by_path.name
        if by_path.further:
            files.leave("captions", FURTHER, by_path.further)
    elif ask.captions is None and sidecars.caption_files:
        caption_files, captioned = sidecars.caption_files, sidecars.captioned
        used.update(name for name in caption_files if name)
    _check_named(files, ask, labels=labelled not in ("", "folders"), captions=bool(captioned))
    return Described(
        classes, labels, labelled, captions, captioned, caption_files, used, (label_bytes, caption_bytes), notes
    )


def _check_named(files: Files, ask: Ask, *, labels: bool, captions: bool) -> None:
    """Raises UserError if the user names a column, but labels or captions come from nothing that has columns."""
    wanted = (("label", ask.label_column, ask.labels, labels), ("caption", ask.caption_column, ask.captions, captions))
    for what, column, asked, taken in wanted:
        if column and asked not in ("none", "folders") and not taken:
            raise UserError(
                f"{files.source}: no {column} for {what}s: neither in a metadata file nor in files beside the images",
                hint=f"--{what}s FILE names a file that has this column",
            )


def numbered(
    values: Sequence[Value], classes: tuple[str, ...], where: str
) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    """Returns (class list, number of each value). None and -1 mean no label and give None.

    classes: the class list. If it is empty, the list is made of the names in order, or of the numbers 0, 1, ..., each of which must
    occur. where: the origin of the labels, for errors. Raises UserError for values outside the list, too many classes, or names
    mixed with numbers.
    """
    distinct = set(values) - {None, -1}
    names = {value for value in distinct if isinstance(value, str)}
    numbers = {value for value in distinct if isinstance(value, int)}
    if names and numbers:
        raise UserError(f"{where}: some labels are names ({min(names)}), others are numbers ({min(numbers)})")
    if len(distinct) > MOST_CLASSES:
        raise UserError(f"{where}: {len(distinct):,} different labels, more than {MOST_CLASSES:,}: are these classes?")
    classes = classes or _classes(names, numbers, where)
    known = set(classes) if names else set(range(len(classes)))
    unlisted = sorted(distinct - known)  # type: ignore[type-var]
    if unlisted:
        kind = "number" if numbers else "name"
        raise UserError(f"{where}: label {unlisted[0]} is not a {kind} in the class list, which has {_few(classes)}")
    of: dict[Value, int] = {name: i for i, name in enumerate(classes)} if names else {}
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
        problem = f"no image has {missing}" if missing is not None and low >= 0 else f"one is {low}"
        hint = (
            'numbers must count from 0; or give a list of all classes (["...", ...] in a JSON file) with --labels FILE'
        )
        raise UserError(f"{where}: labels are numbers up to {high}, but {problem}", hint=hint)
    return tuple(str(i) for i in range(high + 1))


def _matched(files: Files, names: Sequence[str], table: Table, what: str, *, must: bool) -> list[Value]:
    """Returns the value of each name in the table. Paths may be spelled differently (composed accents, backslashes).

    A caption that is missing is None. Raises UserError if a label is missing, if all paths of the table are unknown, or if any is
    unknown and the table `must` match.
    """
    known = set(names)
    by_normalised = {normalised(name): name for name in names} if any(p not in known for p in table.values) else {}
    found: dict[str, Value] = {}
    unknown = []
    for path, value in table.values.items():
        name = path if path in known else by_normalised.get(normalised(path))
        if name is None:
            unknown.append(path)
        elif what == "label" and found.get(name, value) != value:
            raise UserError(f"{table.name}: two values for {clean(name)}: {found[name]} and {value}")
        else:
            found[name] = value
    if unknown and (must or not found):
        many = f"{len(unknown):,} of its {len(table.values):,} images are"
        hint = WITHOUT if what == "label" else "to ignore it: --captions none"
        raise UserError(f"{table.name}: {many} not in {files.source}, such as {clean(unknown[0])}", hint=hint)
    if unknown:
        files.leave(f"rows of {table.name}", "their images are not there", len(unknown))
    lacking = [name for name in names if name not in found] if what == "label" else []
    if lacking:
        many = f"{len(lacking):,} of {len(names):,} images"
        raise UserError(f"{table.name}: no {what} for {many} of {files.source}, such as {clean(lacking[0])}")
    return [found.get(name) for name in names]


def class_depth(files: Files, names: Sequence[str], *, must: bool) -> tuple[int | None, tuple[str, ...]]:
    """Returns (index of the folder that is the class: the first in which the names differ, notes). (None, notes) if there is none.

    Raises UserError if folders `must` be the classes but can't, or if they are the splits of a data set.
    """
    common, found, loose = _one_split(files, names)
    if loose is None and len(found) > 1:
        return common, ()
    if not must:
        several = len(found) > 1
        return None, (f"no labels: {clean(loose)} is not in a class folder",) if loose and several else ()
    if loose is not None and found:
        raise UserError(f"{files.source}: {clean(loose)} is not in a class folder", hint="--labels none: no classes")
    raise UserError(f"{files.source}: labels by folder need at least two folders, but all images are in one")


def _depth_in_zips(files: Files, names: Sequence[str], *, must: bool) -> tuple[int | None, tuple[str, ...]]:
    """Like `class_depth`, for names that begin with that of their zip file. If folders `must` be the classes but none differ, the
    zip files are the classes.
    """
    depth, notes = class_depth(files, _within(names), must=False)
    if depth is not None:
        return depth + 1, notes
    if must:
        return class_depth(files, names, must=True)
    return None, notes or ("no labels: if the zip files are the classes: --labels folders",)


def _within(names: Sequence[str]) -> list[str]:
    """Removes the name of the zip file from names."""
    return [name.partition("/")[2] for name in names]


def _one_split(files: Files, names: Sequence[str]) -> tuple[int, list[str], str | None]:
    """Returns (number of leading folders that all names share, the folders below them, an image that is in none of these or None).

    Raises UserError if the folders are the splits of a data set.
    """
    parents = [name.split("/")[:-1] for name in names]
    low, high = min(parents), max(parents)
    common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    loose = next((name for name, parent in zip(names, parents, strict=True) if len(parent) == common), None)
    found = sorted({parent[common] for parent in parents if len(parent) > common})
    if found and {name.lower() for name in found} <= SPLITS and loose is None:
        place = "/".join([*parents[0][:common], found[0]])
        choice = f"name one of them: {files.source.rstrip('/')}/{place}" if files.has(place) else "unpack one of them"
        hint = f"{choice}; or --labels none"
        raise UserError(f"{files.source} holds the splits {', '.join(found)}, which are not classes", hint=hint)
    return common, found, loose


def _few(classes: tuple[str, ...]) -> str:
    shown = ", ".join(clean(name) for name in classes[:3]) + (", ..." if len(classes) > 3 else "")
    return f"{len(classes):,}: {shown}"
