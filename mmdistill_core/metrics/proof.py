"""Does a denoiser denoise? Its error at 16 noise levels beside those of the simplest denoisers.

A network that is read wrongly (another prediction, time scale, range, order of channels, numbering of labels) is worse than one of
these at some level, however well it was trained.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmdistill_core.diffusion.predictions import PREDICTIONS
from mmdistill_core.diffusion.process import q_sample
from mmdistill_core.diffusion.schedules import Schedule
from mmdistill_core.networks.denoiser import Denoiser
from mmdistill_core.networks.foreign import TIMES, Foreign

LEVELS = 16
MARGIN = 0.1
"""By how much another reading's mean logarithm of the error has to be lower."""
JUDGED = 5.0
"""The levels with |logsnr| up to this decide."""
EPS_ERROR = 0.05
"""The mean squared error of eps that is no sign of a wrong reading. Nearly all of a noisy z is eps, so that a network of little
training tells x from it worse than the mean image does.
"""


@dataclass(frozen=True)
class Level:
    """Mean squared errors of x_hat, per value, at a time t.

    constant  of the data's mean
    identity  of z / alpha
    linear    of the best linear denoiser (Wiener's), fitted to the other half of the images
    allowed   what an eps prediction may have beyond these: EPS_ERROR, divided by the little signal that is left
    """

    t: float
    logsnr: float
    model: float
    constant: float
    identity: float
    linear: float
    allowed: float

    @property
    def trivial(self) -> float:
        """The error of the better of the constant and the identity."""
        return min(self.constant, self.identity)

    @property
    def ratio(self) -> float:
        """The model's error over that of the best simple denoiser."""
        return self.model / (min(self.trivial, self.linear) + self.allowed)

    @property
    def judged(self) -> bool:
        return abs(self.logsnr) <= JUDGED

    @property
    def worse(self) -> bool:
        """Than the better of the constant and the identity. NaN is worse."""
        return self.judged and not self.model <= self.trivial + self.allowed

    @property
    def doubtful(self) -> bool:
        """Worse than one of the three. The linear denoiser is hard to beat for a network that was trained little."""
        return self.judged and not self.ratio <= 1


@dataclass(frozen=True)
class Proof:
    """errors   of the denoiser as it is read
    refused  it is worse than the constant or the identity at a level that decides, or another reading is better
    reason   the change of reading that makes it a good denoiser, such as "prediction: eps"; None if none that was tried does
    """

    errors: list[Level]
    refused: bool
    reason: str | None = None


def errors(
    denoiser: nn.Module, x: Tensor, label: Tensor | None = None, *, seed: int = 0, batch: int = 64
) -> list[Level]:
    """x [n, c, h, w] in [-1, 1], of which half fit the linear denoiser and the other half are denoised; label [n]. The times are
    the middles of 16 equal parts of [0, 1].
    """
    schedule: Schedule = denoiser.schedule  # type: ignore[assignment]
    fitted, seen = x[::2].flatten(1).double(), x[1::2]
    mean = fitted.mean(0)
    _, scale, directions = torch.linalg.svd(fitted - mean, full_matrices=False)
    variance = scale**2 / len(fitted)
    eps = getattr(denoiser, "prediction", None) == "eps"
    rng, found = torch.Generator().manual_seed(seed), []
    for i in range(LEVELS):
        t = torch.full((len(seen),), (i + 0.5) / LEVELS)
        z = q_sample(schedule=schedule, x=seen, eps=torch.randn(seen.shape, generator=rng), t=t)
        a, s = float(schedule.alpha(t[:1].double())), float(schedule.sigma(t[:1].double()))
        target, flat = seen.flatten(1).double(), z.flatten(1).double()
        along = ((flat - a * mean) @ directions.T) * (a * variance / (a**2 * variance + s**2))
        guesses = {"constant": mean.expand_as(target), "identity": flat / a, "linear": mean + along @ directions}
        simple = {name: float((guess - target).square().mean()) for name, guess in guesses.items()}
        x_hat = _denoised(denoiser, z, t, None if label is None else label[1::2], batch)
        error = float((x_hat.flatten(1).double() - target).square().mean())
        allowed = EPS_ERROR * s**2 / a**2 if eps else 0.0
        found.append(Level(float(t[0]), float(schedule.logsnr(t[:1])), error, **simple, allowed=allowed))
    return found


