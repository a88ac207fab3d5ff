"""Spreads a training's networks over its workers, without the methods knowing.

It applies float32 or bfloat16 (autocast; weights, EMAs and optimisers stay float32), activation checkpointing, torch.compile, and
DDP (copies with averaged gradients) or FSDP2 (weights, gradients and optimisers sharded over the workers).
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
    """precision  of the networks' operations: float32 or bfloat16
    shard      shard weights, gradients and optimisers over the workers
    recompute  activation checkpointing: recompute the activations within blocks in the backward pass
    compile    torch.compile
    """

    precision: str = "float32"
    shard: bool = False
    recompute: bool = False
    compile: bool = False


class Autocast(nn.Module):
    """A network that computes in bfloat16 where that is safe. Takes and returns float32."""

    def __init__(self, network: nn.Module, device: str) -> None:
        super().__init__()
        self.network, self.device_type = network, device

    def forward(self, *arguments: Any) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16):
            out: Tensor = self.network(*arguments)
        return out.float()


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a network: the members of its module lists, but not of lists within these."""
    for module in network.children():
        if isinstance(module, nn.ModuleList):
            yield from module
        else:
            yield from blocks_of(module)


def parallelize(state: Any, compute: Compute, *, world: int, device: torch.device) -> None:
    """Changes a TrainState in place for these workers. Its networks must be on the device. A role marked `whole` is left alone."""
    from torch.distributed._composable import checkpoint

    whole = {role.name for role in state.method.roles if role.whole}
    state.unsynced = lambda: _unsynced(state)
    for role, network in state.networks.items():
        if role in whole:
            continue
        trained = role in state.optimisers
        if compute.recompute and trained:
            for block in blocks_of(network):
                checkpoint(block)  # by hooks, which leave the names of parameters as they are
        if compute.shard and world > 1:
            if role == state.best.role:
                state.template = copy.deepcopy(network).cpu()
            for part in (*blocks_of(network), network):
                # The root too: otherwise it would stay whole until a backward, and the EMA could not read it.
                fully_shard(part, reshard_after_forward=True)
        called = Autocast(network, device.type) if compute.precision == "bfloat16" else network
        if compute.compile:
            called = torch.compile(called)
        state.callables[role] = called
        if trained and world > 1 and not compute.shard:
            # Buffers are not broadcast, since they are constants, the same on all workers.
            called = DistributedDataParallel(called, broadcast_buffers=False, gradient_as_bucket_view=True)
        if trained:
            state.trainables[role] = called
    if compute.shard and world > 1:  # sharding has replaced the parameters
        state.optimisers = {role: state.options[role].build(state.networks[role]) for role in state.optimisers}


def _unsynced(state: Any) -> AbstractContextManager[Any]:
    """A context in which no network exchanges gradients, for gradient accumulation."""
    stack = ExitStack()
    for role, called in state.trainables.items():
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
    """Nested values with every sharded tensor whole and on the CPU, or as None without `keep`. All workers must call it."""
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(value, dict):
        return {name: gathered(item, keep=keep) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [gathered(item, keep=keep) for item in value]
    return value


def sharded_like(values: dict[str, Any], state: Any) -> dict[str, Any]:
    """A TrainState's state_dict, with its tensors sharded like those of `state`."""

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
