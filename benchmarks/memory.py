"""bench memory: the peak memory of each kind of update, each in its own process."""

from __future__ import annotations

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from workflows.config.schema import RunConfig

UPDATES = ("joint", "alternating", "instant")
NETWORK: dict[str, Any] = {"image_size": 32, "channels": 3, "patch": 4, "width": 512, "depth": 8, "heads": 8}
"""38 million parameters, so that the weights dominate the activations."""
BATCH = 4


def bench_memory(config: RunConfig, repeats: int) -> dict[str, Any]:
    """Peak bytes of two rounds of updates above what the process held before, also in copies of the network's weights. Each is the
    median of `repeats` processes. On a CPU it is the resident memory of the process, on a GPU the allocator's peak.
    """
    rows = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for update in UPDATES:
            runs = [pool.submit(peak, update).result() for _ in range(repeats)]
            median = statistics.median(run["bytes"] for run in runs)
            rows[update] = runs[0] | {"bytes": median, "copies": median / runs[0]["bytes_of_weights"]}
    return {"network": NETWORK, "batch": BATCH, "updates": rows}


def peak(update: str) -> dict[str, Any]:
    """Bytes at the peak, and how many networks of the teacher's size are held. Call it in a fresh process."""
    import torch

    from mmdistill_core.artifact import build_denoiser
    from mmdistill_core.diffusion.schedules import Cosine
    from mmdistill_core.engine import OptimiserOptions, TrainState, train_step
    from mmdistill_core.engine.preparation import Preparation
    from mmdistill_core.methods.base import Batch
    from mmdistill_core.methods.moment_matching import MomentMatching
    from mmdistill_core.networks.dit import DiTConfig

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = _held(device)
    teacher = build_denoiser(network=DiTConfig(**NETWORK), prediction="v", schedule={"name": "cosine"}).to(device)
    options: dict[str, Any] = {"update": update, "ema": False, "preconditioner": "identity"}
    method = MomentMatching(schedule=Cosine(), k=8, **options)
    state = TrainState.create(
        method=method,
        given={"teacher": teacher},
        prepare=lambda networks: method.prepare(Preparation(networks)),
        options=OptimiserOptions(warmup_images=0),
        global_batch=BATCH,
        total_images=10**9,
    )
    batch = Batch(torch.randn(BATCH, 3, 32, 32, device=device))
    for _ in range(4):
        train_step(state=state, batches=lambda n: batch, seed=0)
    weights = sum(p.numel() * p.element_size() for p in teacher.parameters())
    networks = sum(name != "preconditioner" for name in state.networks)
    return {"bytes": _held(device) - held, "bytes_of_weights": weights, "networks": networks}


def _held(device: str) -> int:
    """The most bytes that this process has held so far."""
    import resource
    import sys
    from pathlib import Path

    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss begins with what the parent held
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
