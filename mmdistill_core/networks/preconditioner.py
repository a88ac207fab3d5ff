"""Lambda of instant moment matching: a positive diagonal over a network's parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Preconditioner(nn.Module):
    """name -> Lambda, of each parameter's shape (2406.04103, Algorithm 3). A call multiplies a gradient, name -> tensor, by Lambda,
    in place, since the gradient is as large as the network.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.buffer_of = {name: f"lambda_{i}" for i, name in enumerate(values)}
        for name, value in values.items():
            self.register_buffer(self.buffer_of[name], value.detach().clone())

    @classmethod
    def identity(cls, network: nn.Module) -> Preconditioner:
        """Lambda = 1."""
        return cls({name: torch.ones_like(p) for name, p in network.named_parameters()})

    @classmethod
    def adam(cls, second_moments: Mapping[str, Tensor], *, eps: float = 1e-12) -> Preconditioner:
        """Adam's Lambda = 1 / (sqrt(v) + eps), from the mean squares v of the teacher's gradients. If v is 0, as for a label that
        training never showed, Lambda is 0: a parameter without a scale carries no information.
        """
        return cls({name: torch.where(v > 0, 1 / (v.sqrt() + eps), 0) for name, v in second_moments.items()})

    def check(self, network: nn.Module) -> None:
        """Raises ValueError, in one line, if Lambda does not fit this network."""
        own = {name: tuple(getattr(self, buffer).shape) for name, buffer in self.buffer_of.items()}
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        for name in sorted(own.keys() | shapes.keys()):
            if own.get(name) != shapes.get(name):
                found, wanted = (f"{s[name]}" if name in s else "nothing" for s in (own, shapes))
                raise ValueError(f"preconditioner: it has {found} for {name}, where the teacher has {wanted}")

    def forward(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: g.mul_(getattr(self, self.buffer_of[name])) for name, g in gradient.items()}
