"""Samplers: one sampler is one function of (denoiser, z, times, rng)."""

from mmdistill_core.samplers.labels import data_labels
from mmdistill_core.samplers.samplers import (
    SAMPLERS,
    Denoise,
    ancestral,
    clipped_denoiser,
    ddim,
    guided_denoiser,
    heun,
    renoise,
    sample,
    told_denoiser,
)

__all__ = [
    "SAMPLERS",
    "Denoise",
    "ancestral",
    "clipped_denoiser",
    "data_labels",
    "ddim",
    "guided_denoiser",
    "heun",
    "renoise",
    "sample",
    "told_denoiser",
]
