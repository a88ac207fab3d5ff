"""A model as it is kept and shared: a folder with weights.safetensors and model.json. No pickle.

model.json holds all that sampling needs: network, prediction, schedule, k, sampler, preprocessing. A student whose schedule is
not stored with it is sampled wrongly; so it is stored, and `DiffusionModel.sample` uses no other.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdistill_core.diffusion.schedules import schedule_from_dict, schedule_to_dict
from mmdistill_core.networks.classifier import Classifier
from mmdistill_core.networks.denoiser import Denoiser
from mmdistill_core.networks.dit import DiT, DiTConfig
from mmdistill_core.networks.extractor import Extractor
from mmdistill_core.networks.inception import Inception
from mmdistill_core.networks.mixture import Mixture
from mmdistill_core.networks.pixels import Pixels
from mmdistill_core.samplers import sample

WEIGHTS, MODEL = "weights.safetensors", "model.json"
FORMAT = 1
EXTRACTORS: dict[str, type[Extractor]] = {
    "classifier": Classifier,
    "inception": Inception,
    "mixture": Mixture,
    "pixels": Pixels,
}


class NotAModel(ValueError):
    """The folder does not hold a model that this version can read."""


@dataclass
class DiffusionModel:
    """A denoiser with how to sample it: `sampler` on the uniform grid of `k` steps.

    provenance  free JSON: recipe, method, data fingerprint, the teacher it came from, figures
    """

    denoiser: Denoiser
    k: int
    sampler: str = "ancestral"
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> DiTConfig:
        backbone = self.denoiser.backbone
        assert isinstance(backbone, DiT)
        return backbone.config

    def sample(
        self,
        n: int,
        *,
        label: Tensor | None = None,
        seed: int = 0,
        k: int | None = None,
        sampler: str | None = None,
        batch: int = 250,
        first: int = 0,
    ) -> Tensor:
        """n images [n, c, h, w] in [-1, 1] (clipped). Labels [n] are drawn evenly if the model has classes and none are given.

        Raises ValueError for a label out of range.
        """
        c = self.network
        if c.num_classes and label is None:
            label = torch.arange(n) % c.num_classes
        if label is not None and (int(label.min()) < 0 or int(label.max()) >= c.num_classes):
            classes = f"0 to {c.num_classes - 1}" if c.num_classes else "none: it is unconditional"
            raise ValueError(f"labels: {sorted(set(label.tolist()))} given; the model's classes are {classes}")
        images = sample(
            denoiser=self.denoiser,
            schedule=self.denoiser.schedule,
            shape=(n, c.channels, c.image_size, c.image_size),
            k=k or self.k,
            sampler=sampler or self.sampler,
            label=label,
            seed=seed,
            batch=batch,
            first=first,
            device=next(self.denoiser.parameters()).device,
        )
        return images.clamp(-1, 1)


def build_denoiser(*, network: DiTConfig, prediction: str, schedule: dict[str, Any]) -> Denoiser:
    return Denoiser(backbone=DiT(network), schedule=schedule_from_dict(schedule), prediction=prediction)


def _write(directory: Path, description: dict[str, Any], weights: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, directory / WEIGHTS)
    (directory / MODEL).write_text(json.dumps({"format": FORMAT, **description}, indent=2) + "\n")


def _read(directory: Path, *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (directory / MODEL).is_file() or not (directory / WEIGHTS).is_file():
        raise NotAModel(f"{directory}: not a model folder ({MODEL} and {WEIGHTS} are expected in it)")
    description = json.loads((directory / MODEL).read_text())
    if description.get("format") != FORMAT or description.get("kind") not in kinds:
        found = f"{description.get('kind')!r} of format {description.get('format')!r}"
        raise NotAModel(f"{directory / MODEL}: a {' or '.join(kinds)} of format {FORMAT} is expected, found {found}")
    return description, load_file(directory / WEIGHTS)


def save_model(directory: str | Path, model: DiffusionModel) -> None:
    denoiser = model.denoiser
    description = {
        "kind": "denoiser",
        "network": asdict(model.network),
        "prediction": denoiser.prediction,
        "schedule": schedule_to_dict(denoiser.schedule),
        "k": model.k,
        "sampler": {"name": model.sampler, "grid": "uniform"},
        "preprocessing": {"range": [-1, 1], "layout": "chw"},
        "provenance": model.provenance,
    }
    _write(Path(directory), description, denoiser.state_dict())


def load_model(directory: str | Path) -> DiffusionModel:
    """Raises NotAModel for a folder that is not one."""
    d, weights = _read(Path(directory), "denoiser")
    denoiser = build_denoiser(network=DiTConfig(**d["network"]), prediction=d["prediction"], schedule=d["schedule"])
    denoiser.load_state_dict(weights)
    denoiser.requires_grad_(False).eval()
    return DiffusionModel(denoiser, k=d["k"], sampler=d["sampler"]["name"], provenance=d["provenance"])


def save_extractor(directory: str | Path, extractor: Extractor, *, provenance: dict[str, Any]) -> None:
    description = {"kind": extractor.kind, "network": asdict(extractor.config), "provenance": provenance}
    _write(Path(directory), description, extractor.state_dict())


def load_extractor(directory: str | Path) -> Extractor:
    """Raises NotAModel for a folder that is not one."""
    d, weights = _read(Path(directory), *EXTRACTORS)
    kind = EXTRACTORS[d["kind"]]
    extractor = kind(kind.Config(**d["network"]))
    extractor.load_state_dict(weights)
    frozen: nn.Module = extractor.requires_grad_(False).eval()
    assert isinstance(frozen, Extractor)
    return frozen
