"""A stored model: a folder with weights.safetensors and model.json. No pickle.

model.json holds all that sampling needs: network, prediction, schedule, k, samplers, preprocessing. Sampling a student with another
schedule than its own goes wrong, so the schedule is stored with it, and `DiffusionModel.sample` uses no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdistill_core.diffusion.guidance import NULL_LABEL, squeezed
from mmdistill_core.diffusion.schedules import Schedule, schedule_from_dict, schedule_to_dict
from mmdistill_core.diffusion.times import uniform_grid
from mmdistill_core.files import sha256_of
from mmdistill_core.methods.base import Sampler
from mmdistill_core.networks.config import NetworkConfig, network_config
from mmdistill_core.networks.denoiser import Denoiser
from mmdistill_core.networks.extractor import Extractor
from mmdistill_core.plugins import named, names
from mmdistill_core.samplers.samplers import (
    Denoise,
    clipped_denoiser,
    conditioned_denoiser,
    guided_denoiser,
    sample,
)

WEIGHTS, MODEL = "weights.safetensors", "model.json"
FORMAT = 2
READ = (1, 2)
EXTRACTORS: dict[str, str] = {
    "classifier": "mmdistill_core.networks.classifier:Classifier",
    "inception": "mmdistill_core.networks.inception:Inception",
    "mixture": "mmdistill_core.networks.mixture:Mixture",
    "pixels": "mmdistill_core.networks.pixels:Pixels",
    "random": "mmdistill_core.networks.random_features:RandomFeatures",
}
"""Extractors by kind, imported on first use."""


class NotAModel(ValueError):
    """The folder does not hold a model that this version can read."""


@dataclass
class DiffusionModel:
    """A denoiser and its samplers.

    k           the default number of steps
    samplers    by k. A sampler on the uniform grid without conditions also serves any other k
    null_label  its training hid some labels, so it can be guided
    provenance  free JSON: recipe, method, data fingerprint, its teacher, figures
    """

    denoiser: nn.Module
    k: int
    samplers: dict[int, Sampler] = field(default_factory=dict)
    null_label: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.samplers = self.samplers or {self.k: Sampler()}

    @property
    def network(self) -> NetworkConfig:
        config: NetworkConfig = (
            self.denoiser.backbone if isinstance(self.denoiser, Denoiser) else self.denoiser
        ).config  # type: ignore[assignment]
        return config

    @property
    def schedule(self) -> Schedule:
        schedule: Schedule = self.denoiser.schedule  # type: ignore[assignment]
        return schedule

    def sampler(self, k: int | None = None) -> Sampler:
        """The sampler for k steps. Raises ValueError if the model has none."""
        k = self.k if k is None else k
        own = self.samplers.get(k, self.samplers[self.k])
        if k not in self.samplers and (own.times is not None or own.conditions):
            known = ", ".join(map(str, sorted(self.samplers)))
            raise ValueError(f"steps: {k} asked for; the model is sampled in {known}")
        return own

    def steered(self, sampler: Sampler, *, k: int, guidance: float | None, clip_x: bool) -> Denoise:
        """The denoiser with the sampler's conditions at each step, and with guidance: as a condition, or through the null label.
        Raises ValueError if the model can't be guided in this way.
        """
        denoise: Denoise = self.denoiser
        values: dict[str, Sequence[float]] = {name: list(steps) for name, steps in sampler.conditions.items()}
        for name, (low, high) in sampler.ranges.items():
            w = guidance if name == "guidance" and guidance is not None else low
            if not low <= w <= high:
                raise ValueError(f"{name}: {w:g} is not within {low:g} to {high:g}, which the model learnt")
            values[name] = [squeezed(torch.tensor(w)).item() if name == "guidance" else w] * k
        if values:
            denoise = conditioned_denoiser(self.denoiser, times=times_of(sampler, k), values=values)
        if guidance and "guidance" not in sampler.ranges:
            if not self.network.num_classes:
                raise ValueError(f"guidance: {guidance:g} for an unconditional model")
            if not self.null_label:
                raise ValueError(f"guidance: {guidance:g} for a model that never learnt the null label")
            denoise = guided_denoiser(denoise, w=guidance)
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
        """Images `first` to `first + n` of a seed, [n, c, h, w] in [-1, 1] (clipped). Image i depends only on the seed, on i and on
        its label. Without labels [n], a model with classes takes class i modulo their number. `options` are the sampler's
        (`samplers.ancestral`), and replace those stored with the model.

        Raises ValueError for a label out of range, and for guidance that the model does not support.
        """
        c, steps = self.network, self.k if k is None else k
        if c.num_classes and label is None:
            label = torch.arange(first, first + n) % c.num_classes
        if label is not None:
            self.check_labels(label.tolist())
        own = self.sampler(steps)
        other = sampler is not None and sampler != own.name
        images = sample(
            denoiser=self.steered(own, k=steps, guidance=guidance, clip_x=clip_x),
            schedule=self.schedule,
            shape=(n, c.channels, c.image_size, c.image_size),
            times=times_of(own, steps),
            sampler=sampler or own.name,
            label=label,
            seed=seed,
            batch=batch,
            first=first,
            device=next(self.denoiser.parameters()).device,
            **(dict[str, float]() if other else dict(own.options)) | options,
        )
        return images.clamp(-1, 1)


def times_of(sampler: Sampler, k: int) -> Tensor:
    """[k + 1], from 1 to 0."""
    return uniform_grid(k=k) if sampler.times is None else torch.tensor(sampler.times)


def build_denoiser(*, network: NetworkConfig, prediction: str, schedule: dict[str, Any]) -> nn.Module:
    return network.denoiser(schedule=schedule_from_dict(schedule), prediction=prediction)


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
    if description.get("format") not in READ or description.get("kind") not in kinds:
        found = f"{description.get('kind')!r} of format {description.get('format')!r}"
        raise NotAModel(f"{directory / MODEL}: a {' or '.join(kinds)} of format {FORMAT} is expected, found {found}")
    return description, weights


def save_model(directory: str | Path, model: DiffusionModel) -> None:
    """Raises ValueError for a network that its configuration can't build again."""
    denoiser = model.denoiser
    model.network.check_stored()
    description = {
        "kind": "denoiser",
        "network": {"kind": model.network.kind, **asdict(model.network)},
        "prediction": denoiser.prediction if isinstance(denoiser, Denoiser) else "x",
        "schedule": schedule_to_dict(model.schedule),
        "k": model.k,
        "samplers": {str(k): asdict(sampler) for k, sampler in model.samplers.items()},
        "null_label": model.null_label,
        "preprocessing": {"range": [-1, 1], "layout": "chw"},
        "provenance": model.provenance,
    }
    _write(Path(directory), description, denoiser.state_dict())


