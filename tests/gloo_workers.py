"""Trainings on several worker processes, joined by gloo. `python gloo_workers.py` is one of them."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from trainings import MAKE, make_batches, make_state

from mmdistill_core.engine import train_step
from mmdistill_core.engine.checkpoint import load_checkpoint, save_checkpoint
from workflows.training.parallelize import Compute, gathered, parallelize, sharded_like

STEPS = 3


def train(name, fields, rank, world, folder, before=None):
    """Trains some steps, from the checkpoint `before` if there is one. The first worker writes the whole state."""
    state, micro_batch = make_state(MAKE[name]()), fields.pop("micro_batch", None)
    for role in state.options:
        state.optimisers[role].param_groups[0]["eps"] = 1e-4
    state.micro_batch = micro_batch

    def averaged(statistic):
        if world > 1:
            for value in statistic.values():
                torch.distributed.all_reduce(value)
                value /= world
        return statistic

    state.averaged_over_workers = averaged
    parallelize(state, compute := Compute(**fields), world=world, device=torch.device("cpu"))
    for optimiser in state.optimisers.values():
        optimiser.param_groups[0]["eps"] = (
            1e-4  # with a small eps, rounding errors of a zero gradient would become whole steps
        )
    if before:
        values = load_checkpoint(before)
        state.load_state_dict(sharded_like(values, state) if compute.shard and world > 1 else values)
    batches = make_batches(rank, world)
    for _ in range(STEPS):
        train_step(state=state, batches=batches, seed=0, rank=rank, world=world)
    state.keep_if_best(1.0)
    assert state.n_images > 0
    best = state.best_network().state_dict()
    values = gathered(state.state_dict(), keep=True)
    if rank == 0:
        save_checkpoint(folder, values)
        weights = {name: v for name, v in best.items() if not name.endswith("n_averaged")}
        save_checkpoint(f"{folder}-best", {"best": weights})


def main(rank, world, place):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(place) / f"store-{world}"), world)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for case in json.loads((Path(place) / f"cases-{world}.json").read_text()):
        train(case["name"], case["fields"], rank, world, Path(place) / case["to"], case.get("before"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
