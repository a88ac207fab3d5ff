"""Classifier-free guidance: away from a denoiser's prediction without the label (2207.12598, eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdistill_core.diffusion.process import expand
from mmdistill_core.rng import Rng, uniform

NULL_LABEL = -1
"""The label that means "no label". A denoiser gets it for the unconditional half of guidance."""


def guided(*, conditional: Tensor, unconditional: Tensor, w: Tensor) -> Tensor:
    """(1 + w) x_hat(z, label) - w x_hat(z, null), with w [b]; 0 is off. For w > 0 it is not a posterior mean."""
    return conditional + expand(w, like=conditional) * (conditional - unconditional)


def drop_labels(*, label: Tensor, share: float, rng: Rng) -> Tensor:
    """label [b] with a random `share` replaced by NULL_LABEL, so that a denoiser learns both halves of guidance."""
    dropped = uniform(len(label), rng=rng) < share
    return torch.where(dropped, NULL_LABEL, label)


def squeezed(w: Tensor) -> Tensor:
    """w / (1 + w) in [0, 1): the condition of a network that imitates guidance w."""
    return w / (1 + w)
