"""w(logsnr): how much each noise level counts in a loss written in x, |x_hat - x|^2."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Weighting = Literal["flat", "snr", "v", "edm", "sigmoid"]
WEIGHTINGS = get_args(Weighting)


def weight(*, weighting: str, logsnr: Tensor, sigma_data: float = 0.5, logsnr_shift: float = 0.0) -> Tensor:
    """w [b] for logsnr [b]: of logsnr - logsnr_shift, where the shift is that of the resolution (`resolution_shift`).

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
    """1 / mean |x - x_hat|, [b]: DMD's, by how far the sample is from what the teacher makes of it (2311.18828, eq. 8, in terms
    of x). It depends on the sample, so it may weigh a student's gradient but no regression: that would move the mean regressed on.
    """
    return 1 / (x - x_hat).detach().abs().flatten(1).mean(dim=1).clamp_min(1e-6)
