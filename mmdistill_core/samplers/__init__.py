"""Samplers: one sampler is one function of (denoiser, z, times, rng)."""
