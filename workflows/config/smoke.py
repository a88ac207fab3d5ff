"""--smoke: what makes any recipe so small that its whole pipeline runs in seconds, three training steps a stage."""

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
DISTILL: dict[str, Any] = TRAINING | {"validate_samples": 20, "collect_batches": 2}
SMALL: dict[str, Any] = {
    "data": {"limit": 240, "classifier_epochs": 1},
    "network": {"width": 16, "depth": 1, "heads": 2},
    "teacher": TRAINING,
    "distill": DISTILL,
    "evaluate": {"samples": 20, "seeds": 1, "teacher_steps": [1, 2]},
    # Three steps teach nothing that a gate could pass; only a worse distance than the champion's is refused.
    "gate": {"teacher_ratio": None, "frechet": None, "recall": 0.0},
}


def smoke_values(config: RunConfig) -> dict[str, Any]:
    """All values of `config`, made small. What is not a matter of size stays: patches, the method, its settings by k (the least
    and the largest k are distilled). A recipe whose folder is not given gets made images of the same shape.
    """
    values, own = merge(config.model_dump(), SMALL), config.distill
    values["recipe"] += "-smoke"
    values["distill"]["k"] = sorted({min(own.k), max(own.k)})
    values["distill"]["validate_every"] = min(24, own.validate_every)
    for section in ("teacher", "distill"):
        if values[section]["micro_batch"]:
            values[section]["micro_batch"] = 4
    values["distill"]["overrides"] = {
        k: without(fields, DISTILL | {"micro_batch": 0}) for k, fields in own.overrides.items()
    }
    values["gate"]["overrides"] = {}
    if config.data.source == "dataset":
        values["data"]["limit"] = None  # its size was chosen when it was prepared
    if config.data.source == "folder" and config.data.path is None:
        values["data"]["source"] = "made"
    return values
