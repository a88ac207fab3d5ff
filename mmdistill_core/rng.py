"""Randomness without state: a seed is a function of (seed, rank, n_images), so that a resumed run replays exactly."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from any tuple of integers; near tuples give unrelated seeds."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device=device).manual_seed(derive_seed(*numbers))