@torch.no_grad()
def _denoised(denoiser: nn.Module, z: Tensor, t: Tensor, label: Tensor | None, batch: int) -> Tensor:
    parts = range(0, len(z), batch)
    return torch.cat(
        [denoiser(z[i : i + batch], t[i : i + batch], None if label is None else label[i : i + batch]) for i in parts]
    )


def prove(denoiser: Denoiser, x: Tensor, label: Tensor | None = None, *, most: int = 128) -> Proof:
    """Examines a network from elsewhere on images [n, c, h, w] in [-1, 1] with their labels. If it is doubtful at any level, other
    readings are tried on `most` of the images.
    """
    levels = errors(denoiser, x, label)
    if not any(one.doubtful for one in levels):
        return Proof(levels, refused=False)
    x, label = x[:most], None if label is None else label[:most]
    best, reason = _score(errors(denoiser, x, label)), None
    for alternatives in _alternatives(denoiser, x, label):
        tried = {name: errors(other, *data) for name, other, data in alternatives}
        scores = {name: _score(found) for name, found in tried.items() if not any(one.doubtful for one in found)}
        if scores and min(scores.values()) < best - MARGIN:
            reason = min(scores, key=lambda name: scores[name])
            best = scores[reason]
    return Proof(levels, refused=reason is not None or any(one.worse for one in levels), reason=reason)


def _score(levels: list[Level]) -> float:
    """The mean logarithm of the error over that of the best simple denoiser, at the levels that decide."""
    ratios = torch.tensor([one.ratio for one in levels if one.judged]).log()
    return float(ratios.mean()) if ratios.isfinite().all() else float("inf")


def _alternatives(
    denoiser: Denoiser, x: Tensor, label: Tensor | None
) -> Iterator[list[tuple[str, nn.Module, tuple[Any, ...]]]]:
    """(what is changed, the denoiser, its images and labels): one change, and then two, which have to be better by MARGIN again."""
    backbone = denoiser.backbone
    assert isinstance(backbone, Foreign)
    config = backbone.config

    def read(prediction: str, time: str) -> Denoiser:
        other = copy.copy(backbone)  # of the same weights
        other.config = replace(config, time=time)
        return Denoiser(backbone=other, schedule=denoiser.schedule, prediction=prediction)

    def named(prediction: str, time: str) -> tuple[str, nn.Module, tuple[Any, ...]]:
        changes = [("prediction", prediction, denoiser.prediction), ("time", time, config.time)]
        name = ", ".join(f"{field}: {new}" for field, new, old in changes if new != old)
        return name, read(prediction, time), (x, label)

    predictions = [] if config.sigma_data else [one for one in PREDICTIONS if one != denoiser.prediction]
    times = [one for one in TIMES if one != config.time]
    single = [named(one, config.time) for one in predictions] + [named(denoiser.prediction, one) for one in times]
    single.append(("images in [0, 1], not [-1, 1]", denoiser, ((x + 1) / 2, label)))
    if x.shape[1] == 3:
        single.append(("the channels are blue, green, red", denoiser, (x.flip(1), label)))
    if label is not None:
        classes = config.num_classes
        single.append(("the labels begin at 1", denoiser, (x, (label + 1) % classes)))
        single.append(("the labels begin at 0, and these at 1", denoiser, (x, (label - 1) % classes)))
    yield single
    yield [named(*both) for both in itertools.product(predictions, times)]
