"""Reference statistics: the data's side of every measure, in a folder that says what it was made of; refused where it does not fit.

<folder>/statistics.safetensors   moments, features for measures of pairs
<folder>/statistics.json          counts, the fingerprint, and the floor: the distance of half the data to the other half
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflows.config import RunConfig
from workflows.runtime.errors import UserError
from workflows.runtime.storage import fetch
from workflows.runtime.uri import is_remote, join
from workflows.runtime.workspace import write_json
from workflows.sources import source_of

if TYPE_CHECKING:
    from mmdistill_core.metrics.statistics import Statistics

TENSORS, ABOUT = "statistics.safetensors", "statistics.json"
FORMAT = 1
AGREE = ("extractor", "weights", "resolution", "preprocessing")
"""What samples and a reference must have in common to be compared at all. Their data and counts may differ, and are shown."""


@dataclass(frozen=True)
class Reference:
    """
    fingerprint  data, rows, count, resolution, preprocessing, extractor, weights
    floor        Frechet distance of one half of `near` to the other: what no sampler of so few beats by much
    """

    statistics: Statistics
    fingerprint: dict[str, Any]
    floor: dict[str, float]


def save_reference(folder: Path, reference: Reference) -> None:
    from safetensors.torch import save_file

    s, tensors = reference.statistics, {"near": reference.statistics.near.contiguous()}
    for name, m in (("features", s.features), ("pixels", s.pixels)):
        if m is not None:
            tensors |= {f"{name}.mean": m.mean, f"{name}.scatter": m.scatter}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS)
    about = {"format": FORMAT, "count": s.count, "near": len(s.near), "floor": reference.floor}
    write_json(folder / ABOUT, about | {"fingerprint": reference.fingerprint})


def read_about(folder: Path) -> dict[str, Any]:
    """statistics.json. Raises UserError for a folder that holds no statistics."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        if about["format"] == FORMAT and (folder / TENSORS).is_file() and set(AGREE) <= about["fingerprint"].keys():
            return dict(about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f"reference: {folder} holds no statistics of format {FORMAT} ({ABOUT} and {TENSORS})",
        hint="name a folder that `mmdistill run` wrote: <workspace>/stages/prepare-<key>/statistics/<rows>",
    )


def load_reference(folder: Path) -> Reference:
    from safetensors.torch import load_file

    from mmdistill_core.metrics.frechet import Moments
    from mmdistill_core.metrics.statistics import Statistics

    about, tensors = read_about(folder), load_file(folder / TENSORS)

    def moments(name: str) -> Moments:
        return Moments(about["count"], tensors[f"{name}.mean"], tensors[f"{name}.scatter"])

    pixels = moments("pixels") if "pixels.mean" in tensors else None
    statistics = Statistics(moments("features"), pixels, tensors["near"], logits=None, predicted=None)
    return Reference(statistics, about["fingerprint"], about["floor"])


def reference_folder(config: RunConfig, statistics: str) -> Path:
    """The statistics that samples are measured against: the user's, or the run's own, which are below `statistics`."""
    return fetch(Path(named).expanduser() if (named := config.evaluate.reference) and not is_remote(named)
                 else named or join(statistics, config.data.reference))  # fmt: skip


def check_reference(config: RunConfig, statistics: str, result: dict[str, Any]) -> Path:
    """`reference_folder`, if its fingerprint fits what `prepare` returned. Raises UserError that names what differs."""
    folder, own = reference_folder(config, statistics), result["statistics"][config.data.reference]["fingerprint"]
    about, neighbours = read_about(folder), config.evaluate.neighbours
    found = about["fingerprint"]
    fields = AGREE if config.evaluate.reference else tuple(own)
    if wrong := [f"{f} {found.get(f)!r} where this run has {own[f]!r}" for f in fields if found.get(f) != own[f]]:
        raise UserError(
            f"reference: the statistics in {folder} are of {', '.join(wrong)}",
            hint="a distance between features made in two ways means nothing; leave out evaluate.reference to use the run's own",
        )
    if about["near"] <= neighbours:
        raise UserError(
            f"evaluate.neighbours: {neighbours} is too many for the {about['near']} features kept in {folder}"
        )
    return folder


def check_inputs(config: RunConfig) -> None:
    """What measuring needs, before anything starts: the files that the configuration names. Raises UserError."""
    if config.data.extractor == "pixels":
        from mmdistill_core.metrics.statistics import PIXELS

        if (dims := math.prod(source_of(config.data).shape)) > PIXELS:
            raise UserError(
                f"data.extractor: pixels is for at most {PIXELS:,} dimensions, {config.data.source} has {dims:,}"
            )
    if config.data.extractor == "inception":
        from mmdistill_core.networks.inception import NotInception, load_inception

        try:
            load_inception(str(config.data.extractor_weights))
        except NotInception as error:
            raise UserError(
                f"data.extractor_weights: {error}",
                hint="pt_inception-2015-12-05-6726825d.pth, as pytorch-fid and torch-fidelity have it; see docs/evaluation.md",
            ) from error
    if config.evaluate.reference:
        found = read_about(reference_folder(config, ""))["fingerprint"]["extractor"]
        if found != config.data.extractor:
            raise UserError(
                f"evaluate.reference: its features are of extractor {found!r}, this run's of {config.data.extractor!r}",
                hint=f"set data.extractor={found}, or leave out evaluate.reference",
            )
