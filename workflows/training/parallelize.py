"""How a training's networks are laid on its workers, from outside: no method knows of it.

float32 or bfloat16 (autocast; weights, averages and optimisers stay float32), activation checkpointing, torch.compile, and what the
workers share: copies whose gradients are averaged (DDP), or weights, gradients and optimisers cut among them (FSDP2).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Compute:
    """precision  float32 or bfloat16, of the networks' operations
    shard      cut weights, gradients and optimisers among the workers
    recompute  keep no activations within blocks, and go forward through them again
    compile    torch.compile
    """

    precision: str = "float32"
    shard: bool = False
    recompute: bool = False
    compile: bool = False


class Autocast(nn.Module):
    """A network whose operations are bfloat16 where that is safe; takes and gives float32."""

    def __init__(self, network: nn.Module, device: str) -> None:
        super().__init__()
        self.network, self.device_type = network, device

    def forward(self, *arguments: Any) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16):
            out: Tensor = self.network(*arguments)
        return out.float()


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """What is repeated in it: the members of its lists of modules."""
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            yield from module


def lay(state: Any, compute: Compute, *, world: int, device: torch.device) -> None:
    """Changes a TrainState for these workers; its networks are on the device. Instant differentiates by the teacher's own
    parameters, so that what is frozen there stays as it is.
    """
    plain = {"teacher", "preconditioner"} if "preconditioner" in state.networks else set()
    state.unsynced = lambda: _unsynced(state)
    for role, network in state.networks.items():
        if role in plain:
            continue
        trained = role in state.optimisers
        if compute.recompute and trained:
            _recompute(network)
        if compute.shard and world > 1:
            if role == state.best.role:
                state.template = copy.deepcopy(network).cpu()
            _shard(network)
        state.callables[role] = _callable(network, compute, trained=trained, world=world, device=device)
    if compute.shard and world > 1:  # the parameters are others now
        state.optimisers = {role: state.options[role].build(state.networks[role]) for role in state.optimisers}


def _callable(network: nn.Module, compute: Compute, *, trained: bool, world: int, device: torch.device) -> nn.Module:
    called = network
    if compute.precision == "bfloat16":
        called = Autocast(called, device.type)
    if compute.compile:
        called = torch.compile(called)  # type: ignore[assignment]
    if trained and world > 1 and not compute.shard:
        # What is no parameter is a constant of the network, the same on all.
        called = DistributedDataParallel(called, broadcast_buffers=False, gradient_as_bucket_view=True)
    return called


def _recompute(network: nn.Module) -> None:
    """By hooks on its blocks, which leave the names of their parameters as they are."""
    from torch.distributed._composable import checkpoint

    for block in blocks_of(network):
        checkpoint(block)


def _shard(network: nn.Module) -> None:
    """Also the root is cut again after a forward: else one without a backward would leave it whole, and out of averages' reach."""
    for part in (*blocks_of(network), network):
        fully_shard(part, reshard_after_forward=True)


def _unsynced(state: Any) -> AbstractContextManager[Any]:
    """The context in which no network exchanges gradients."""
    stack = ExitStack()
    for role, called in state.callables.items():
        if isinstance(called, DistributedDataParallel):
            stack.enter_context(called.no_sync())
        elif isinstance(network := state.networks[role], FSDPModule):
            stack.enter_context(_apart(network))
    return stack


@contextmanager
def _apart(network: FSDPModule) -> Iterator[None]:
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


def gathered(value: Any, *, keep: bool) -> Any:
    """Nested values with every tensor whole, on the CPU where it was cut; None in its place if not `keep`. All workers call it."""
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(value, dict):
        return {name: gathered(item, keep=keep) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [gathered(item, keep=keep) for item in value]
    return value


def cut_like(values: dict[str, Any], state: Any) -> dict[str, Any]:
    """A TrainState's state_dict, with its tensors cut as that state's are."""

    def like(value: Any, own: Any) -> Any:
        if isinstance(own, DTensor) and isinstance(value, Tensor):
            return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
        return value

    networks = {
        role: {name: like(value, own[name]) for name, value in weights.items()}
        for role, weights in values["networks"].items()
        for own in (state.networks[role].state_dict(),)
    }
    optimisers = {}
    for role, saved in values["optimisers"].items():
        (group,) = state.optimisers[role].param_groups
        moments = {
            i: {name: like(value, group["params"][i]) if value.dim() else value for name, value in of.items()}
            for i, of in saved["state"].items()
        }
        optimisers[role] = saved | {"state": moments}
    return values | {"networks": networks, "optimisers": optimisers}
