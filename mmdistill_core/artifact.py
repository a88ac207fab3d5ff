"""A model as it is kept and shared: a folder with weights.safetensors and model.json. No pickle.

model.json holds all that sampling needs: network, prediction, schedule, k, sampler, preprocessing. A student whose schedule is
not stored with it is sampled wrongly; so it is stored, and `DiffusionModel.sample` uses no other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdistill_core.diffusion.guidance import NULL_LABEL
from mmdistill_core.diffusion.schedules import schedule_from_dict, schedule_to_dict
from mmdistill_core.networks.classifier import Classifier
from mmdistill_core.networks.denoiser import Denoiser
from mmdistill_core.networks.dit import DiT, DiTConfig
from mmdistill_core.networks.exact import MixtureConfig, MixtureDenoiser
from mmdistill_core.networks.extractor import Extractor
from mmdistill_core.networks.inception import Inception
from mmdistill_core.networks.mixture import Mixture
from mmdistill_core.networks.pixels import Pixels
from mmdistill_core.samplers import Denoise, clipped_denoiser, guided_denoiser, sample, told_denoiser

WEIGHTS, MODEL, SECOND_MOMENTS = "weights.safetensors", "model.json", "second_moments.safetensors"
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
    """A denoiser with how to sample it: `sampler`, with its `options`, on the uniform grid of `k` steps.

    null_label  labels were hidden in its training, so that it can be guided
    guidance    (low, high) that it was told in distillation, and imitates
    provenance  free JSON: recipe, method, data fingerprint, the teacher it came from, figures
    """

    denoiser: Denoiser | MixtureDenoiser
    k: int
    sampler: str = "ancestral"
    options: dict[str, float] = field(default_factory=dict)
    null_label: bool = False
    guidance: tuple[float, float] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> DiTConfig | MixtureConfig:
        if isinstance(self.denoiser, MixtureDenoiser):
            return self.denoiser.config
        backbone = self.denoiser.backbone
        assert isinstance(backbone, DiT)
        return backbone.config

    def steered(self, *, guidance: float | None, clip_x: bool) -> Denoise:
        """The denoiser under guidance: by its null label, or as it was told in distillation. Raises ValueError if it can't be."""
        denoise: Denoise = self.denoiser
        if self.guidance is not None:
            low, high = self.guidance
            w = low if guidance is None else guidance
            if not low <= w <= high:
                raise ValueError(f"guidance: {w:g} is not within {low:g} to {high:g}, which the model learnt")
            denoise = told_denoiser(self.denoiser, guidance=w)
        elif guidance:
            if not self.network.num_classes:
                raise ValueError(f"guidance: {guidance:g} for an unconditional model")
            if not self.null_label:
                raise ValueError(f"guidance: {guidance:g} for a model that never learnt the null label")
            denoise = guided_denoiser(self.denoiser, w=guidance)
        return clipped_denoiser(denoise) if clip_x else denoise

    def check_labels(self, labels: Iterable[int]) -> None:
        """Raises ValueError for a class that the model does not have."""
        lowest, classes = NULL_LABEL if self.null_label else 0, self.network.num_classes
        if wrong := sorted({one for one in labels if not lowest <= one < classes}):
            known = f"0 to {classes - 1}" if classes else "none: it is unconditional"
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(f"labels: {wrong[:5]}{more} given; the model's classes are {known}")

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
        guidance: float | None = None,
        clip_x: bool = False,
        **options: float,
    ) -> Tensor:
        """Images `first` to `first + n` of a seed, [n, c, h, w] in [-1, 1] (clipped): image i depends on the seed, on i and on its
        label alone. Labels [n] are all in turn, by i, if the model has classes and none are given.
        `options` are the sampler's (`samplers.ancestral`), in place of the model's own.

        Raises ValueError for a label out of range, and for guidance that the model does not know.
        """
        c = self.network
        if c.num_classes and label is None:
            label = torch.arange(first, first + n) % c.num_classes
        if label is not None:
            self.check_labels(label.tolist())
        own = self.options if sampler in (None, self.sampler) else {}
        images = sample(
            denoiser=self.steered(guidance=guidance, clip_x=clip_x),
            schedule=self.denoiser.schedule,
            shape=(n, c.channels, c.image_size, c.image_size),
            k=self.k if k is None else k,
            sampler=sampler or self.sampler,
            label=label,
            seed=seed,
            batch=batch,
            first=first,
            device=next(self.denoiser.parameters()).device,
            **own | options,
        )
        return images.clamp(-1, 1)


