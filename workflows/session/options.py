"""The options of a command: how to run, as opposed to what to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workflows.cluster.session import Workers
from workflows.errors import ConfigError, seconds_of
from workflows.training.job import Every

WAIT, A_WHILE = 120.0, 10.0
"""Seconds that a run waits at its end for a tracking store that does not answer: by default, and at most if the run failed."""


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what to run. None of it is part of a stage's key."""

    workspace: str | Path
    tracking_uri: str | None = None
    workers: str | int | None = None
    checkpoint_every: str | None = None
    at_once: int | None = None
    gpu: bool | None = None
    force: tuple[str, ...] = ()
    until: str = "report"
    tracking_wait: float | None = None


def wait_of(options: RunOptions) -> float:
    """Seconds to wait for the tracking store: the option, MMDISTILL_TRACKING_WAIT, or 120."""
    if options.tracking_wait is not None:
        return options.tracking_wait
    return seconds_of("MMDISTILL_TRACKING_WAIT", WAIT)


def workers_of(options: RunOptions) -> Workers | None:
    """What --workers asks for, or None. Raises ConfigError."""
    try:
        return None if options.workers is None else Workers.of(options.workers)
    except ValueError:
        raise ConfigError(f"--workers: {options.workers!r} should be a number, or fewest:most such as 2:8") from None


def every_of(options: RunOptions) -> Every:
    """What --checkpoint-every asks for, or an empty `Every`. Raises ConfigError."""
    try:
        return Every() if options.checkpoint_every is None else Every.of(options.checkpoint_every)
    except ValueError:
        raise ConfigError(
            f"--checkpoint-every: {options.checkpoint_every!r} should be images, such as 64000, or minutes, such as 10m"
        ) from None
