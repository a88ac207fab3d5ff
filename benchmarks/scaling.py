"""bench scaling: what each worker adds, what a checkpoint costs, and how long a training takes to start and to recover."""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from workflows.config.schema import RunConfig

STEPS, MANY = 10, 20
"""Updates timed together. MANY take longer than writing a checkpoint."""
ROUNDS = 3
"""Rounds within each start of the workers."""
LARGER = 8
"""The larger batch, in multiples of the recipe's. It spreads costs that do not grow with the batch, such as the all-reduce."""


def bench_scaling(config: RunConfig, repeats: int, *, workers: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """The figures over `repeats` starts of each number of workers, in turns, with the recipe's batch and a larger one. Every worker
    has one thread.
    """
    from benchmarks.engine import K, job_of, write_data
    from workflows.cluster.session import Workers, ray_session, require
    from workflows.training.crew import train
    from workflows.training.mailbox import Monitor

    with tempfile.TemporaryDirectory() as scratch, ray_session() as resources:
        require(resources, cpus=max(workers))
        folder = Path(scratch)
        job = job_of(config, folder, k=K)
        write_data(config, folder)
        batches = (job.batch, LARGER * job.batch)
        together: dict[tuple[int, int], list[dict[str, list[float]]]] = {(b, n): [] for b in batches for n in workers}
        starts: dict[int, list[float]] = {n: [] for n in workers}
        single = []
        for i in range(repeats):
            own = Monitor().actor
            single.append(train(replace(job, name=f"one-{i}"), mailbox=own, workers=Workers(1, 1), use_gpu=False,
                                loop=single_loop))  # fmt: skip
            for batch, n in together:
                began = time.time()
                one = replace(job, name=f"scaling-{batch}-{n}-{i}", batch=batch)
                run = train(one, mailbox=own, workers=Workers(n, n), use_gpu=False, loop=together_loop)
                starts[n].append(run.pop("first") - began)
                together[batch, n].append(run)
        killed = [_recovery(replace(job, name=f"killed-{i}"), workers[-1]) for i in range(repeats)]
    stall, step = (statistics.median(run[name] for run in single) for name in ("stall", "step"))
    interval = job.checkpoint_every / job.batch * step
    return {
        "batches": {str(batch): {str(n): _scaled(together[batch, n], batch, n) for n in workers} for batch in batches},
        "target": 0.90,
        "bare_process": statistics.median(run["bare"] for run in single),
        "trained": statistics.median(run["rate"] for run in single),
        "seconds_to_first_step": {str(n): statistics.median(of) for n, of in starts.items()},
        "checkpoint": {
            "stall": stall,
            "copied": statistics.median(run["copied"] for run in single),
            "interval": interval,
            "share": stall / interval,
            "target": 0.01,
        },
        "recovery": {"seconds": statistics.median(killed), "all": killed, "workers": workers[-1], "target": 30},
        "runs": single,
    }


def _scaled(runs: list[dict[str, list[float]]], batch: int, n: int) -> dict[str, Any]:
    """Over all rounds: images/s of one worker while the others wait, of all together, and of all without communication. Then the
    last two over n times the first, round by round.
    """
    rounds = [dict(zip(run, times, strict=True)) for run in runs for times in zip(*run.values(), strict=True)]
    rate = {name: STEPS * batch / statistics.median(times[name] for times in rounds) for name in rounds[0]}
    share = {name: [times["alone"] / times[name] / n for times in rounds] for name in ("joined", "apart")}
    return {
        "images_per_second": rate,
        "efficiency": statistics.median(share["joined"]),
        "of_the_machine": statistics.median(share["apart"]),
        "all": share,
    }


def _stepper(t: Any) -> Callable[..., float]:
    """A function that trains so many updates, without checkpoints, and returns the seconds."""
    from mmdistill_core.engine import fit

    options = replace(t.options, checkpoint_every=0)

    def train(steps: int, **more: Any) -> float:
        t.state.total_images = t.state.n_images + steps * t.state.global_batch
        began = time.perf_counter()
        fit(state=t.state, batches=t.batches, options=options, report=more.pop("report", t.report), **more)
        return time.perf_counter() - began

    return train


def together_loop(config: dict[str, Any]) -> dict[str, Any]:
    """On each worker, in turns: one trains alone, all train together, each trains its share of the batch by itself."""
    import torch

    from mmdistill_core.engine import FitOptions, InMemoryBatches
    from workflows.training.job import Place, build_state
    from workflows.training.worker import set_up

    t = set_up(config)
    world, log_every = t.options.world, t.options.log_every

    def by_itself(batch: int) -> Callable[..., float]:
        job, x, label = replace(t.job, batch=batch), t.batches.x, t.batches.label
        batches = InMemoryBatches(x=x, label=label, global_batch=batch, seed=0)
        state, options = build_state(job, Place(batches)), FitOptions(log_every)
        return _stepper(replace(t, job=job, state=state, batches=batches, options=options, report=lambda metrics: None))

    def wait() -> None:
        if world > 1:
            torch.distributed.barrier()

    alone, joined, apart = by_itself(t.job.batch), _stepper(t), by_itself(t.job.batch // world)
    joined(1, poll=t.poll)
    first = time.time()
    apart(1)
    times: dict[str, list[float]] = {"alone": [], "joined": [], "apart": []}
    for _ in range(ROUNDS):
        wait()
        if t.rank == 0:
            times["alone"].append(alone(STEPS))
        wait()
        times["joined"].append(joined(STEPS, poll=t.poll))
        wait()
        began = time.perf_counter()
        apart(STEPS)
        wait()
        times["apart"].append(time.perf_counter() - began)
    return times | {"first": first}


def single_loop(config: dict[str, Any]) -> dict[str, Any]:
    """On a worker: the rate of real training, of the engine alone, and while a checkpoint is written."""
    from workflows.training.worker import set_up

    t = set_up(config)
    train = _stepper(t)
    train(1, poll=t.poll)
    times: dict[str, list[float]] = {"train": [], "bare": [], "plain": [], "checkpoint": [], "copied": []}
    for _ in range(ROUNDS):
        times["train"].append(train(STEPS, poll=t.poll))
        times["bare"].append(train(STEPS, report=lambda metrics: None))
        times["plain"].append(train(MANY, poll=t.poll))
        began = time.perf_counter()
        t.save(t.state)
        copied = time.perf_counter() - began
        times["checkpoint"].append(copied + train(MANY, poll=t.poll))
        times["copied"].append(copied)
        t.checkpoints.settle()
    median = {name: statistics.median(of) for name, of in times.items()}
    return {
        "rate": STEPS * t.job.batch / median["train"],
        "bare": STEPS * t.job.batch / median["bare"],
        "step": median["plain"] / MANY,
        "stall": statistics.median(c - p for c, p in zip(times["checkpoint"], times["plain"], strict=True)),
        "copied": median["copied"],
    }


def _recovery(job: Any, workers: int) -> float:
    """Seconds from a worker's SIGKILL to the first update after it."""
    from workflows.cluster.session import Workers
    from workflows.training.crew import train
    from workflows.training.mailbox import Monitor

    ends = train(job, mailbox=Monitor().actor, workers=Workers(workers, workers), use_gpu=False, loop=dying_loop)
    return float(ends["again"] - ends["killed"])


def dying_loop(config: dict[str, Any]) -> dict[str, float]:
    """The last worker kills itself after the first checkpoint. After the restart, all train one more update."""
    from mmdistill_core.engine import fit
    from workflows.training.worker import set_up

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