def build_denoiser(*, network: DiTConfig, prediction: str, schedule: dict[str, Any]) -> Denoiser:
    return Denoiser(backbone=DiT(network), schedule=schedule_from_dict(schedule), prediction=prediction)


def _build(description: dict[str, Any]) -> Denoiser | MixtureDenoiser:
    """The denoiser that a model.json describes, without its weights."""
    options = dict(description["network"])
    if options.pop("kind", "dit") == "mixture":
        return MixtureDenoiser.empty(MixtureConfig(**options), schedule=schedule_from_dict(description["schedule"]))
    return build_denoiser(
        network=DiTConfig(**options), prediction=description["prediction"], schedule=description["schedule"]
    )


def _write(directory: Path, description: dict[str, Any], weights: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, directory / WEIGHTS)
    (directory / MODEL).write_text(json.dumps({"format": FORMAT, **description}, indent=2) + "\n")


def _read(directory: Path, *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (directory / MODEL).is_file() or not (directory / WEIGHTS).is_file():
        raise NotAModel(f"{directory}: not a model folder ({MODEL} and {WEIGHTS} are expected in it)")
    try:
        description = json.loads((directory / MODEL).read_text())
        weights = load_file(directory / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise NotAModel(f"{directory}: a damaged model folder: {' '.join(str(error).split())}") from error
    if description.get("format") != FORMAT or description.get("kind") not in kinds:
        found = f"{description.get('kind')!r} of format {description.get('format')!r}"
        raise NotAModel(f"{directory / MODEL}: a {' or '.join(kinds)} of format {FORMAT} is expected, found {found}")
    return description, weights


def save_model(directory: str | Path, model: DiffusionModel) -> None:
    denoiser = model.denoiser
    description = {
        "kind": "denoiser",
        "network": {"kind": "dit" if isinstance(denoiser, Denoiser) else "mixture", **asdict(model.network)},
        "prediction": denoiser.prediction,
        "schedule": schedule_to_dict(denoiser.schedule),
        "k": model.k,
        "sampler": {"name": model.sampler, "grid": "uniform", **model.options},
        "null_label": model.null_label,
        "guidance": model.guidance,
        "preprocessing": {"range": [-1, 1], "layout": "chw"},
        "provenance": model.provenance,
    }
    _write(Path(directory), description, denoiser.state_dict())


def load_model(directory: str | Path) -> DiffusionModel:
    """Raises NotAModel for a folder that is not one."""
    d, weights = _read(Path(directory), "denoiser")
    denoiser = _build(d)
    denoiser.load_state_dict(weights)
    denoiser.requires_grad_(False).eval()
    return DiffusionModel(
        denoiser,
        k=d["k"],
        sampler=d["sampler"]["name"],
        options={name: value for name, value in d["sampler"].items() if name not in ("name", "grid")},
        null_label=d.get("null_label", False),
        guidance=tuple(d["guidance"]) if d.get("guidance") else None,
        provenance=d["provenance"],
    )


def save_second_moments(directory: str | Path, moments: dict[str, Tensor]) -> None:
    """Beside a teacher's weights: the mean squares of its gradients by parameter, which make instant moment matching's Lambda."""
    directory = Path(directory)
    own = {name: value.detach().cpu().contiguous() for name, value in moments.items()}
    save_file(own, directory / SECOND_MOMENTS, metadata={"weights": _hash(directory / WEIGHTS)})


def check_second_moments(directory: str | Path) -> Path:
    """The file of them, if it is there and of the weights beside it. Raises NotAModel."""
    path = Path(directory) / SECOND_MOMENTS
    if not path.is_file():
        raise NotAModel(f"{path}: the teacher has none; take preconditioner 'collected' or 'identity'")
    with safe_open(path, framework="pt") as file:
        found = file.metadata().get("weights")
    if found != _hash(path.with_name(WEIGHTS)):
        raise NotAModel(f"{path}: of other weights than {WEIGHTS} beside it; take preconditioner 'collected'")
    return path


def load_second_moments(directory: str | Path) -> dict[str, Tensor]:
    """Raises NotAModel (`check_second_moments`)."""
    return load_file(check_second_moments(directory))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
