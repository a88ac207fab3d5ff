"""--smoke: shrinks any recipe so that its whole pipeline runs in seconds, with three training steps a stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workflows.config.values import merge, without

if TYPE_CHECKING:
    from workflows.config.schema import RunConfig

TRAINING: dict[str, Any] = {
    "images": 24,
    "batch": 8,
    "log_every": 8,
    "checkpoint_every": 24,
    "optimiser": {"warmup_images": 8},
}
DISTILL: dict[str, Any] = TRAINING | {"validate_samples": 20}
SMALL: dict[str, Any] = {
    "data": {"limit": 240, "classifier_epochs": 1},
    "teacher": TRAINING,
    "distill": DISTILL,
    "evaluate": {"samples": 20, "seeds": 1, "teacher_steps": [1, 2]},
    # After three steps no student would pass a gate. Only a distance worse than the champion's is refused.
    "gate": {"teacher_ratio": None, "frechet": None, "recall": 0.0},
}


def smoke_values(config: RunConfig) -> dict[str, Any]:
    """All values of `config`, made small. Other settings stay: patches, the method, its settings per k. Only the smallest and the
    largest k are distilled. A recipe for a folder, if none is given, gets generated images of the same shape.
    """
    from mmdistill_core.methods import method_class
    from mmdistill_core.networks.config import network_class

    distill, small = config.distill, dict(method_class(config.distill.method).small)
    of_parts = {"network": dict(network_class(config.network.kind).small), "distill": small}
    values = merge(merge(config.model_dump(), SMALL), of_parts)
    values["recipe"] += "-smoke"
    values["distill"]["k"] = sorted({min(distill.k), max(distill.k)})
    values["distill"]["validate_every"] = min(24, distill.validate_every)
    for section in ("teacher", "distill"):
        if values[section]["micro_batch"]:
            values[section]["micro_batch"] = 4
    values["distill"]["overrides"] = {
        k: without(fields, DISTILL | small | {"micro_batch": 0}) for k, fields in distill.overrides.items()
    }
    values["gate"]["overrides"] = {}
    if config.data.source == "dataset":
        values["data"]["limit"] = None  # limit belongs to `mmdistill prepare`
    if config.data.source == "folder" and config.data.path is None:
        values["data"]["source"] = "made"
    return values
