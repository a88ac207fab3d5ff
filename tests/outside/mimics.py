"""A method and an extractor of a package that is not mmdistill. tests/workflows/pipeline/test_outside_method.py runs them.

The method has what moment matching has not: a role that is trained beside the student to no end but its own, an average whose decay
follows the training's progress, a curriculum, a round whose student is the next round's teacher, a student of several k, and a
sampler of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch

from mmdistill_core.diffusion.process import ddim
from mmdistill_core.methods.base import (
    Average,
    Copy,
    Curve,
    Given,
    Losses,
    Method,
    Phase,
    Role,
    Round,
    Sampler,
)
from mmdistill_core.methods.parts import denoising_loss, noisy
from mmdistill_core.networks.extractor import Extractor
from mmdistill_core.options import option
from mmdistill_core.rng import uniform


def twice(*, denoiser, schedule, z, times, rng, label):
    """DDIM, whose last step asks the network twice."""
    for t, s in pairwise(times):
        t, s = t.expand(len(z)), s.expand(len(z))
        x_hat = denoiser(z, t, label)
        z = ddim(schedule=schedule, z_t=z, x=x_hat, t=t, s=s) if s[0] > 0 else z
    return (x_hat + denoiser(z, t, label)) / 2


twice.evaluations = lambda k: k + 1


@dataclass(frozen=True)
class Mimic(Method):
    """The pupil learns the master's x_hat, at first at low noise alone; a rival learns the pupil's."""

    strength: float = option(1.0, "weight of the pupil's loss", gt=0)
    rival: bool = option(True, "train a rival beside the pupil")
    name: ClassVar[str] = "mimic"
    learners: ClassVar[tuple[str, ...]] = ("pupil", "rival")

    @property
    def roles(self):
        roles = [Role("master", Given("teacher")), Role("pupil", Copy("master"), trained=True)]
        if self.rival:
            roles.append(Role("rival", Copy("master"), trained=True, optimiser={"weight_decay": 0.01}))
        return (*roles, Role("pupil_mean", Average("pupil", decay=lambda progress: 0.9 * progress.share)))

    @property
    def result(self):
        return "pupil_mean"

    def phases(self, progress):
        """The rival learns in the first half of the training."""
        pupil = Phase(("pupil",), self._pupil_loss)
        return (Phase(("rival",), self._rival_loss), pupil) if self.rival and progress.share < 0.5 else (pupil,)

    def rounds(self, methods, *, warm=()):
        """One step by itself. All other numbers of steps share a student, whose teacher is a rough one."""
        most, several = max(methods), tuple(k for k in methods if k > 1)
        alone = [Round("k1", (1,), replace(methods[1], k=1))] if 1 in methods else []
        rough = Round("rough-start", (), replace(methods[most], k=most, rival=False), like=most)
        return (
            *alone,
            rough,
            Round("of-several", several, replace(methods[most], k=most), teacher=rough.name, like=most),
        )

    def sampler(self, k):
        return Sampler("mimics:twice", times=tuple((1 - i / k) ** 2 for i in range(k + 1)))

    @property
    def curves(self):
        return (Curve("agreement", "agreement", "How far the pupil is from its master."),)

    def _drawn(self, batch, rng, progress):
        t = uniform(len(batch), rng=rng) * min(1.0, 0.5 + progress.share)
        return t, noisy(schedule=self.schedule, x=batch.x, t=t, rng=rng)

    def _pupil_loss(self, nets, batch, rng, progress):
        t, z = self._drawn(batch, rng, progress)
        loss = denoising_loss(
            x=nets["master"](z, t, batch.label), x_hat=nets["pupil"](z, t, batch.label), weight=1 + 0 * t
        )
        logs = {"agreement": loss.detach()}
        return Losses({"pupil": self.strength * loss}, logs, logs, self.schedule.logsnr(t), forwards=2)

    def _rival_loss(self, nets, batch, rng, progress):
        t, z = self._drawn(batch, rng, progress)
        x = nets["pupil"](z, t, batch.label).detach()
        loss = denoising_loss(x=x, x_hat=nets["rival"](z, t, batch.label), weight=1 + 0 * t)
        return Losses({"rival": loss}, forwards=2)


@dataclass(frozen=True)
class CornersConfig:
    side: int


class Corners(Extractor):
    """The four corners of an image, `side` pixels each."""

    kind, title, classes, Config = "corners", "the corners of the images", "none", CornersConfig

    def __init__(self, config):
        super().__init__()
        self.config = config

    @classmethod
    def made(cls, making):
        return cls(CornersConfig(making.examples().images.shape[-1] // 4)), None

    def read(self, images):
        side = self.config.side
        parts = [
            images[..., :side, :side],
            images[..., :side, -side:],
            images[..., -side:, :side],
            images[..., -side:, -side:],
        ]
        return torch.cat([part.flatten(1) for part in parts], dim=1), None
