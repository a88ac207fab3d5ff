"""Shares a network through Ray's object store, with one copy per node. The parameters of a taken module are read-only views of the
stored bytes. A process that must change the network copies it.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Shelf:
    """A module without its tensors, and the tensors as arrays by their path in the module."""

    skeleton: Any
    arrays: dict[str, np.ndarray]

    @classmethod
    def of(cls, module: nn.Module) -> Shelf:
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        arrays = {path: tensor.detach().cpu().contiguous().numpy() for path, tensor in tensors.items()}
        return cls(copy.deepcopy(module).to("meta"), arrays)

    def take(self) -> nn.Module:
        """The module, with frozen parameters. Call it once for each time that the shelf is got from the store."""
        from torch import nn

        module: nn.Module = self.skeleton
        for path, array in self.arrays.items():
            place, _, name = path.rpartition(".")
            owner = module.get_submodule(place)
            if name in owner._parameters:
                owner._parameters[name] = nn.Parameter(tensor(array), requires_grad=False)
            else:
                owner._buffers[name] = tensor(array)
        return module


def tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor that shares its memory. The memory is read-only, and torch's warning about that is silenced."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
