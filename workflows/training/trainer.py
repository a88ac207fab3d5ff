"""Turns Ray Train's reports about workers into events. Import this file late, since Ray Train takes a second to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray.train

from workflows.training.events import FAILURE, LOST, event
from workflows.training.worker import BROKEN, root_cause


class LostWorkers(ray.train.UserCallback):
    """Reports a lost worker as soon as Ray Train notices it. If only errors of its peers show, it reports one of those."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self.tell = tell

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        events = {rank: _event_of(error) for rank, error in worker_exceptions.items()}
        gone = [row for rank, row in events.items() if hasattr(worker_exceptions[rank], "health_check_failure")]
        self.tell((gone or list(events.values()))[0], events)


def _event_of(error: Exception) -> dict[str, Any]:
    """An error of a worker as an event."""
    why = root_cause(error)
    lost = hasattr(error, "health_check_failure") or BROKEN.search(why)
    return event(LOST if lost else FAILURE, why=why)
