"""A registry in SQLite with a real, tiny model: versions with whatever figures a test needs, as `register` would tag them."""

from __future__ import annotations

import torch

from mmdistill_core.artifact import DiffusionModel, build_denoiser, save_model
from mmdistill_core.networks.dit import DiTConfig
from workflows.config.schema import Gate
from workflows.registry.promote import gate_tag
from workflows.registry.versions import Registry
from workflows.tracking.tracker import Tracker

TEACHER, STUDENT = "mmdistill-tiny-teacher", "mmdistill-tiny-student"
COMMON = {
    "recipe": "tiny",
    "data_fingerprint": "feed",
    "data_source": "digits",
    "data_count": "240",
    "data_shape": "1x4x4",
    "git_commit": "c0ffee",
    "features": "classifier",
    "samples": "1000",
    "seeds": "3",
    "reference": "beef",
    "reference_count": "240",
    "evaluation_run": "e" * 32,
}


def student_tags(k: int = 8, *, frechet=0.1, spread=0.01, gate: Gate | None = None, **more: str) -> dict[str, str]:
    figures = {"role": "student", "k": str(k), "method": "moment_matching", "recall": "0.8", "teacher_frechet": "0.5"}
    figures |= {"frechet": str(frechet), "frechet_spread": str(spread), "identity": f"b{k}"}
    of = {"teacher_name": TEACHER, "teacher_version": "1", "gate": gate_tag(gate or Gate())}
    return COMMON | figures | of | more


class Shelf:
    """`student(...)` and `teacher()` register versions; `whole=True` logs a model with them, else there are the figures alone."""

    def __init__(self, folder) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder / 'mlflow.db'}"
        self.tracker = Tracker(self.uri, artifacts=folder / "mlartifacts")
        self.registry = Registry(self.tracker)
        self.runs: list[str] = []

    def model(self, k: int):
        path = self.folder / f"model-{k}"
        if not path.exists():
            torch.manual_seed(k)
            network = DiTConfig(image_size=4, channels=1, num_classes=0, patch=4, width=8, depth=1, heads=1)
            denoiser = build_denoiser(network=network, prediction="v", schedule={"name": "cosine"})
            save_model(path, DiffusionModel(denoiser, k=k))
        return path

    def add(self, name: str, k: int, tags: dict[str, str], whole: bool):
        self.runs.append(self.tracker.start_run(f"{name} {k}"))
        if whole:
            return self.registry.register(run_id=self.runs[-1], name=name, folder=self.model(k), tags=tags)
        if name not in self.registry.names():
            self.tracker.client.create_registered_model(name)
        made = self.tracker.client.create_model_version(name, "nowhere", self.runs[-1], tags=tags, await_creation_for=0)
        found = self.registry.version(name, str(made.version))
        assert found
        return found

    def teacher(self, whole: bool = False, **more: str):
        figures = {"role": "teacher", "k": "64", "method": "denoising", "frechet": "0.04", "frechet_spread": "0.002"}
        tags = COMMON | figures | {"gate": gate_tag(Gate(teacher_ratio=None, recall=0)), "identity": "aaaa"} | more
        return self.add(TEACHER, 64, tags, whole)

    def student(self, k: int = 8, *, whole: bool = False, **figures):
        return self.add(STUDENT, k, student_tags(k, **figures), whole)
