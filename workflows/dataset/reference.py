"""Reference statistics of a data set, against which samples are measured: built, saved, loaded, and checked for compatibility.

<folder>/statistics.safetensors   moments, and features for pairwise metrics
<folder>/statistics.json          counts, the fingerprint, and the floor (the Frechet distance between two halves of the data)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workflows.cluster.session import device_of_task, task_options
from workflows.dataset.extractors import check_extractor, wanted_in
from workflows.dataset.manifest import Manifest, Shard
from workflows.dataset.shards import REPAIR, read_labels, read_shards, split_by_shard
from workflows.dataset.sources import source_of
from workflows.dataset.sources.folder import checked
from workflows.errors import UserError
from workflows.storage.integrity import identity_of
from workflows.storage.local import write_json
from workflows.storage.store import fetch
from workflows.storage.uri import join, shown

if TYPE_CHECKING:
    from mmdistill_core.metrics.statistics import Statistics
    from workflows.config.schema import RunConfig

TENSORS, ABOUT = "statistics.safetensors", "statistics.json"
FORMAT = 1
AGREE = ("extractor", "weights", "resolution", "preprocessing")
"""Fingerprint fields that samples and a reference must share to be comparable. Data and counts may differ; they are shown."""


ROWS = 4096
"""Images per batch of the extractor."""
FLOORS = 3
"""Random splits over which the floor is averaged."""
AT_HAND = 4 * 2**20
"""Up to this many bytes of images, the driver computes the statistics itself: a Ray task would take longer to start."""


@dataclass(frozen=True)
class Reference:
    """
    fingerprint  data, rows, count, resolution, preprocessing, extractor, weights
    floor        Frechet distance between random halves of `near`
    """

    statistics: Statistics
    fingerprint: dict[str, Any]
    floor: float


def save_reference(folder: Path, reference: Reference) -> None:
    """Writes statistics.safetensors and statistics.json into `folder`, which is created if needed."""
    from safetensors.torch import save_file

    s, tensors = reference.statistics, {"near": reference.statistics.near.contiguous()}
    tensors |= {"features.mean": s.features.mean, "features.scatter": s.features.scatter}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS)
    about = {"format": FORMAT, "count": s.count, "near": len(s.near), "floor": {"frechet": reference.floor}}
    write_json(folder / ABOUT, about | {"fingerprint": reference.fingerprint})


def read_about(folder: Path) -> dict[str, Any]:
    """Returns the contents of statistics.json. Raises UserError for a folder without statistics of this format."""
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
    """Reads what `save_reference` wrote. Raises UserError for a folder without statistics of this format."""
    from safetensors.torch import load_file

    from mmdistill_core.metrics.frechet import Moments
    from mmdistill_core.metrics.statistics import Statistics

    about, tensors = read_about(folder), load_file(folder / TENSORS)

    moments = Moments(about["count"], tensors["features.mean"], tensors["features.scatter"])
    statistics = Statistics(moments, None, tensors["near"], logits=None, predicted=None)
    return Reference(statistics, about["fingerprint"], about["floor"]["frechet"])


def check_reference(config: RunConfig, prepared: str, result: dict[str, Any]) -> Path:
    """Returns the folder of the statistics that the main figures are measured against: `evaluate.reference`, else the run's own.

    prepared, result: the folder of the stage `prepare`, and what it returned. Raises a UserError that names the fields in which
    `evaluate.reference` and the run's own differ, or if too few features are kept for `evaluate.neighbours`.
    """
    main, rows, neighbours = result["reporting"][0], config.data.reference, config.evaluate.neighbours
    folder = fetch(config.evaluate.reference or join(prepared, main["place"], "statistics", rows))
    about, own = read_about(folder), main["statistics"][rows]["fingerprint"]
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
    """Checks the files and folders that the configuration names, before anything starts. Raises UserError."""
    if config.data.source == "folder":
        checked(config.data.path)
    source = source_of(config.data)
    chooses, reporting = wanted_in(config.data, shape=source.shape, num_classes=source.num_classes)
    for one in (chooses, *reporting):
        check_extractor(one.kind, one.weights, shape=source.shape, num_classes=source.num_classes)
    if config.evaluate.reference:
        found, main = read_about(fetch(config.evaluate.reference))["fingerprint"]["extractor"], reporting[0].kind
        if found != main:
            raise UserError(
                f"evaluate.reference: its features come from extractor {found!r}, the main ones of this run from {main!r}",
                hint=f"set data.reporting=[{found}], or leave out evaluate.reference",
            )


# Building the statistics


def about_of(manifest: Manifest, extractor: Any) -> dict[str, Any]:
    """The fingerprint of the statistics of this data set with this extractor, without the fields `rows` and `count`."""
    return {
        "data": manifest.fingerprint,
        "resolution": list(manifest.shape),
        "preprocessing": f"{manifest.preprocessing}, [0, 1] to [-1, 1]; {extractor.preprocessing}",
        "extractor": extractor.kind,
        "weights": extractor.fingerprint(),
    }


def kept_reference(root: str, manifest: Manifest, which: str, *, near: int, fingerprint: dict[str, Any]) -> Path | None:
    """Returns the folder of the statistics stored with the data set, or None if `build_reference` would make different ones.

    Raises UserError if the files differ from their hash in the manifest.
    """
    kept = manifest.statistics.get("rows", {}).get(which)
    if kept is None or kept["near"] != min(near, kept["count"]):
        return None
    folder = fetch(join(root, "statistics", which))
    files = (folder / TENSORS, folder / ABOUT)
    if not all(file.is_file() for file in files) or identity_of(*files) != kept["identity"]:
        raise UserError(f"{shown(root)}/statistics/{which}: the statistics differ from the manifest", hint=REPAIR)
    return folder if read_about(folder)["fingerprint"] == fingerprint else None


def build_reference(
    root: str,
    manifest: Manifest,
    which: str,
    *,
    extractor: str,
    near: int,
    seed: int,
    fingerprint: dict[str, Any],
    cpus: int,
    tick: Callable[[int], None],
    task: dict[str, Any] | None = None,
    device: str = "cpu",
    like: str | None = None,
) -> Reference:
    """Computes the statistics of the rows `which` of a data set, and keeps the features of `near` random rows.

    Each shard is a Ray task, and at most `cpus` + 2 run at once. A small data set is processed in this process instead. task: the
    options of a Ray task. device: where it computes. tick: called with the number of images done. like: rows whose proportions of
    labels the images have in `reweighed`.
    """
    import ray
    import torch

    from mmdistill_core.metrics.statistics import merged
    from mmdistill_core.rng import generator

    shards = [shard for shard in manifest.shards if shard.count(which)]
    counts = [shard.count(which) for shard in shards]
    chosen = torch.randperm(sum(counts), generator=generator(seed, 6))[:near].sort().values
    kept = split_by_shard(chosen.numpy(), counts)
    here = device == "cpu" and fingerprint["extractor"] != "inception" and manifest.in_memory() <= AT_HAND
    about = manifest if here else ray.put(manifest)
    weights = _weights(root, manifest, which, like) if like else None
    calls = [
        (extractor, root, about, shard, which, rows, device, weights) for shard, rows in zip(shards, kept, strict=True)
    ]
    parts: dict[int, Any] = {}
    for i, part in _here(calls) if here else _spread(calls, task or task_options(use_gpu=False), at_once=cpus + 2):
        parts[i] = part
        tick(sum(counts[i] for i in parts))
    statistics = merged([parts[i] for i in range(len(shards))])
    return Reference(statistics, fingerprint, floor(statistics.near))


def _weights(root: str, manifest: Manifest, which: str, like: str) -> np.ndarray:
    """The weight of an image by its label + 1, so that the rows `which` have the proportions of the rows `like`."""
    import torch

    from mmdistill_core.samplers.labels import label_weights

    own, others = (torch.from_numpy(read_labels(root, manifest, rows)).long() for rows in (which, like))
    by_label: np.ndarray = label_weights(own, others, torch.arange(-1, manifest.num_classes)).numpy()
    return by_label


def _here(calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Yields (number, result) of `statistics_of` for each of these arguments, computed in this process."""
    import torch

    before = torch.get_num_threads()
    try:
        for i, call in enumerate(calls):
            yield i, statistics_of(*call)
    finally:
        torch.set_num_threads(before)


