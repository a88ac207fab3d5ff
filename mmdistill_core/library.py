"""Distillation as a function: a teacher and images in memory, a student back. No Ray, no MLflow, no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mmdistill_core.artifact import DiffusionModel
from mmdistill_core.diffusion.schedules import Schedule
from mmdistill_core.engine import FitOptions, InMemoryBatches, OptimiserOptions, TrainState, fit
from mmdistill_core.engine.preparation import Preparation, squared_gradients
from mmdistill_core.methods import method_class
from mmdistill_core.methods.base import Given, Method, New, Round
from mmdistill_core.networks.config import network_class
from mmdistill_core.networks.foreign import ModuleConfig

OPTIMISER = OptimiserOptions(lr=3e-4, decay="constant", warmup_images=12_800)
"""Of `distill`. Roles that a method declares to learn faster do so."""


def teacher_of(
    network: nn.Module,
    x: Tensor,
    *,
    prediction: str,
    schedule: Schedule,
    time: str = "unit",
    num_classes: int = 0,
    steps: int = 1000,
) -> DiffusionModel:
    """A torch module, called as network(z, time) or network(z, time, label), as a model of images like x [n, c, h, w].

    time   what it is told, one of foreign.TIMES: by default t in [0, 1]
    steps  N of these times

    The model can't be stored: for that, name the function that makes the network (imports.read_module).
    """
    _, channels, size, _ = x.shape
    config = ModuleConfig(image_size=size, channels=channels, num_classes=num_classes, time=time, steps=steps)
    return DiffusionModel(config.denoiser(schedule=schedule, prediction=prediction, network=network), k=256)


def distill(
    teacher: DiffusionModel,
    x: Tensor,
    *,
    k: int | tuple[int, ...] = 4,
    label: Tensor | None = None,
    method: str = "moment_matching",
    images: int = 100_000,
    batch: int = 128,
    optimiser: OptimiserOptions = OPTIMISER,
    given: Mapping[str, nn.Module] = MappingProxyType({}),
    device: torch.device | str = "cpu",
    seed: int = 0,
    report: Callable[[dict[str, float]], None] = lambda row: None,
    **options: Any,
) -> DiffusionModel:
    """A student that samples in k steps.

    teacher   of `artifact.load_model`, `imports.read_diffusers` or `teacher_of`
    x, label  [n, c, h, w] in [-1, 1], or bytes; [n] if the teacher has classes
    k         several: the student of the round that serves them all; ValueError if none does
    method    one of METHODS, and `options` are its options
    images    that it is trained on, in batches of `batch`
    given     the method's other given networks, by name
    report    gets the losses, some fifty times
    """
    ks = (k,) if isinstance(k, int) else tuple(k)
    made: Method = method_class(method)(schedule=teacher.schedule, **options)
    data = InMemoryBatches(x=x, label=label, global_batch=batch, seed=seed, device=device)
    task = _Task(teacher, data, images, batch, optimiser, given, device, seed)
    denoisers: dict[str | None, nn.Module] = {None: teacher.denoiser}
    for one in made.rounds({each: made for each in ks}):
        log = FitOptions(log_every=max(batch, images // 50), seed=seed)
        state = fit(state=task.state(one, denoisers), batches=data, options=log, report=report)
        trained = state.current_network()
        student: nn.Module = getattr(trained, "module", trained)  # of an average
        denoisers[one.name] = student
        if set(ks) <= set(one.ks):
            student.requires_grad_(False).eval()
            samplers = {each: one.method.sampler(each) for each in ks}
            return DiffusionModel(student, k=ks[0], samplers=samplers, null_label=one.method.guidable)
    raise ValueError(f"{method}: no student serves {', '.join(map(str, ks))} steps at once; ask for one k")


@dataclass(frozen=True)
class _Task:
    """What the rounds of a distillation share."""

    teacher: DiffusionModel
    batches: InMemoryBatches
    images: int
    batch: int
    optimiser: OptimiserOptions
    given: Mapping[str, nn.Module]
    device: torch.device | str
    seed: int

    def state(self, one: Round, denoisers: Mapping[str | None, nn.Module]) -> TrainState:
        """The state at the start of the round. `denoisers`: of the rounds before it, by name; None is the teacher."""
        torch.manual_seed(self.seed)
        networks = {"teacher": denoisers[one.teacher], **self.given}
        return TrainState.create(
            method=one.method,
            given={
                role.name: self._network(role.origin, networks).to(self.device)
                for role in one.method.roles
                if isinstance(role.origin, (Given, New))
            },
            starts={role: denoisers[start] for role, start in one.starts.items()},
            prepare=lambda roles: one.method.prepare(
                Preparation(roles, trained=self._denoising, collect=self._collect)
            ),
            options=self.optimiser,
            global_batch=self.batch,
            total_images=self.images,
            ema_ramp=0.1,
        )

    def _network(self, origin: Given | New, networks: Mapping[str, nn.Module]) -> nn.Module:
        if isinstance(origin, Given):
            if origin.name not in networks:
                raise ValueError(f"the method needs a network of the name {origin.name!r} in `given`")
            return networks[origin.name]
        c = self.teacher.network
        if origin.network is None:
            return c.denoiser(
                schedule=self.teacher.schedule, prediction=getattr(self.teacher.denoiser, "prediction", "x")
            )
        data = {"image_size": c.image_size, "channels": c.channels, "num_classes": c.num_classes}
        return network_class(origin.network)(**data | dict(origin.options)).build()

    def _denoising(self, role: str) -> Method:
        return method_class("denoising")(schedule=self.teacher.schedule)

    def _collect(self, network: nn.Module, by: Method, steps: int) -> dict[str, Tensor]:
        return squared_gradients(
            network=network, method=by, batches=self.batches, steps=steps, global_batch=self.batch, seed=self.seed
        )
