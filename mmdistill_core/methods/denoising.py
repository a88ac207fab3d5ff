"""Denoising: how a teacher is trained. L = w |x_hat(z_t, t) - x|^2 with t drawn by p(t)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdistill_core.diffusion.guidance import drop_labels
from mmdistill_core.diffusion.schedules import Schedule
from mmdistill_core.diffusion.times import sample_s
from mmdistill_core.diffusion.weighting import weight
from mmdistill_core.methods.base import Batch, Losses, Method, Networks, Phase, Role
from mmdistill_core.methods.parts import denoising_loss, noisy
from mmdistill_core.rng import Rng


@dataclass(frozen=True)
class Denoising(Method):
    """`p_t` is one of times.TIME_DENSITIES, `w_t` one of weighting.WEIGHTINGS; v-weight with uniform t is the loss in v.
    `label_dropout`: share of the labels that are hidden, so that the teacher can be guided.
    """

    schedule: Schedule
    p_t: str = "uniform"
    w_t: str = "v"
    label_dropout: float = 0.0
    name: ClassVar[str] = "denoising"

    @property
    def roles(self) -> tuple[Role, ...]:
        return (Role("teacher", "trained"), Role("teacher_ema", "ema", source="teacher"))

    def phases(self, step: int) -> tuple[Phase, ...]:
        return (Phase(("teacher",), self._loss),)

    def _loss(self, nets: Networks, batch: Batch, rng: Rng) -> Losses:
        t = sample_s(density=self.p_t, schedule=self.schedule, b=len(batch), rng=rng)
        logsnr = self.schedule.logsnr(t)
        z = noisy(schedule=self.schedule, x=batch.x, t=t, rng=rng)
        label = batch.label
        if label is not None and self.label_dropout:
            label = drop_labels(label=label, share=self.label_dropout, rng=rng)
        x_hat = nets["teacher"](z, t, label)
        loss = denoising_loss(x=batch.x, x_hat=x_hat, weight=weight(weighting=self.w_t, logsnr=logsnr))
        return Losses({"teacher": loss}, by_level={"denoising_loss": loss.detach()}, logsnr=logsnr, forwards=1)