def _spread(calls: Sequence[tuple[Any, ...]], options: dict[str, Any], *, at_once: int) -> Iterator[tuple[int, Any]]:
    """Like `_here`, but in Ray tasks with these options, and in the order in which the results arrive."""
    import ray

    remote = ray.remote(**options)(statistics_of)
    waiting, running = list(enumerate(calls)), dict[Any, int]()
    while waiting or running:
        while waiting and len(running) < at_once:
            i, call = waiting.pop(0)
            running[remote.remote(*call)] = i
        for done in ray.wait(list(running), num_returns=1, timeout=0.5)[0]:
            yield running.pop(done), ray.get(done)


def statistics_of(
    extractor: str,
    root: str,
    manifest: Manifest,
    shard: Shard,
    which: str,
    near: np.ndarray,
    device: str = "cpu",
    weights: np.ndarray | None = None,
) -> Any:
    """The body of a Ray task, on one thread: the statistics of a shard, with the extractor loaded from its folder. weights: of
    `_weights`.

    Logits and predictions are dropped, because only samples need them.
    """
    import torch

    from mmdistill_core.artifact import load_extractor
    from mmdistill_core.images import centred
    from mmdistill_core.metrics.statistics import merged, statistics

    torch.set_num_threads(1)
    device = device_of_task(device)
    rows, network = read_shards(root, manifest, [shard], which), load_extractor(fetch(extractor)).to(device)
    values, kept, parts = torch.from_numpy(rows.images.copy()), torch.from_numpy(near.copy()), []
    weight = None if weights is None else torch.from_numpy(weights[np.asarray(rows.labels) + 1])
    for first in range(0, len(values), ROWS):
        part, here = centred(values[first : first + ROWS].to(device)), kept[(kept >= first) & (kept < first + ROWS)]
        weighed = None if weight is None else weight[first : first + ROWS]
        parts.append(statistics(network, part, near=here - first, weight=weighed))
    return replace(merged(parts), logits=None, predicted=None)


def floor(features: Any) -> float:
    """The Frechet distance between two random halves, averaged over FLOORS splits."""
    import torch

    from mmdistill_core.metrics.frechet import frechet_distance, moments
    from mmdistill_core.rng import generator

    out = []
    for seed in range(FLOORS):
        order = torch.randperm(len(features), generator=generator(seed, 4))
        half = len(order) // 2
        a, b = features[order[:half]], features[order[half : 2 * half]]
        out.append(frechet_distance(moments(a), moments(b)))
    return float(np.mean(out))
