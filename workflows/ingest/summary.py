"""Summarises a preparation: where labels and captions came from, and what was left out. For the manifest and the terminal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from workflows.dataset.readers import Listing
from workflows.dataset.readers.files import NO_SUFFIX, LeftOut, clean

SHOWN, KINDS = 5, 20
"""Maximum names in the line, and maximum kinds of reasons in the manifest; rarer kinds are counted together."""
UNLABELLED = "has no label"


def summarise(
    listing: Listing,
    *,
    images: int,
    captioned: int,
    left_out: LeftOut,
    reasons: Mapping[str, int],
    classes: int,
) -> dict[str, Any]:
    """The manifest's `taken`: the sources of labels and captions, what was left out, and the line for the terminal.

    images, captioned  images that were taken, and those of them that have a caption
    left_out           files and columns that were skipped while reading
    reasons            why images were left out: a count for each kind of reason
    """
    found = left_out + Counter({(what, why): count for what, why, count in listing.left_out})
    often = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    found.update({("images", kind): count for kind, count in often[:KINDS]})
    if rest := sum(count for _, count in often[KINDS:]):
        found["images", "other reasons"] += rest
    values: dict[str, Any] = {
        "labels": {"by": listing.labelled, "classes": classes},
        "captions": {"by": (listing.captioned or "files beside the images") if captioned else "", "images": captioned},
        "left_out": [
            {"what": what, "why": why, "count": count}
            for (what, why), count in sorted(found.items(), key=lambda pair: (pair[0][1], -pair[1], pair[0][0]))
        ],
    }
    return values | {"said": summary_line(values, listing.classes, images)}


def summary_line(taken: Mapping[str, Any], classes: Sequence[str], images: int) -> str:
    """A line such as: labels: 3 classes by folders (a, b, c); captions: none; left out: 120 .txt, 20 .heic (not images)."""
    by, count = taken["labels"]["by"], taken["labels"]["classes"]
    names = f" ({_few([clean(name) for name in classes])})" if classes else ""
    labels = f"{count:,} class{'es' if count > 1 else ''} by {by}{names}" if by else "none"
    by, captioned = taken["captions"]["by"], taken["captions"]["images"]
    without = images - captioned
    lacking = f", {without:,} image{'s have' if without > 1 else ' has'} none" if without else ""
    captions = f"{captioned:,} by {by}{lacking}" if captioned else "none"
    return f"labels: {labels}; captions: {captions}; left out: {_left_out(taken['left_out']) or 'nothing'}"


def _left_out(entries: Sequence[Mapping[str, Any]]) -> str:
    by_why: dict[str, list[str]] = {}
    for entry in entries:
        by_why.setdefault(entry["why"], []).append(_counted(entry["what"], entry["count"]))
    return "; ".join(f"{_few(whats)} ({why})" for why, whats in by_why.items())


def _counted(what: str, count: int) -> str:
    if what.startswith("column "):
        return what
    what = {"images": "image" if count == 1 else what, NO_SUFFIX: "without a suffix"}.get(what, what)
    return f"{count:,} {what}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def kind_of(reason: str) -> str:
    """The kind of a reason: the text without details of one image, such as names, sizes or decoder messages."""
    text = re.sub(r"^\S*[\d.]\S*: ", "", reason)
    text = re.sub(r"\(.*?\)", "", text).partition(":")[0]
    return " ".join(re.sub(r"(?<![\w-])\d[\d,.]*(?![\w-])", "...", text).split())
