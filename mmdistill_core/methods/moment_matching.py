"""Moment matching by alternating optimisation (Salimans, Mensink, Heek, Hoogeboom, 2406.04103, Algorithm 2).

A k-step student g_eta with z_s ~ q(z_s | z_t, x_tilde), x_tilde = g_eta(z_t, t), samples the data's law if
E_g[x_tilde | z_s] = E_q[x | z_s] wherever it goes. The teacher g_theta knows the right side; the auxiliary g_phi learns the left:

    L_phi = w(s) { |x_tilde - g_phi(z_s, s)|^2 + |g_theta(z_s, s) - g_phi(z_s, s)|^2 }     (auxiliary, with pull to the teacher)
    L_eta = w(s) x_tilde . sg[g_phi(z_s, s) - g_theta(z_s, s)]                              (student)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdistill_core.diffusion.schedules import Schedule
from mmdistill_core.diffusion.times import sample_pairs
from mmdistill_core.diffusion.weighting import weight
from mmdistill_core.methods.base import Batch, Losses, Method, Networks, Phase, Role
from mmdistill_core.methods.parts import denoising_loss, direction_gap, noisy, push, transition

UPDATES = ("alternating", "joint")


@dataclass(frozen=True)
class _Draw:
    t: Tensor
    s: Tensor
    z_t: Tensor
    w: Tensor


@dataclass(frozen=True)
class MomentMatching(Method):
    """
    k        steps of the student's sampler
    update   alternating: the auxiliary learns on even steps and the student on odd ones, each from a batch of its own.
             joint: both from every batch, with the student's and the teacher's forwards shared: 7 forward-equivalents a
             pair of updates in place of 10
    pairing  how t goes with s (times.PAIRINGS); p_s: density of s (times.TIME_DENSITIES); w_s: weight (weighting.WEIGHTINGS)
    delta_power  below 1: more of the long steps t - s that sampling takes (times.sample_pairs); 1 is the paper's
    pull     the auxiliary's second term: its optimum is then halfway between E_g[x_tilde | z_s] and the teacher
    ema      keep an average of the student, "student_ema" (the paper has none: its learning rate decays to 0 over 200k steps,
             which averages too; a short run gains much by it)
    """

    schedule: Schedule
    k: int
    update: str = "joint"
    pairing: str = "grid"
    delta_power: float = 1.0
    p_s: str = "uniform"
    w_s: str = "flat"
    sigma_data: float = 0.5
    pull: bool = True
    ema: bool = False
    name: ClassVar[str] = "moment_matching"

    def __post_init__(self) -> None:
        if self.update not in UPDATES:
            raise ValueError(f"update: {self.update!r} is not one of {', '.join(UPDATES)}")

    @property
    def roles(self) -> tuple[Role, ...]:
        roles = (
            Role("teacher", "frozen"),
            Role("student", "trained", source="teacher"),
            Role("auxiliary", "trained", source="teacher"),
        )
        return (*roles, Role("student_ema", "ema", source="student")) if self.ema else roles

    def phases(self, step: int) -> tuple[Phase, ...]:
        if self.update == "joint":
            return (Phase(("student", "auxiliary"), self._joint_loss),)
        if step % 2 == 0:
            return (Phase(("auxiliary",), self._auxiliary_loss),)
        return (Phase(("student",), self._student_loss),)

    def _draw(self, batch: Batch, rng: torch.Generator) -> _Draw:
        t, s = sample_pairs(
            pairing=self.pairing,
            density=self.p_s,
            k=self.k,
            schedule=self.schedule,
            b=len(batch),
            rng=rng,
            delta_power=self.delta_power,
        )
        w = weight(weighting=self.w_s, logsnr=self.schedule.logsnr(s), sigma_data=self.sigma_data)
        return _Draw(t=t, s=s, z_t=noisy(schedule=self.schedule, x=batch.x, t=t, rng=rng), w=w)

    def _step(self, draw: _Draw, x_tilde: Tensor, rng: torch.Generator) -> Tensor:
        return transition(schedule=self.schedule, z_t=draw.z_t, x_tilde=x_tilde, t=draw.t, s=draw.s, rng=rng)

    def _fit_auxiliary(self, draw: _Draw, x_tilde: Tensor, of_auxiliary: Tensor, of_teacher: Tensor) -> Tensor:
        loss = denoising_loss(x=x_tilde.detach(), x_hat=of_auxiliary, weight=draw.w)
        return loss + denoising_loss(x=of_teacher, x_hat=of_auxiliary, weight=draw.w) if self.pull else loss

    def _losses(self, draw: _Draw, per_sample: dict[str, Tensor], direction: Tensor, forwards: int) -> Losses:
        gap = direction_gap(direction=direction, weight=draw.w)
        return Losses(
            per_sample,
            logs={"moment_gap": gap},
            by_level={"moment_gap": gap},
            logsnr=self.schedule.logsnr(draw.s),
            forwards=forwards,
        )

    def _auxiliary_loss(self, nets: Networks, batch: Batch, rng: torch.Generator) -> Losses:
        draw = self._draw(batch, rng)
        with torch.no_grad():
            x_tilde = nets["student"](draw.z_t, draw.t, batch.label)
            z_s = self._step(draw, x_tilde, rng)
            of_teacher = nets["teacher"](z_s, draw.s, batch.label)
        of_auxiliary = nets["auxiliary"](z_s, draw.s, batch.label)
        loss = self._fit_auxiliary(draw, x_tilde, of_auxiliary, of_teacher)
        return self._losses(draw, {"auxiliary": loss}, of_auxiliary - of_teacher, forwards=3)

    def _student_loss(self, nets: Networks, batch: Batch, rng: torch.Generator) -> Losses:
        draw = self._draw(batch, rng)
        x_tilde = nets["student"](draw.z_t, draw.t, batch.label)
        with torch.no_grad():
            z_s = self._step(draw, x_tilde, rng)
            direction = nets["auxiliary"](z_s, draw.s, batch.label) - nets["teacher"](z_s, draw.s, batch.label)
        return self._losses(draw, {"student": push(x_hat=x_tilde, direction=direction, weight=draw.w)}, direction, 3)

    def _joint_loss(self, nets: Networks, batch: Batch, rng: torch.Generator) -> Losses:
        draw = self._draw(batch, rng)
        x_tilde = nets["student"](draw.z_t, draw.t, batch.label)
        with torch.no_grad():
            z_s = self._step(draw, x_tilde, rng)
            of_teacher = nets["teacher"](z_s, draw.s, batch.label)
        of_auxiliary = nets["auxiliary"](z_s, draw.s, batch.label)
        direction = of_auxiliary - of_teacher
        per_sample = {
            "student": push(x_hat=x_tilde, direction=direction, weight=draw.w),
            "auxiliary": self._fit_auxiliary(draw, x_tilde, of_auxiliary, of_teacher),
        }
        return self._losses(draw, per_sample, direction, forwards=3)
