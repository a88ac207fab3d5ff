"""Samplers: one sampler is one function of (denoiser, z, times, rng)."""

from mmdistill_core.samplers.labels import data_labels
from mmdistill_core.samplers.samplers import SAMPLERS, ancestral, ddim, heun, sample

__all__ = ["SAMPLERS", "ancestral", "data_labels", "ddim", "heun", "sample"]
