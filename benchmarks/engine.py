"""bench engine: what a pair of updates costs, compared with its bare forwards and backwards.

All ratios are of medians over rounds. Within a round the systems take turns, so that a drift in the machine's speed affects all.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workflows.config.assembly import network_of, rounds_of, schedule_of
from workflows.config.schema import RunConfig
from workflows.dataset.sources import Source, source_of
from workflows.errors import UserError
from workflows.plan.count import round_flops
from workflows.training.job import Job

STEPS, K = 10, 8
"""Pairs of updates timed together in a round, and the student's number of steps."""


def interleaved(systems: dict[str, Callable[[], None]], *, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each system: median, least and most over the rounds, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, call in systems.items():
            began = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: spread(values) for name, values in seconds.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(times: dict[str, dict[str, float]], over: str, under: str) -> float:
    return times[over]["median"] / times[under]["median"]


def job_of(config: RunConfig, folder: Path, k: int) -> Job:
    """The recipe's distillation, from an untrained teacher in `folder`: costs do not depend on the weights."""
    from dataclasses import asdict

    from mmdistill_core.artifact import DiffusionModel, save_model
    from workflows.stages.distill import arguments_of, optimiser_options
    from workflows.training.job import Job

    source, own = source_of(config.data), config.distill.for_k(k)
    network = network_of(config.network, shape=source.shape, num_classes=source.num_classes)
    schedule = schedule_of(config)
    save_model(
        folder / "teacher",
        DiffusionModel(network.denoiser(schedule=schedule, prediction=config.prediction), k=256),
    )
    (one,) = rounds_of(own, schedule)
    return Job(
        name="bench",
        output=str(folder / "student"),
        storage=str(folder / "ray"),
        data=str(folder / "data"),
        seed=0,
        method=own.method,
        arguments=arguments_of(one.method),
        given={"teacher": str(folder / "teacher")},
        network={"kind": network.kind} | asdict(network),
        schedule=config.schedule.as_dict(),
        prediction=config.prediction,
        options=optimiser_options(own, one.method),
        images=10**12,
        batch=own.batch,
        log_every=own.log_every,
        checkpoint_every=own.checkpoint_every,
        ks=(k,),
    )


def write_data(config: RunConfig, folder: Path) -> None:
    """The data of `job_of`: the recipe's own images, as a data set."""
    from workflows.dataset.shards import write_shards

    source = source_of(config.data)
    images, labels = loaded(source)
    write_shards(folder / "data", source="bench", images=images, labels=labels, num_classes=source.num_classes,
                 holdout=0.2, rows=512)  # fmt: skip


def floor_of(state: Any, batches: Any) -> Callable[[], None]:
    """Runs STEPS bare pairs of updates: the same three forwards and two backward passes, without noise, transition, optimiser,
    clipping or logs.
    """
    import torch

    batch = batches(0)
    t = torch.rand(len(batch), device=batch.x.device)
    student, teacher, auxiliary = (state.networks[name] for name in ("student", "teacher", "auxiliary"))

    def run() -> None:
        for _ in range(STEPS):
            x_tilde = student(batch.x, t, batch.label)
            with torch.no_grad():
                teacher(batch.x, t, batch.label)
            (x_tilde.mean() + auxiliary(batch.x, t, batch.label).mean()).backward()

    return run


def engine_of(state: Any, batches: Any) -> Callable[[], None]:
    """Runs STEPS pairs of updates as in training, the log window included."""
    from mmdistill_core.engine.fit import LogWindow
    from mmdistill_core.engine.step import train_step

    def run() -> None:
        window = LogWindow()
        for _ in range(STEPS):
            for log in train_step(state=state, batches=batches, seed=0):
                window.add(log)
        window.flush(state.averaged_over_workers)

    return run


def optimisers_of(state: Any) -> Callable[[], None]:
    """Runs STEPS times clipping and the optimiser step of both networks, on the gradients that are there."""
    from torch import nn

    def run() -> None:
        for _ in range(STEPS):
            for role, optimiser in state.optimisers.items():
                nn.utils.clip_grad_norm_(state.networks[role].parameters(), 1.0)
                optimiser.step()

    return run


def bench_engine(config: RunConfig, repeats: int) -> dict[str, Any]:
    import torch

    from workflows.training.job import build_state

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        state = build_state(job_of(joint(config), Path(scratch), k=K))
    batches = batches_of(config)
    systems = {
        "floor": floor_of(state, batches),
        "engine": engine_of(state, batches),
        "optimisers": optimisers_of(state),
    }
    times = interleaved(systems, rounds=repeats)
    forward, pair = round_flops(config, K)
    return {
        "seconds_per_pair": {name: t["median"] / STEPS for name, t in times.items()},
        "flops_per_forward": forward,
        "flops_per_pair": pair,
        "engine_over_floor": ratio(times, "engine", "floor"),
        "engine_over_floor_and_optimisers": times["engine"]["median"]
        / (times["floor"]["median"] + times["optimisers"]["median"]),
        "target": 1.05,
        "rounds": times,
    }


def joint(config: RunConfig) -> RunConfig:
    """The recipe with the kind of update whose floor is measured."""
    return config.model_copy(update={"distill": config.distill.model_copy(update={"update": "joint"})})


def loaded(source: Source) -> tuple[Any, Any]:
    """Images [n, c, h, w] in [0, 1] and labels [n] of a recipe's own source. Raises UserError for a data set."""
    if source.load is None:
        raise UserError("bench: takes the images of a recipe's own source, such as digits, and no folder or data set")
    return source.load()


def batches_of(config: RunConfig) -> Any:
    """The batches on which a student of K steps is trained."""
    import torch

    from mmdistill_core.engine import InMemoryBatches

    images, labels = loaded(source_of(config.data))
    return InMemoryBatches(
        x=torch.from_numpy(images).float() * 2 - 1,
        label=torch.from_numpy(labels),
        global_batch=config.distill.for_k(K).batch,
        seed=0,
    )
