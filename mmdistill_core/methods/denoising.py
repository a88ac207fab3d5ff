"""Denoising, which trains a teacher: L = w |x_hat(z_t, t) - x|^2 with t ~ p(t)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmdistill_core.diffusion.guidance import drop_labels
from mmdistill_core.diffusion.times import TimeDensity, sample_s
from mmdistill_core.diffusion.weighting import Weighting, weight
from mmdistill_core.methods.base import (
    Average,
    Batch,
    Finished,
    Losses,
    Method,
    Networks,
    New,
    Phase,
    Progress,
    Role,
)
from mmdistill_core.methods.parts import denoising_loss, noisy
from mmdistill_core.options import option
from mmdistill_core.rng import Rng


@dataclass(frozen=True)
class Denoising(Method):
    """With weight v and uniform t, this is the loss in v."""

    p_t: TimeDensity = option("uniform", "density of t")
    w_t: Weighting = option("v", "weight of the loss at t")
    label_dropout: float = option(0.0, "share of labels hidden, so that the network can be guided", ge=0, lt=1)
    name: ClassVar[str] = "denoising"
    learners: ClassVar[tuple[str, ...]] = ("teacher",)
    extra_names: ClassVar[tuple[str, ...]] = ("second_moments",)

    @property
    def roles(self) -> tuple[Role, ...]:
        return (Role("teacher", New(), trained=True), Role("teacher_ema", Average("teacher")))

    @property
    def result(self) -> str:
        return "teacher_ema"

    @property
    def guidable(self) -> bool:
        return self.label_dropout > 0

    def validate(self, ks: Sequence[int]) -> tuple[int, ...]:
        return ()

    def extras(self, finished: Finished) -> dict[str, dict[str, Tensor]]:
        return {"second_moments": finished.second_moments("teacher")}

    def phases(self, progress: Progress) -> tuple[Phase, ...]:
        return (Phase(("teacher",), self._loss),)

    def _loss(self, nets: Networks, batch: Batch, rng: Rng, progress: Progress) -> Losses:
        t = sample_s(density=self.p_t, schedule=self.schedule, b=len(batch), rng=rng)
        logsnr = self.schedule.logsnr(t)
        z = noisy(schedule=self.schedule, x=batch.x, t=t, rng=rng)
        label = batch.label
        if label is not None and self.label_dropout:
            label = drop_labels(label=label, share=self.label_dropout, rng=rng)
        x_hat = nets["teacher"](z, t, label)
        loss = denoising_loss(x=batch.x, x_hat=x_hat, weight=weight(weighting=self.w_t, logsnr=logsnr))
        return Losses({"teacher": loss}, by_level={"denoising_loss": loss.detach()}, logsnr=logsnr, forwards=1)
