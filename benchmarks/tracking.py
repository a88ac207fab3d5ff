"""bench tracking: what logging costs a training's driver, with a row after every update, far more than recipes log."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workflows.config.schema import RunConfig

VALUES, ROWS = 30, 10
"""Values in a row, as in a distillation, and rows logged in a round."""


def bench_tracking(config: RunConfig, repeats: int, uris: dict[str, str] | None = None) -> dict[str, Any]:
    """For each store (name -> address; by default SQLite): the driver's time in log calls over the time of an update, through the
    outbox and, for comparison, straight to the store. Updates and the delivery thread run in one process here, so `update` includes
    what the thread takes from it. In a run the updates are in other processes.
    """
    import torch

    from benchmarks.engine import STEPS, K, batches_of, engine_of, interleaved, job_of, joint
    from workflows.tracking.tracker import Tracker
    from workflows.training.job import build_state

    torch.set_num_threads(1)
    batches = batches_of(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        updates = engine_of(build_state(job_of(joint(config), folder, k=K)), batches)
        stores = uris or {"sqlite": f"sqlite:///{folder / 'mlflow.db'}"}
        trackers: list[Tracker] = []
        systems: dict[str, Callable[[], None]] = {"no log": updates}
        spent: dict[str, list[float]] = {}
        for name, uri in stores.items():
            for way, outbox in (("outbox", folder / "outbox"), ("straight", None)):
                trackers.append(Tracker(uri, artifacts=folder / "artifacts", outbox=outbox))
                key = f"{name}, {way}"
                spent[key] = []
                systems[key] = _logging(updates, trackers[-1], spent[key])
        try:
            times = interleaved(systems, rounds=repeats)
        finally:
            for tracker in trackers:
                tracker.settle(60)
                tracker.close()
    update = times["no log"]["median"] / STEPS
    return {
        "seconds_per_update": {name: t["median"] / STEPS for name, t in times.items()},
        "seconds_per_log": {name: _spread(values) for name, values in spent.items()},
        "share_of_logging": {name: statistics.mean(values) / update for name, values in spent.items()},
        "target": 0.005,
        "rounds": times,
    }


def _logging(updates: Callable[[], None], tracker: Any, spent: list[float]) -> Callable[[], None]:
    """Runs the updates and then logs ROWS rows. The time of each log call goes to `spent`."""
    run_id = tracker.start_run("bench")
    row = {f"loss/level{i}": 1 / (3 + i) for i in range(VALUES)}

    def run() -> None:
        updates()
        for _ in range(ROWS):
            began = time.perf_counter()
            tracker.log_metrics(run_id, [(len(spent), row)])
            spent.append(time.perf_counter() - began)

    return run


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"mean": statistics.mean(values), "median": ordered[len(ordered) // 2], "max": ordered[-1]}
