"""Classifier-free guidance: away from what a denoiser says without the label (2207.12598, eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdistill_core.diffusion.process import expand
from mmdistill_core.rng import Rng, uniform

NULL_LABEL = -1
"""The label that says "no label": what a denoiser is given for the unconditional half of guidance."""


def guided(*, conditional: Tensor, unconditional: Tensor, w: Tensor) -> Tensor:
    """(1 + w) x_hat(z, label) - w x_hat(z, null), with w [b]: 0 is off, and the posterior mean for w > 0 no longer."""
    return conditional + expand(w, like=conditional) * (conditional - unconditional)


def drop_labels(*, label: Tensor, share: float, rng: Rng) -> Tensor:
    """label [b] with `share` of it replaced by NULL_LABEL: so a denoiser learns both halves of guidance."""
    dropped = uniform(len(label), rng=rng) < share
    return torch.where(dropped, NULL_LABEL, label)


def squeezed(w: Tensor) -> Tensor:
    """w / (1 + w) in [0, 1): how a network is told the guidance that it is to imitate."""
    return w / (1 + w)
