"""w(logsnr): the weight of each noise level in a loss in x, |x_hat - x|^2."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Weighting = Literal["flat", "snr", "v", "edm", "sigmoid"]
WEIGHTINGS = get_args(Weighting)


def weight(*, weighting: str, logsnr: Tensor, sigma_data: float = 0.5, logsnr_shift: float = 0.0) -> Tensor:
    """w [b] for logsnr [b], as a function of logsnr - logsnr_shift. The shift is that of the resolution (`resolution_shift`).

    flat     1
    snr      alpha^2 / sigma^2: the loss in eps
    v        1 + SNR: the loss in v (2202.00512, "SNR + 1")
    edm      (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = SNR + 1 / sigma_data^2: EDM's training weight (2206.00364), the
             w(s) of 2406.04103
    sigmoid  SNR sigmoid(-logsnr) = sigmoid(logsnr): eps-weight times sigmoid, bounded by 1 (2410.19324)
    """
    logsnr = logsnr - logsnr_shift
    if weighting == "flat":
        return torch.ones_like(logsnr)
    if weighting == "snr":
        return logsnr.exp()
    if weighting == "v":
        return 1 + logsnr.exp()
    if weighting == "edm":
        return logsnr.exp() + 1 / sigma_data**2
    if weighting == "sigmoid":
        return torch.sigmoid(logsnr)
    raise ValueError(f"w_s: {weighting!r} is not one of {', '.join(WEIGHTINGS)}")


def dmd_weight(*, x: Tensor, x_hat: Tensor) -> Tensor:
    """1 / mean |x - x_hat|, [b]: DMD's weight, by the distance of the sample from the teacher's x_hat (2311.18828, eq. 8, in terms
    of x). It depends on the sample. So it may weight a student's gradient, but not a regression, whose mean it would shift.
    """
    return 1 / (x - x_hat).detach().abs().flatten(1).mean(dim=1).clamp_min(1e-6)
