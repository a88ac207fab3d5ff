"""The engine: state, one training step, the loop, checkpoints. It runs in a plain process; workflows/ puts it on Ray."""

from mmdistill_core.engine.batches import InMemoryBatches
from mmdistill_core.engine.fit import FitOptions, fit
from mmdistill_core.engine.optim import OptimiserOptions
from mmdistill_core.engine.state import TrainState
from mmdistill_core.engine.step import NonFiniteError, train_step

__all__ = [
    "FitOptions",
    "InMemoryBatches",
    "NonFiniteError",
    "OptimiserOptions",
    "TrainState",
    "fit",
    "train_step",
]
