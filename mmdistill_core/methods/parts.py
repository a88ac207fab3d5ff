"""Formulas that several methods share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdistill_core.diffusion.process import eta_step, posterior, q_sample
from mmdistill_core.diffusion.schedules import Schedule
from mmdistill_core.rng import Rng, normal_like


def per_sample_mean(value: Tensor) -> Tensor:
    """[b, ...] -> [b]: the mean over dimensions. Every loss here is reduced this way; only the engine reduces over b."""
    return value.flatten(1).mean(dim=1)


def denoising_loss(*, x: Tensor, x_hat: Tensor, weight: Tensor) -> Tensor:
    """w |x - x_hat|^2, [b]."""
    return weight * per_sample_mean((x - x_hat).square())


def push(*, x_hat: Tensor, direction: Tensor, weight: Tensor) -> Tensor:
    """w x_hat . sg[direction], [b]: minimising it moves x_hat against `direction`."""
    return weight * per_sample_mean(x_hat * direction.detach())


def noisy(*, schedule: Schedule, x: Tensor, t: Tensor, rng: Rng) -> Tensor:
    """z_t ~ q(z_t | x)."""
    return q_sample(schedule=schedule, x=x, eps=normal_like(x, rng=rng), t=t)


def rows_where(holds: Tensor, *, share: float) -> Tensor:
    """The numbers of the rows where `holds` [b] is true. share: the expected one, which stands for it in a fake tensor, with which
    `engine.cost` counts: it has no values.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(holds, FakeTensor):
        return torch.arange(round(share * len(holds)), device=holds.device)
    return holds.nonzero()[:, 0]


Transition = Literal["conditional", "unconditional"]


def transition(
    *,
    schedule: Schedule,
    z_t: Tensor,
    x_tilde: Tensor,
    t: Tensor,
    s: Tensor,
    noise: Tensor,
    kind: str = "conditional",
    eta: float = 1.0,
) -> Tensor:
    """sg[z_s]: where the student's sampler goes from z_t with x_tilde and this normal noise (2406.04103, Algorithm 2).

    conditional    z_s ~ q(z_s | z_t, x_tilde); eta < 1: less noise, and 0 is DDIM
    unconditional  z_s ~ q(z_s | x_tilde), with fresh noise: the paper's comparison
    """
    x = x_tilde.detach()
    if kind == "unconditional":
        return q_sample(schedule=schedule, x=x, eps=noise, t=s)
    if eta != 1:
        return eta_step(schedule=schedule, z_t=z_t, x=x, t=t, s=s, noise=noise, eta=eta)
    return posterior(schedule=schedule, z_t=z_t, x=x, t=t, s=s, noise=noise)


def straight_through(*, value: Tensor, modified: Tensor) -> Tensor:
    """The value of `modified`, with the gradient of `value`."""
    return value + (modified - value).detach()


Derivative = Literal["forward", "double_backward"]


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """name -> parameter, detached but sharing its memory: gradients with respect to these do not reach the network's own."""
    return {name: p.detach().requires_grad_() for name, p in network.named_parameters()}


def directional_derivative(
    network: nn.Module, arguments: tuple[Any, ...], *, direction: Mapping[str, Tensor], by: str = "forward"
) -> tuple[Tensor, Tensor]:
    """(g, d): the network's output and its derivative along `direction` in parameter space, d = (dg / dtheta) direction.

    forward          forward mode: about three times the operations of a forward pass, and no activations are kept
    double_backward  the gradient in u of <grad_theta (u . g), direction>: for operators without forward mode
    Fused attention supports neither, so this uses plain attention.
    """
    parameters = parameters_of(network)
    with sdpa_kernel(SDPBackend.MATH):
        if by == "forward":
            values = {name: p.detach() for name, p in parameters.items()}
            both: tuple[Tensor, Tensor] = jvp(  # type: ignore[assignment]
                lambda p: functional_call(network, p, arguments), (values,), (dict(direction),)
            )
            return both
        if by == "double_backward":
            with torch.enable_grad():
                g = functional_call(network, parameters, arguments)
                u = torch.zeros_like(g, requires_grad=True)
                slopes = torch.autograd.grad(g, list(parameters.values()), u, create_graph=True, materialize_grads=True)
                along = torch.stack([(a * direction[n]).sum() for n, a in zip(parameters, slopes, strict=True)]).sum()
                (d,) = torch.autograd.grad(along, u)
            return g.detach(), d
    raise ValueError(f"derivative: {by!r} is not one of {', '.join(get_args(Derivative))}")
