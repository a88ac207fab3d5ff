"""Metadata of Hugging Face data sets, read without the library `datasets`: class names, Arrow files, splits."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

from workflows.dataset.readers.files import File, Files, clean, whole
from workflows.dataset.readers.labels import SPLITS
from workflows.errors import UserError

INFO, CARD, STATE = "dataset_info.json", "README.md", "state.json"
DESCRIBED = (INFO, CARD, STATE, "dataset_dict.json")


def class_names(files: Files, found: Sequence[File]) -> dict[str, tuple[str, ...]] | None:
    """Returns the class names by column, from dataset_info.json or the header of README.md. None if neither describes the data: the
    tables are not a Hugging Face data set.
    """
    infos = [file for file in found if file.name.rpartition("/")[2] == INFO]
    card = _card(files, found)
    if not infos and not card and not any(file.name.rpartition("/")[2] == "dataset_dict.json" for file in found):
        return None
    pairs: list[tuple[str, Any]] = []
    for file in infos:
        features = _json(files, file).get("features")
        if isinstance(features, dict):
            pairs += [(column, f.get("names")) for column, f in features.items() if isinstance(f, dict)]
    for config in card if isinstance(card, list) else [card]:
        features = config.get("features") if isinstance(config, dict) else None
        pairs += [(f["name"], _card_names(f)) for f in features or [] if isinstance(f, dict) and "name" in f]
    names: dict[str, tuple[str, ...]] = {}
    for column, classes in pairs:
        if isinstance(classes, list):
            names.setdefault(column, tuple(map(str, classes)))
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
    """Returns the .arrow files that state.json lists, because `datasets` leaves caches next to them; without it, all of them.

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


def _card_names(feature: dict[str, Any]) -> Any:
    """Returns the class names of a feature in the data set card, which has them by number."""
    kind = feature.get("dtype")
    names = kind.get("class_label", {}).get("names") if isinstance(kind, dict) else None
    if not isinstance(names, dict):
        return names
    by_number = {int(key): name for key, name in names.items() if str(key).isdecimal()}
    if sorted(by_number) != list(range(len(names))):
        return None  # with gaps, the numbers are the names
    return [by_number[i] for i in range(len(names))]


def _card(files: Files, found: Sequence[File]) -> Any:
    """Returns `dataset_info` from the YAML header of README.md, or {}."""
    if not any(file.name == CARD for file in found):
        return {}
    text = whole(CARD, files.read_many, files.source).decode("utf-8", "replace")
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        return {}
    if not isinstance(values, dict):
        return {}
    return values.get("dataset_info") or ({"features": []} if "configs" in values else {})


def _json(files: Files, file: File) -> dict[str, Any]:
    try:
        values = json.loads(whole(file.name, files.read_many, files.source))
    except ValueError as error:
        raise UserError(f"{clean(file.name)} in {files.source} is not valid JSON") from error
    return values if isinstance(values, dict) else {}
