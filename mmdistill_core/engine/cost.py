"""The cost of training, counted on fake tensors: operations and bytes of a real step, without a device and without data."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from mmdistill_core.engine.state import TrainState
from mmdistill_core.engine.step import backward
from mmdistill_core.methods.base import Batch, Phase
from mmdistill_core.rng import Draws

_aten = torch.ops.aten
FUSED_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*qkv[:3]),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *gqkv, **_: sdpa_backward_flop_count(*gqkv[:4]),
}
"""The CPU's fused attention, for which torch has no formulas. It keeps the same tensors as a GPU's."""
FORMULAS = flop_registry | {kind: shape_wrapper(formula) for kind, formula in FUSED_ATTENTION.items()}


class Meter(TorchDispatchMode):
    """Counts the operations of a block, and the most bytes of its allocations alive at once. `outside` are tensors from before the
    block. torch's own counter of operations gives the same number in twice the time.
    """

    def __init__(self, outside: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._outside = [t.untyped_storage() for t in outside]
        self._alive = {storage._cdata for storage in self._outside}
        self.bytes = self.peak = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for value in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in self._alive:
            return
        self._alive.add(name)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, name, size)

    def _gone(self, name: int, size: int) -> None:
        self._alive.discard(name)
        self.bytes -= size


@dataclass(frozen=True)
class Cost:
    """The cost of one more image: floating-point operations, and bytes during a forward and backward pass."""

    flops: float
    bytes: float


def phase_cost(state: TrainState, phase: Phase, image: tuple[int, ...], *, label: bool) -> Cost:
    """The cost of the phase's loss and its backward pass. Call it under a FakeTensorMode, which needs no device."""
    # Enough images that memory peaks at the activations, and not at the end, where all gradients exist.
    (few, least), (many, most) = (_measure(state, phase, image, label, n) for n in (16, 32))
    return Cost(flops=(many - few) / 16, bytes=(most - least) / 16)


def statistic_bytes(state: TrainState, phase: Phase, image: tuple[int, ...], *, label: bool) -> int:
    """Bytes of the phase's statistic, or 0. It stays in memory during the loss."""
    if phase.statistic is None:
        return 0
    batch = Batch(torch.zeros(2, *image), torch.zeros(2, dtype=torch.long) if label else None)
    found = phase.statistic(state.called_in(phase.trains), batch, Draws(0, range(2), 2), state.progress)
    return sum(value.nbytes for value in found.values())


def _measure(state: TrainState, phase: Phase, image: tuple[int, ...], label: bool, n: int) -> tuple[float, float]:
    """(operations for n images, peak bytes) with n images at once. In a phase with a statistic, n counts each half."""
    halves = 1 if phase.statistic is None else 2
    batch = Batch(torch.zeros(halves * n, *image), torch.zeros(halves * n, dtype=torch.long) if label else None)
    state.micro_batch, state.global_batch = None, len(batch)
    for role in phase.trains:
        state.optimisers[role].zero_grad(set_to_none=True)
    outside = [t for network in state.networks.values() for t in _tensors(network)]
    with Meter([*outside, batch.x]) as meter:
        backward(state, phase, batch, Draws(0, range(len(batch)), len(batch)))
    return meter.flops / halves, meter.peak


def forward_flops(network: nn.Module, image: tuple[int, ...]) -> float:
    """Operations of a forward pass of one image."""
    with Meter() as meter, torch.no_grad():
        network(torch.zeros(1, *image), torch.zeros(1), None)
    return meter.flops


def bytes_of(network: nn.Module) -> int:
    """Bytes of the network's parameters and buffers."""
    return sum(t.nbytes for t in _tensors(network))


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
