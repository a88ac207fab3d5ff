"""bench scaling: what each worker adds, what a checkpoint costs, how long a training takes to start, and to be there again."""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from workflows.config import RunConfig
from workflows.sources import source_of

STEPS, MANY = 10, 20
"""Updates timed together; and as many as take longer than a checkpoint takes to be written."""
ROUNDS = 3
"""Within each start of the workers."""


def bench_scaling(config: RunConfig, repeats: int, *, workers: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """`repeats` starts of each number of workers, in turns; every worker has one thread, and the batch is the recipe's."""
    from workflows.runtime.cluster import Monitor, Workers, ray_session, require
    from workflows.runtime.shards import write_shards
    from workflows.runtime.worker import train
    from workflows.stages.bench import K, job_of, loaded

    source = source_of(config.data)
    images, labels = loaded(source)
    found: dict[int, list[dict[str, Any]]] = {n: [] for n in workers}
    with tempfile.TemporaryDirectory() as scratch, ray_session() as resources:
        require(resources, cpus=max(workers))
        folder = Path(scratch)
        job = job_of(config, folder, k=K)
        write_shards(folder / "data", source="bench", images=images, labels=labels, num_classes=source.num_classes,
                     holdout=0.2, rows=512)  # fmt: skip
        for i in range(repeats):
            for n in workers:
                settings: dict[str, Any] = {"mailbox": Monitor().actor, "workers": Workers(n, n), "use_gpu": False}
                began = time.time()
                own = train(replace(job, name=f"scaling-{n}-{i}"), loop=scaling_loop, **settings)
                found[n].append(own | {"start": own["first"] - began})
        killed = [_recovery(replace(job, name=f"killed-{i}"), workers[-1]) for i in range(repeats)]
    rate = {n: statistics.median(run["rate"] for run in runs) for n, runs in found.items()}
    one = found[workers[0]]
    stall = statistics.median(run["stall"] for run in one)
    interval = job.checkpoint_every / job.batch * statistics.median(run["step"] for run in one)
    return {
        "images_per_second": {str(n): value for n, value in rate.items()},
        "bare_process": statistics.median(run["bare"] for run in one),
        "efficiency": {str(n): value / (n / workers[0] * rate[workers[0]]) for n, value in rate.items()},
        "target": 0.90,
        "seconds_to_first_step": {str(n): statistics.median(run["start"] for run in runs) for n, runs in found.items()},
        "checkpoint": {
            "stall": stall,
            "copied": statistics.median(run["copied"] for run in one),
            "interval": interval,
            "share": stall / interval,
            "target": 0.01,
        },
        "recovery": {"seconds": statistics.median(killed), "all": killed, "workers": workers[-1], "target": 30},
        "runs": {str(n): runs for n, runs in found.items()},
    }


def scaling_loop(config: dict[str, Any]) -> dict[str, Any]:
    """On each worker: the rate of training as it is, of the engine alone, and with a checkpoint on its way."""
    from mmdistill_core.engine import fit
    from workflows.runtime.worker import set_up

    t = set_up(config)
    options = replace(t.options, checkpoint_every=0)

    def train(steps: int, **more: Any) -> float:
        t.state.total_images = t.state.n_images + steps * t.job.batch
        began = time.perf_counter()
        fit(state=t.state, batches=t.batches, options=options, report=more.pop("report", t.report), **more)
        return time.perf_counter() - began

    train(1, asked=t.asked)
    first = time.time()
    times: dict[str, list[float]] = {"train": [], "bare": [], "plain": [], "checkpoint": [], "copied": []}
    for _ in range(ROUNDS):
        times["train"].append(train(STEPS, asked=t.asked))
        times["bare"].append(train(STEPS, report=lambda metrics: None))
        times["plain"].append(train(MANY, asked=t.asked))
        began = time.perf_counter()
        t.save(t.state)
        copied = time.perf_counter() - began
        times["checkpoint"].append(copied + train(MANY, asked=t.asked))
        times["copied"].append(copied)
        t.checkpoints.settle()
    median = {name: statistics.median(of) for name, of in times.items()}
    return {
        "first": first,
        "rate": STEPS * t.job.batch / median["train"],
        "bare": STEPS * t.job.batch / median["bare"],
        "step": median["plain"] / MANY,
        "stall": statistics.median(c - p for c, p in zip(times["checkpoint"], times["plain"], strict=True)),
        "copied": median["copied"],
    }


def _recovery(job: Any, workers: int) -> float:
    """Seconds from a worker's SIGKILL to the first update after it."""
    from workflows.runtime.cluster import Monitor, Workers
    from workflows.runtime.worker import train

    ends = train(job, mailbox=Monitor().actor, workers=Workers(workers, workers), use_gpu=False, loop=dying_loop)
    return float(ends["again"] - ends["killed"])


def dying_loop(config: dict[str, Any]) -> dict[str, float]:
    """The last worker kills itself after the first checkpoint; begun again, they train one update more."""
    from mmdistill_core.engine import fit
    from workflows.runtime.worker import set_up

    t = set_up(config)
    note, again = Path(t.job.storage) / f"{t.job.name}.killed", t.state.n_images > 0
    t.state.total_images = t.state.n_images + (1 if again else STEPS) * t.job.batch
    fit(state=t.state, batches=t.batches, options=replace(t.options, checkpoint_every=0), report=t.report)
    if again:
        return {"killed": float(note.read_text()), "again": time.time()}
    t.save(t.state)
    t.checkpoints.settle()
    if t.rank == t.options.world - 1:
        while t.checkpoints.images() < 0:
            time.sleep(0.01)
        note.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
    raise AssertionError
