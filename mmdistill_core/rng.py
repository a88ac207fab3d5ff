"""Randomness without state: a seed is a function of (seed, n_images, ...), so that a resumed run replays exactly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from any tuple of integers; near tuples give unrelated seeds."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device=device).manual_seed(derive_seed(*numbers))


@dataclass(frozen=True)
class Draws:
    """The draws of some rows of a global batch. A row's are its own, however the batch is shared among workers and cut into parts:
    those of the whole batch are drawn, and the others' dropped, which is little beside a network's work.

    rows   of the whole, which has `rows_of_all`; a part of them has draws from the beginning again
    """

    seed: int
    rows: range
    rows_of_all: int
    device: torch.device | str = "cpu"
    generator: torch.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        own = torch.Generator(device=self.device).manual_seed(self.seed)
        object.__setattr__(self, "generator", own)

    def __getitem__(self, part: slice) -> Draws:
        return replace(self, rows=self.rows[part])

    def own(self, drawn: Tensor) -> Tensor:
        return drawn[self.rows.start : self.rows.stop : self.rows.step].contiguous()


Rng = torch.Generator | Draws
"""Where a method's draws come from: a plain generator, or some rows of a global batch."""


def uniform(b: int, *, rng: Rng) -> Tensor:
    """U[0, 1], [b], on the rng's device."""
    if isinstance(rng, Draws):
        assert b == len(rng.rows)
        return rng.own(torch.rand(rng.rows_of_all, generator=rng.generator, device=rng.device))
    return torch.rand(b, generator=rng, device=rng.device)


def normal_like(x: Tensor, *, rng: Rng) -> Tensor:
    """Standard normal of x's shape, type and device."""
    if isinstance(rng, Draws):
        assert len(x) == len(rng.rows)
        shape = (rng.rows_of_all, *x.shape[1:])
        return rng.own(torch.randn(shape, generator=rng.generator, dtype=x.dtype, device=x.device))
    return torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
