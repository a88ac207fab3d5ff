"""Metadata of Hugging Face data sets, read without the library `datasets`: class names, metadata files, splits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from workflows.dataset.readers.files import File, Files, clean
from workflows.dataset.readers.labels import SPLITS
from workflows.dataset.readers.sidecars import CAPTIONS, LABELS, Ask
from workflows.dataset.readers.tables import Table, What, columns_in, parse_table
from workflows.errors import UserError

INFO, CARD, STATE = "dataset_info.json", "README.md", "state.json"
DESCRIBED = (INFO, CARD, STATE, "dataset_dict.json")
METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl")


def is_huggingface(files: Files, found: Sequence[File]) -> bool:
    """Whether a folder of tables is a Hugging Face data set: it has a data set card or an info file that describes the data."""
    names = {file.name.rpartition("/")[2] for file in found}
    return INFO in names or "dataset_dict.json" in names or bool(_card(files, found))


def class_names(files: Files, found: Sequence[File]) -> dict[str, tuple[str, ...]]:
    """Returns the class names by column, from dataset_info.json or the header of README.md."""
    names: dict[str, tuple[str, ...]] = {}
    for features in _features(files, found):
        for column, feature in features.items():
            if isinstance(feature, dict) and isinstance(feature.get("names"), list):
                names.setdefault(column, tuple(str(name) for name in feature["names"]))
    return names


def one_split(files: Files, chosen: Sequence[File]) -> None:
    """Raises UserError if the files belong to more than one split, going by names such as `train-00000-of-00002.parquet`,
    `test/data-0000.arrow` and `imagenet-val-0000.tar`.
    """
    splits: dict[str, str] = {}
    for file in chosen:
        *folders, name = file.name.lower().split("/")
        words = [*re.split(r"[-_.]", name), *reversed(folders)]
        splits.setdefault(next((word for word in words if word in SPLITS), ""), file.name)
    if len(splits) > 1:
        name = next(iter(splits.values()))
        pattern = re.sub(r"\d+(-of-\d+.*?)?(\.[a-z][\w.]*)$", r"*\2", name)
        shown = ", ".join(f"{split or 'none'} ({clean(name)})" for split, name in sorted(splits.items()))
        raise UserError(
            f"{files.source} holds more than one split: {shown}",
            hint=f"name one: {files.source.rstrip('/')}/{clean(pattern)}",
        )


def arrow_files(files: Files, found: Sequence[File], chosen: Sequence[File]) -> list[File]:
    """Returns the .arrow files that a state.json lists, as `datasets` leaves caches beside them. Without state.json, all of them.

    Raises UserError if a listed file is missing.
    """
    named: set[str] = set()
    states = [file for file in found if file.name.rpartition("/")[2] == STATE]
    for state in states:
        folder = state.name.removesuffix(STATE)
        listed = _json(files, state).get("_data_files") or []
        named |= {folder + part["filename"] for part in listed if isinstance(part, dict) and "filename" in part}
    kept = [file for file in chosen if file.name in named] if named else list(chosen)
    lacking = sorted(named - {file.name for file in kept})
    if lacking:
        raise UserError(f"{files.source}: {clean(lacking[0])} is missing, though {STATE} lists it")
    return kept


def metadata(
    names: Sequence[str], whole: Callable[[str], bytes], ask: Ask
) -> tuple[Table | None, Table | None, frozenset[str], tuple[str, ...]]:
    """Returns (labels, captions, the files that they come from, unused columns of these) from the metadata files among `names`.

    `whole` reads a file of the folder or archive. Paths in a metadata file are relative to its folder.
    """
    labels: dict[str, str | int | None] = {}
    captions: dict[str, str | int | None] = {}
    kinds: list[tuple[dict[str, str | int | None], str | None, Sequence[str], What]] = []
    if ask.labels not in ("none", "folders"):
        kinds.append((labels, ask.label_column, LABELS, "label"))
    if ask.captions is None:
        kinds.append((captions, ask.caption_column, CAPTIONS, "caption"))
    used, others, further = list[str](), dict[str, None](), 0
    for name in names if kinds else ():
        if not is_metadata(name):
            continue
        content = whole(name)
        folder = "".join(name.rpartition("/")[:2])
        columns = columns_in(clean(name), content)
        if {c for _, column, usual, _ in kinds for c in (*usual, column)}.isdisjoint(columns):
            continue
        used.append(name)
        taken = set[str]()
        for into, column, usual, what in kinds:
            wanted = column or next((c for c in usual if c in columns), None)
            if wanted:
                taken.add(wanted)
                table = parse_table(clean(name), content, column=wanted, defaults=usual, what=what)
                into |= {folder + path: value for path, value in table.values.items()}
                further += table.further
        others |= dict.fromkeys(column for column in columns if column not in taken)
    shown = clean(used[0]) if used else ""
    return (
        Table(shown, labels) if labels else None,
        Table(shown, captions, further=further) if captions else None,
        frozenset(used),
        tuple(others),
    )


def is_metadata(name: str) -> bool:
    """Whether the file is a metadata file, such as metadata.csv."""
    return name.rpartition("/")[2] in METADATA


def _features(files: Files, found: Sequence[File]) -> list[dict[str, Any]]:
    infos = [file for file in found if file.name.rpartition("/")[2] == INFO]
    out = [_json(files, file).get("features") for file in infos]
    card = _card(files, found)
    for config in card if isinstance(card, list) else [card]:
        features = config.get("features") if isinstance(config, dict) else None
        out.append({f["name"]: _named(f) for f in features or [] if isinstance(f, dict) and "name" in f})
    return [features for features in out if isinstance(features, dict)]


def _named(feature: dict[str, Any]) -> dict[str, Any]:
    """Converts a feature from the form of the data set card to that of dataset_info.json."""
    kind = feature.get("dtype")
    names = kind.get("class_label", {}).get("names") if isinstance(kind, dict) else None
    if isinstance(names, dict):
        numbers = {int(key): name for key, name in names.items() if str(key).isdecimal()}
        whole = sorted(numbers) == list(range(len(names)))
        names = (
            [numbers[i] for i in sorted(numbers)] if whole else None
        )  # with gaps in the numbers, the numbers are the names
    return {"names": names}


def _card(files: Files, found: Sequence[File]) -> Any:
    """Returns `dataset_info` from the YAML header of README.md, or {}."""
    if not any(file.name == CARD for file in found):
        return {}
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", files.whole(CARD).decode("utf-8", "replace"), re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        return {}
    return (
        values.get("dataset_info") or ({"features": []} if "configs" in values else {})
        if isinstance(values, dict)
        else {}
    )


def _json(files: Files, file: File) -> dict[str, Any]:
    try:
        values = json.loads(files.whole(file.name))
    except ValueError as error:
        raise UserError(f"{clean(file.name)} in {files.source} is not valid JSON") from error
    return values if isinstance(values, dict) else {}
