"""bench ray: what Ray Train adds to an update."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.engine import STEPS, K, floor_of, interleaved, job_of, joint, write_data
from workflows.config.schema import RunConfig


def ray_loop(config: dict[str, Any], rounds: int) -> dict[str, Any]:
    """On a Ray Train worker: times real training, with the images of a data set and reports to the driver, against the floor."""
    from mmdistill_core.engine import fit
    from workflows.training.worker import set_up

    began = time.perf_counter()
    t = set_up(config)
    ready = time.perf_counter() - began
    floor, batch = floor_of(t.state, t.batches), t.job.batch

    def train() -> None:
        t.state.total_images = t.state.n_images + STEPS * batch
        fit(
            state=t.state,
            batches=t.batches,
            options=replace(t.options, checkpoint_every=0),
            report=t.report,
            poll=t.poll,
        )

    def data() -> None:
        for i in range(STEPS):
            t.batches(t.state.n_images + i * batch)

    times = interleaved({"floor": floor, "train": train, "data": data}, rounds=rounds)
    saves = []
    for _ in range(3):
        t.checkpoints.settle()
        began = time.perf_counter()
        t.save(t.state)
        saves.append(time.perf_counter() - began)
    return {"set_up": ready, "times": times, "checkpoint": statistics.median(saves)}


def bench_ray(config: RunConfig, repeats: int) -> dict[str, Any]:
    from workflows.cluster.session import Workers, ray_session
    from workflows.training.crew import train
    from workflows.training.mailbox import Monitor

    with tempfile.TemporaryDirectory() as scratch, ray_session():
        folder = Path(scratch)
        job = job_of(joint(config), folder, k=K)
        write_data(config, folder)
        began = time.perf_counter()
        found = train(
            job,
            mailbox=Monitor().actor,
            workers=Workers(1, 1),
            use_gpu=False,
            loop=lambda settings: ray_loop(settings, repeats),
        )
        whole = time.perf_counter() - began
    times, per_checkpoint = found["times"], config.distill.checkpoint_every / config.distill.batch
    train_per_pair = times["train"]["median"] / STEPS + found["checkpoint"] / per_checkpoint
    floor_per_pair = times["floor"]["median"] / STEPS
    return {
        "seconds_per_pair": {"floor": floor_per_pair, "under Ray": train_per_pair},
        "ray_over_floor": train_per_pair / floor_per_pair,
        "target": 1.10,
        "share_of_data": times["data"]["median"] / STEPS / train_per_pair,
        "share_of_checkpoints": found["checkpoint"] / per_checkpoint / train_per_pair,
        "seconds_per_checkpoint": found["checkpoint"],
        "seconds_to_start": whole - sum(t["median"] * (repeats + 1) for t in times.values()) - 3 * found["checkpoint"],
        "rounds": times,
    }