def load_model(directory: str | Path) -> DiffusionModel:
    """Raises NotAModel for a folder that is not one."""
    d, weights = _read(Path(directory), "denoiser")
    try:
        denoiser = build_denoiser(
            network=network_config(d["network"]), prediction=d["prediction"], schedule=d["schedule"]
        )
    except ValueError as error:  # a network of a package that is not installed
        raise NotAModel(f"{directory}: {error}") from error
    denoiser.load_state_dict(weights)
    denoiser.requires_grad_(False).eval()
    return DiffusionModel(
        denoiser, k=d["k"], samplers=samplers_in(d), null_label=d.get("null_label", False), provenance=d["provenance"]
    )


def samplers_in(description: dict[str, Any]) -> dict[int, Sampler]:
    """The samplers in a model.json, by k."""
    if description["format"] == 1:
        options = {name: value for name, value in description["sampler"].items() if name not in ("name", "grid")}
        ranges = {"guidance": tuple(description["guidance"])} if description.get("guidance") else {}
        return {description["k"]: Sampler(description["sampler"]["name"], options, ranges=ranges)}
    return {int(k): sampler_of(values) for k, values in description["samplers"].items()}


def sampler_of(values: dict[str, Any]) -> Sampler:
    """A sampler from its plain values in JSON."""
    return Sampler(
        values["name"],
        values["options"],
        tuple(values["times"]) if values["times"] else None,
        {name: tuple(steps) for name, steps in values["conditions"].items()},
        {name: (low, high) for name, (low, high) in values["ranges"].items()},
    )


def save_beside(directory: str | Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Saves tensors beside a model's weights, with the hash of these weights. Methods prepare from them."""
    directory = Path(directory)
    own = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(own, directory / f"{name}.safetensors", metadata={"weights": sha256_of(directory / WEIGHTS)})


def extra_names(directory: str | Path) -> frozenset[str]:
    """The names of the tensors beside a model's weights that belong to these weights."""
    directory, found = Path(directory), set()
    weights = sha256_of(directory / WEIGHTS)
    for path in directory.glob("*.safetensors"):
        if path.name != WEIGHTS:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("weights") == weights:
                    found.add(path.stem)
    return frozenset(found)


def load_beside(directory: str | Path, name: str) -> dict[str, Tensor]:
    """Raises NotAModel if there are no tensors of that name, or if they belong to other weights."""
    path = Path(directory) / f"{name}.safetensors"
    if not path.is_file():
        raise NotAModel(f"{path}: the model has none")
    if name not in extra_names(directory):
        raise NotAModel(f"{path}: of other weights than {WEIGHTS} beside it")
    return load_file(path)


def save_extractor(directory: str | Path, extractor: Extractor, *, provenance: dict[str, Any]) -> None:
    description = {"kind": extractor.kind, "network": asdict(extractor.config), "provenance": provenance}
    _write(Path(directory), description, extractor.state_dict())


def load_extractor(directory: str | Path) -> Extractor:
    """Raises NotAModel for a folder that is not one."""
    d, weights = _read(Path(directory), *names(table=EXTRACTORS, group="extractors"))
    kind = extractor_class(d["kind"])
    extractor = kind(kind.Config(**d["network"]))
    extractor.load_state_dict(weights)
    frozen: nn.Module = extractor.requires_grad_(False).eval()
    assert isinstance(frozen, Extractor)
    return frozen


def load_network(directory: str | Path) -> nn.Module:
    """The denoiser in a model's folder, or the extractor in an extractor's. Raises NotAModel."""
    kind = _kind(Path(directory))
    return load_model(directory).denoiser if kind == "denoiser" else load_extractor(directory)


def _kind(directory: Path) -> str:
    try:
        return str(json.loads((directory / MODEL).read_text()).get("kind"))
    except (OSError, ValueError) as error:
        raise NotAModel(f"{directory}: not a model folder: {error}") from error


def extractor_class(kind: str) -> type[Extractor]:
    """Raises ValueError for an unknown kind."""
    found = named(kind, table=EXTRACTORS, group="extractors")
    if not (isinstance(found, type) and issubclass(found, Extractor)):
        raise ValueError(f"extractor: {kind!r} is no Extractor")
    return found
