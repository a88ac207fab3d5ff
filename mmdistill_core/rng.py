"""Randomness without state: a seed is a function of (seed, n_images, ...), so that a resumed run replays exactly."""

from __future__ import annotations

import hashlib
import math
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
    """Random draws for some rows of a global batch. A row gets the same draws however the batch is divided among workers and into
    parts: numbers are drawn for the whole batch, and those of other rows are dropped. This costs little beside a network.

    rows   these rows, of the `rows_of_all` in the batch. A slice of them starts its draws from the beginning again
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
"""The source of a method's draws: a plain generator, or the draws for some rows of a global batch."""


def _signed(bits: int) -> int:
    """64 unsigned bits as a signed integer, since torch's arithmetic has only int64."""
    return (bits + 2**63) % 2**64 - 2**63


GOLDEN, FIRST, SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
AT_ONCE = 2**15
"""Numbers that are drawn together: few enough that all steps on them stay in a processor's cache."""


def mixed(z: Tensor) -> Tensor:
    """Mixes the 64 bits of z: the output function of SplitMix64 (Steele, Lea, Flood 2014). int64 arithmetic wraps around."""
    z = (z ^ (z >> 30 & 2**34 - 1)).mul_(FIRST)
    z = (z ^ (z >> 27 & 2**37 - 1)).mul_(SECOND)
    return z ^ (z >> 31 & 2**33 - 1)


class Numbered:
    """Normal draws for the samples `first` to `first + count` of a seed. Up to rounding, draw j of sample i depends only on
    (seed, i, j): not on the number of samples, the worker, the batch size or the device.

    Element e of a draw: let `key = mixed(mixed(seed' + (i + 1) GOLDEN) + (j + 1) GOLDEN)`, where seed' is `derive_seed(seed)`. The
    two halves of `mixed(key + (e + 1) GOLDEN)` are two uniforms, and the Box-Muller transform makes two normals of them.
    """

    def __init__(self, seed: int, *, first: int, count: int, device: torch.device | str = "cpu") -> None:
        numbers = torch.arange(first + 1, first + count + 1, device=device)
        self._keys, self._drawn = mixed(numbers * GOLDEN + _signed(derive_seed(seed))), 0

    def normal_like(self, x: Tensor) -> Tensor:
        """The next draw, of x's shape [count, ...] and type."""
        assert len(x) == len(self._keys)
        self._drawn += 1
        keys, size = mixed(self._keys + _signed(self._drawn * GOLDEN)), x[0].numel() if len(x) else 0
        pairs = torch.arange(1, size // 2 + size % 2 + 1, device=x.device) * GOLDEN
        parts = [self._normal(own, pairs) for own in keys.split(max(1, AT_ONCE // max(1, len(pairs))))]
        return torch.cat(parts)[:, :size].reshape(x.shape).to(x.dtype) if len(x) else torch.empty_like(x)

    @staticmethod
    def _normal(keys: Tensor, pairs: Tensor) -> Tensor:
        bits = mixed(keys[:, None] + pairs)
        radius = (bits >> 32 & 2**32 - 1).float().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = (bits & 2**32 - 1).float().mul_(2 * math.pi * 2.0**-32)
        return torch.cat([radius * angle.cos(), radius.mul_(angle.sin_())], 1)


def uniform(b: int, *, rng: Rng) -> Tensor:
    """U[0, 1], [b], on the rng's device."""
    if isinstance(rng, Draws):
        assert b == len(rng.rows)
        return rng.own(torch.rand(rng.rows_of_all, generator=rng.generator, device=rng.device))
    return torch.rand(b, generator=rng, device=rng.device)


def normal_like(x: Tensor, *, rng: Rng | Numbered) -> Tensor:
    """Standard normal of x's shape, type and device."""
    if isinstance(rng, Numbered):
        return rng.normal_like(x)
    if isinstance(rng, Draws):
        assert len(x) == len(rng.rows)
        shape = (rng.rows_of_all, *x.shape[1:])
        return rng.own(torch.randn(shape, generator=rng.generator, dtype=x.dtype, device=x.device))
    return torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
