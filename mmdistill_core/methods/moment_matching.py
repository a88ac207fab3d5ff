"""Moment matching (Salimans, Mensink, Heek, Hoogeboom, 2406.04103): Algorithm 2, and Algorithm 3.

A k-step student g_eta with z_s ~ q(z_s | z_t, x_tilde), x_tilde = g_eta(z_t, t), samples the data's distribution if
E_g[x_tilde | z_s] = E_q[x | z_s] at every z_s that it reaches. The teacher g_theta knows the right side.

Algorithm 2, alternating: an auxiliary g_phi learns the left side.

    L_phi = w(s) { |x_tilde - g_phi(z_s, s)|^2 + |g_theta(z_s, s) - g_phi(z_s, s)|^2 }     (auxiliary, with pull to the teacher)
    L_eta = w(s) x_tilde . sg[g_phi(z_s, s) - g_theta(z_s, s)]                              (student)

Algorithm 3, instant: if the two sides are equal, the teacher has nothing to learn from the student's samples. So the gradient that
it would get on one half of the batch, A, gives the direction for the student on the other half, B.

    G     = grad_theta mean_A w(s) |x_tilde - g_theta(z_s, s)|^2
    nu    = -Lambda G
    L_eta = mean_B w(s) x_tilde . sg[(dg_theta(z_s, s) / dtheta) nu]                        (student)

With this sign, which is not the printed one, L_eta has the gradient of 1/4 E[G]^T Lambda E[G] with z_s held fixed: it descends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmdistill_core.diffusion.guidance import NULL_LABEL, guided, squeezed
from mmdistill_core.diffusion.process import diffused, expand, posterior_coefficients, x_of_state
from mmdistill_core.diffusion.times import Pairing, TimeDensity, sample_pairs
from mmdistill_core.diffusion.weighting import Weighting, dmd_weight, weight
from mmdistill_core.methods.base import (
    About,
    Average,
    Batch,
    Copy,
    Curve,
    Given,
    Losses,
    Method,
    Networks,
    Phase,
    Preparation,
    Prepared,
    Progress,
    Role,
    Sampler,
    Statistic,
)
from mmdistill_core.methods.parts import (
    Derivative,
    Transition,
    denoising_loss,
    directional_derivative,
    noisy,
    parameters_of,
    per_sample_mean,
    push,
    rows_where,
    straight_through,
    transition,
)
from mmdistill_core.networks.preconditioner import Preconditioner
from mmdistill_core.options import option
from mmdistill_core.rng import Rng, normal_like, uniform

Update = Literal["alternating", "joint", "instant"]


@dataclass(frozen=True)
class _Draw:
    """The draws of an update: t, s, z_t, the weight w(s), and the guidance [b] of each sample, if there is any. `to`: the time to
    which the student's sampler goes from t, if `matched` is state.
    """

    t: Tensor
    s: Tensor
    to: Tensor | None
    z_t: Tensor
    w: Tensor
    guidance: Tensor | None
    label: Tensor | None


def _rows(value: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if value is None else value[rows]


@dataclass(frozen=True)
class MomentMatching(Method):
    """The paper keeps no average of the student, since its learning rate decays to 0 over 200k steps, which averages too. A short
    run gains much from an average.
    """

    update: Update = option(
        "joint",
        "alternating: the auxiliary learns in `auxiliary_updates` steps and then the student in one, each from a batch of its own. "
        "joint: both from every batch, and they share the student's and the teacher's forwards: 7 forward-equivalents a pair of "
        "updates in place of 10; with auxiliary_updates > 1 only the last of them is shared. instant: no auxiliary, from the "
        "teacher's own gradient",
    )
    matched: Literal["step", "state"] = option(
        "step",
        "what is matched. step: x_tilde, at a z_s within the step (the paper's). state, an experiment: the state that the sampler "
        "goes to, noised to s; its fixed point is the data's marginal after every step, at any k",
    )
    pairing: Pairing = option("grid", "how t goes with s (times.sample_pairs)")
    delta_power: float = option(
        0.35, "below 1: t - s is more often as long as the sampler's steps; 1 is the paper's (times.sample_pairs)", gt=0
    )
    times_per_step: int = option(
        0, "s is one of so many times in a step of the sampler, the middles of equal parts of it; 0: any time", ge=0
    )
    p_s: TimeDensity = option("uniform", "density of s")
    z_t: Literal["data", "rollout"] = option(
        "data",
        "where z_t comes from. data: a noised image (the paper's). rollout: the student's own sampler, from noise at t = 1, so "
        "that it learns where it will be; (k - 1) / 2 evaluations more for an image",
    )
    w_s: Literal[Weighting, "dmd"] = option(
        "flat", "weight at s; dmd: flat, but the student's gradient by DMD's adaptive weight"
    )
    sigma_data: float = option(0.5, "of the weight edm", gt=0)
    logsnr_shift: float = option(0.0, "of p(s) and w(s); 2 ln(64 / resolution) for larger images")
    transition: Transition = option("conditional", "how z_s is drawn (parts.transition)")
    eta: float = option(1.0, "noise of the student's steps: 1 ancestral, 0 DDIM", ge=0, le=1)
    guidance: float | tuple[float, float] = option(
        0.0, "of the teacher: 0 is off; [low, high]: drawn evenly for each sample, and the student is conditioned on it"
    )
    clip_x: bool = option(False, "clip the teacher's x_hat to [-1, 1]")
    pull: bool = option(
        True,
        "the auxiliary's second term, towards the teacher: its optimum is then halfway between E_g[x_tilde | z_s] and the teacher",
    )
    auxiliary_lr_ratio: float = option(
        7.0,
        "the auxiliary's learning rate over the student's, unless the recipe states one (optimisers.auxiliary.lr); it has to "
        "follow the student",
        gt=0,
    )
    auxiliary_updates: int = option(1, "updates of the auxiliary to one of the student", ge=1)
    auxiliary_sees_t: bool = option(
        False, "an experiment: the auxiliary is conditioned on t, and averages over step lengths no longer"
    )
    derivative: Derivative = option("forward", "how instant differentiates (parts.directional_derivative)")
    preconditioner: Literal["adam", "collected", "identity"] = option(
        "adam", "instant's Lambda: of the teacher's own optimiser, or of gradients collected now, or none"
    )
    collect_batches: int = option(300, "batches of the collected preconditioner", ge=1)
    ema: bool = option(True, "keep an average of the student, and measure and register that")
    name: ClassVar[str] = "moment_matching"
    learners: ClassVar[tuple[str, ...]] = ("student", "auxiliary")
    compared: ClassVar[str | None] = "update"
    small: ClassVar[Mapping[str, Any]] = {"collect_batches": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self._guidance
        if not 0 <= low <= high:
            raise ValueError(f"guidance: {self.guidance} should be at least 0, or [low, high]")
        if self.matched == "state" and (self.transition != "conditional" or self.eta != 1 or self.pairing != "grid"):
            raise ValueError(
                "matched: state needs the steps of the ancestral sampler: pairing grid, transition conditional, eta 1"
            )
        if self.z_t == "rollout" and self.pairing != "grid":
            raise ValueError("z_t: rollout needs the times of the sampler: pairing grid")
        if self.times_per_step and (self.p_s != "uniform" or self.pairing != "grid"):
            raise ValueError("times_per_step: it needs pairing grid and p_s uniform")
        if self.transition == "unconditional" and self.eta != 1:
            raise ValueError(f"eta: {self.eta} belongs to the conditional transition")
        if self.update == "instant" and (self.auxiliary_sees_t or self.auxiliary_updates > 1):
            raise ValueError("auxiliary_sees_t and auxiliary_updates: instant has no auxiliary")

    @property
    def _guidance(self) -> tuple[float, float]:
        low, high = self.guidance if isinstance(self.guidance, (tuple, list)) else (self.guidance, self.guidance)
        return low, high

    @property
    def _conditions_of_student(self) -> tuple[str, ...]:
        low, high = self._guidance
        return ("guidance",) if low < high else ()

    @property
    def roles(self) -> tuple[Role, ...]:
        instant, conditions = self.update == "instant", self._conditions_of_student
        roles = [
            Role("teacher", Given("teacher"), whole=instant),
            Role("student", Copy("teacher"), trained=True, conditions=conditions),
        ]
        if instant:
            roles.append(Role("preconditioner", Prepared(), whole=True))
        else:
            seen = ("t",) if self.auxiliary_sees_t else ()
            told, ratio = (*conditions, *seen), self.auxiliary_lr_ratio
            roles.append(Role("auxiliary", Copy("teacher"), trained=True, conditions=told, lr_ratio=ratio))
        if self.ema:
            roles.append(Role("student_ema", Average("student")))
        return tuple(roles)

    @property
    def result(self) -> str:
        return "student_ema" if self.ema else "student"

    def sampler(self, k: int) -> Sampler:
        """2406.04103, Algorithm 1; as the transition has it."""
        ranges = {"guidance": self._guidance} if self._conditions_of_student else {}
        if self.transition == "unconditional":
            return Sampler("renoise", ranges=ranges)
        return Sampler("ancestral", options={} if self.eta == 1 else {"eta": self.eta}, ranges=ranges)

    def check_teacher(self, teacher: About) -> None:
        if self.update == "instant" and self.preconditioner == "adam" and "second_moments" not in teacher.extras:
            raise ValueError(
                "preconditioner: adam needs the second moments of the teacher's optimiser, and it has none; take collected"
            )
        if self._guidance[1] > 0 and not teacher.num_classes:
            raise ValueError("guidance: the data have no labels, so there is nothing to guide by")
        if self._guidance[1] > 0 and not teacher.guidable:
            raise ValueError(
                "guidance: the teacher never learns the null label that guidance needs; train it with teacher.label_dropout, "
                "0.1 is usual"
            )

    def prepare(self, context: Preparation) -> dict[str, nn.Module]:
        """Algorithm 3's Lambda."""
        if self.update != "instant":
            return {}
        teacher = context.networks["teacher"]
        if self.preconditioner == "identity":
            return {"preconditioner": Preconditioner.identity(teacher)}
        if self.preconditioner == "adam":
            moments = context.extra("teacher", "second_moments")
        else:
            training = context.training_of("teacher")
            moments = context.squared_gradients(teacher, training, steps=self.collect_batches)
        preconditioner = Preconditioner.adam(moments)
        preconditioner.check(teacher)
        return {"preconditioner": preconditioner}

    @property
    def curves(self) -> tuple[Curve, ...]:
        if self.update == "instant":
            return (
                Curve(
                    "squared_moments",
                    "squared moments",
                    "How strongly the student's samples would still change the teacher's weights: 0 once they match the data. The "
                    "product of the gradients on two independent halves of the batch is an unbiased estimate, so a converged "
                    "student is below 0 as often as above. In symbols: G_A · Λ G_B, the squared moments of Algorithm 3 "
                    "(arXiv:2406.04103), with G the teacher's gradient on a half and Λ a weight for each parameter.",
                    signed=True,
                ),
            )
        return (
            Curve(
                "moment_gap",
                "squared moment gap",
                "How far the student's samples are from the data, as the teacher sees them: 0 once they match. The auxiliary "
                "has not seen the samples that it is multiplied with, so its own noise adds nothing, and a converged student is "
                "below 0 as often as above. In symbols: 2 w(s) (x − g_θ(z_s)) · (g_φ(z_s) − g_θ(z_s)), whose mean is "
                "w(s) ‖E[x | z_s] − g_θ(z_s)‖² for an auxiliary g_φ that has learnt all it can; g_θ is the teacher, x the "
                "student's prediction, z_s the sample at noise level s, and w(s) that level's weight.",
                signed=True,
            ),
        )

    @property
    def cycle(self) -> int:
        return {"joint": self.auxiliary_updates, "alternating": self.auxiliary_updates + 1, "instant": 1}[self.update]

    def phases(self, progress: Progress) -> tuple[Phase, ...]:
        if self.update == "instant":
            return (Phase(("student",), self._instant_loss, statistic=self._nu),)
        auxiliary, turn = Phase(("auxiliary",), self._auxiliary_loss), progress.step % self.cycle
        if turn < self.cycle - 1:
            return (auxiliary,)
        if self.update == "joint":
            return (Phase(("student", "auxiliary"), self._joint_loss),)
        return (Phase(("student",), self._student_loss),)

    def _draw(self, nets: Networks, batch: Batch, rng: Rng) -> _Draw:
        t, s = sample_pairs(
            pairing=self.pairing,
            density=self.p_s,
            k=self.k,
            schedule=self.schedule,
            b=len(batch),
            rng=rng,
            delta_power=self.delta_power,
            logsnr_shift=self.logsnr_shift,
            times_per_step=self.times_per_step,
        )
        to = None
        if self.matched == "state":
            to = (t - 1 / self.k).clamp_min(0)
            s = torch.maximum(s, to + 1e-3 / self.k)  # at `to` itself nothing is left to predict
        w = weight(
            weighting="flat" if self.w_s == "dmd" else self.w_s,
            logsnr=self.schedule.logsnr(s),
            sigma_data=self.sigma_data,
            logsnr_shift=self.logsnr_shift,
        )
        rollout = self.z_t == "rollout"
        z_t = batch.x if rollout else noisy(schedule=self.schedule, x=batch.x, t=t, rng=rng)
        low, high = self._guidance
        guidance = None
        if high > 0:
            guidance = torch.full_like(t, low)
            if high > low:
                guidance += (high - low) * uniform(len(t), rng=rng)
        draw = _Draw(t=t, s=s, to=to, z_t=z_t, w=w, guidance=guidance, label=batch.label)
        return self._rolled_out(nets, draw, rng) if rollout else draw

    @torch.no_grad()
    def _rolled_out(self, nets: Networks, draw: _Draw, rng: Rng) -> _Draw:
        """With z_t as the student's sampler reaches it, from noise at t = 1 in steps of 1/k."""
        level = (draw.t * self.k).round()
        z = self.schedule.sigma(torch.ones_like(draw.t[:1])) * normal_like(draw.z_t, rng=rng)
        for i in range(self.k, 1, -1):
            noise = normal_like(z, rng=rng)
            going = rows_where(level < i, share=(i - 1) / self.k)
            # With none of them, the first goes on in vain: sharded workers need as many calls as the others.
            rows = going if len(going) else going.new_zeros(1)
            t, s = (torch.full_like(draw.t[rows], step / self.k) for step in (i, i - 1))
            some = replace(draw, t=t, z_t=z[rows], guidance=_rows(draw.guidance, rows), label=_rows(draw.label, rows))
            x_tilde = self._student(nets, some)
            on = transition(
                schedule=self.schedule,
                z_t=some.z_t,
                x_tilde=x_tilde,
                t=t,
                s=s,
                noise=noise[rows],
                kind=self.transition,
                eta=self.eta,
            )
            z = z.index_copy(0, going, on[: len(going)])
        return replace(draw, z_t=z)

    @property
    def _more(self) -> float:
        """Evaluations of a rollout for one image."""
        return (self.k - 1) / 2 if self.z_t == "rollout" else 0

    def _conditions(self, draw: _Draw) -> tuple[dict[str, Tensor], ...]:
        """The student's conditions as its last argument, or no argument if it has none."""
        return (
            ({"guidance": squeezed(draw.guidance)},)
            if draw.guidance is not None and self._conditions_of_student
            else ()
        )

    def _student(self, nets: Networks, draw: _Draw) -> Tensor:
        x_tilde: Tensor = nets["student"](draw.z_t, draw.t, draw.label, *self._conditions(draw))
        return x_tilde

    def _auxiliary(self, nets: Networks, draw: _Draw, z_s: Tensor) -> Tensor:
        conditions = self._conditions(draw)
        if self.auxiliary_sees_t:
            conditions = (dict(*conditions) | {"t": draw.t},)
        x_hat: Tensor = nets["auxiliary"](z_s, draw.s, draw.label, *conditions)
        return x_hat

    def _teacher(self, nets: Networks, draw: _Draw, z_s: Tensor) -> Tensor:
        return self._modified(nets, draw, z_s, nets["teacher"](z_s, draw.s, draw.label))

    def _modified(self, nets: Networks, draw: _Draw, z_s: Tensor, x_hat: Tensor) -> Tensor:
        """The teacher's x_hat, guided and clipped. Its gradient is that of x_hat (2406.04103, Algorithm 3: straight through)."""
        modified = x_hat
        if draw.guidance is not None:
            if draw.label is None:
                raise ValueError("guidance: it needs labels, and the data have none")
            with torch.no_grad():
                unconditional = nets["teacher"](z_s, draw.s, torch.full_like(draw.label, NULL_LABEL))
            modified = guided(conditional=modified, unconditional=unconditional, w=draw.guidance)
        if self.clip_x:
            modified = modified.clamp(-1, 1)
        return x_hat if modified is x_hat else straight_through(value=x_hat, modified=modified)

    def _compared(self, draw: _Draw, x_tilde: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """(x, sg[z_s]): the x that auxiliary and teacher predict at z_s. It has the student's gradient."""
        schedule, t, s = self.schedule, draw.t, draw.s
        if draw.to is None:
            z_s = transition(
                schedule=schedule,
                z_t=draw.z_t,
                x_tilde=x_tilde,
                t=t,
                s=s,
                noise=normal_like(x_tilde, rng=rng),
                kind=self.transition,
                eta=self.eta,
            )
            return x_tilde, z_s
        c_z, c_x, var = posterior_coefficients(schedule=schedule, t=t, s=draw.to)
        mean = expand(c_z, like=x_tilde) * draw.z_t + expand(c_x, like=x_tilde) * x_tilde
        noise = normal_like(x_tilde, rng=rng)
        z_s = diffused(schedule=schedule, mean=mean.detach(), var=var, s=draw.to, t=s, noise=noise)
        return x_of_state(schedule=schedule, mean=mean, var=var, z_t=z_s, s=draw.to, t=s), z_s

    def _push(self, draw: _Draw, x_tilde: Tensor, of_teacher: Tensor, direction: Tensor) -> Tensor:
        """L_eta, [b]."""
        w = draw.w * dmd_weight(x=x_tilde, x_hat=of_teacher) if self.w_s == "dmd" else draw.w
        return push(x_hat=x_tilde, direction=direction, weight=w)

    def _fit_auxiliary(self, draw: _Draw, x_tilde: Tensor, of_auxiliary: Tensor, of_teacher: Tensor) -> Tensor:
        """L_phi, [b]."""
        loss = denoising_loss(x=x_tilde.detach(), x_hat=of_auxiliary, weight=draw.w)
        return loss + denoising_loss(x=of_teacher, x_hat=of_auxiliary, weight=draw.w) if self.pull else loss

    def _losses(
        self, draw: _Draw, per_sample: dict[str, Tensor], x: Tensor, of_teacher: Tensor, direction: Tensor
    ) -> Losses:
        """With the curve: an unbiased estimate of the squared moments, since the auxiliary learnt from other batches."""
        halved = 2 if self.pull else 1  # the pull halves the direction
        squared = halved * push(x_hat=(x - of_teacher).detach(), direction=direction, weight=draw.w)
        return Losses(
            per_sample,
            logs={"moment_gap": squared},
            by_level={"moment_gap": squared},
            logsnr=self.schedule.logsnr(draw.s),
            forwards=3 + (draw.guidance is not None) + self._more,
        )

    def _auxiliary_loss(self, nets: Networks, batch: Batch, rng: Rng, progress: Progress) -> Losses:
        draw = self._draw(nets, batch, rng)
        with torch.no_grad():
            x, z_s = self._compared(draw, self._student(nets, draw), rng)
            of_teacher = self._teacher(nets, draw, z_s)
        of_auxiliary = self._auxiliary(nets, draw, z_s)
        loss = self._fit_auxiliary(draw, x, of_auxiliary, of_teacher)
        return self._losses(draw, {"auxiliary": loss}, x, of_teacher, of_auxiliary - of_teacher)

    def _student_loss(self, nets: Networks, batch: Batch, rng: Rng, progress: Progress) -> Losses:
        draw = self._draw(nets, batch, rng)
        x, z_s = self._compared(draw, self._student(nets, draw), rng)
        with torch.no_grad():
            of_teacher = self._teacher(nets, draw, z_s)
            direction = self._auxiliary(nets, draw, z_s) - of_teacher
        return self._losses(draw, {"student": self._push(draw, x, of_teacher, direction)}, x, of_teacher, direction)

    def _joint_loss(self, nets: Networks, batch: Batch, rng: Rng, progress: Progress) -> Losses:
        draw = self._draw(nets, batch, rng)
        x, z_s = self._compared(draw, self._student(nets, draw), rng)
        with torch.no_grad():
            of_teacher = self._teacher(nets, draw, z_s)
        of_auxiliary = self._auxiliary(nets, draw, z_s)
        direction = of_auxiliary - of_teacher
        per_sample = {
            "student": self._push(draw, x, of_teacher, direction),
            "auxiliary": self._fit_auxiliary(draw, x, of_auxiliary, of_teacher),
        }
        return self._losses(draw, per_sample, x, of_teacher, direction)

    def _nu(self, nets: Networks, batch: Batch, rng: Rng, progress: Progress) -> Statistic:
        """nu = -Lambda G: Algorithm 3's first half. It is linear in G, so it may be averaged over parts and workers."""
        draw, teacher = self._draw(nets, batch, rng), nets["teacher"]
        with torch.no_grad():
            x, z_s = self._compared(draw, self._student(nets, draw), rng)
        parameters = parameters_of(teacher)
        x_hat = functional_call(teacher, parameters, (z_s, draw.s, draw.label))
        loss = -denoising_loss(x=x, x_hat=self._modified(nets, draw, z_s, x_hat), weight=draw.w).mean()
        falling = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        nu: Statistic = nets["preconditioner"](dict(zip(parameters, falling, strict=True)))
        return nu

    def _instant_loss(self, nets: Networks, batch: Batch, rng: Rng, progress: Progress, nu: Statistic) -> Losses:
        """L_eta: Algorithm 3's second half. Along nu, the teacher's own loss on B changes by -G_A^T Lambda G_B. This gives the
        curve of the squared moments at no cost. It is unbiased, since A and B are independent.
        """
        draw = self._draw(nets, batch, rng)
        x, z_s = self._compared(draw, self._student(nets, draw), rng)
        with torch.no_grad():
            arguments = (z_s, draw.s, draw.label)
            x_hat, direction = directional_derivative(nets["teacher"], arguments, direction=nu, by=self.derivative)
            of_teacher = self._modified(nets, draw, z_s, x_hat)
            squared = 2 * draw.w * per_sample_mean((x - of_teacher) * direction)
        return Losses(
            {"student": self._push(draw, x, of_teacher, direction)},
            logs={"squared_moments": squared},
            by_level={"squared_moments": squared},
            logsnr=self.schedule.logsnr(draw.s),
            forwards=5 + 2 * (draw.guidance is not None) + 2 * self._more,
        )
