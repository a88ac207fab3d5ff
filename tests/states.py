"""States for tests, with given networks for any roles, and moment matching with the paper's settings."""

from __future__ import annotations

from typing import Any

from mmdistill_core.engine import TrainState
from mmdistill_core.methods.base import Given, New, Prepared, Progress
from mmdistill_core.methods.moment_matching import MomentMatching

START = Progress(step=0, n_images=0, total=1)


def at_step(step: int) -> Progress:
    return Progress(step=step, n_images=0, total=10**9)


def create_state(*, method: Any, given: Any, **options: Any) -> TrainState:
    """`given` holds networks of any roles. The other roles start from their origin."""
    origins = {role.name: role.origin for role in method.roles}
    kinds: dict[str, dict[str, Any]] = {"given": {}, "starts": {}, "prepared": {}}
    for name, network in given.items():
        origin = origins[name]
        kind = "given" if isinstance(origin, (Given, New)) else "prepared" if isinstance(origin, Prepared) else "starts"
        kinds[kind][name] = network
    return TrainState.create(
        method=method, given=kinds["given"], starts=kinds["starts"], prepare=lambda _: kinds["prepared"], **options
    )


def matching(**options: Any) -> MomentMatching:
    """The paper's settings: no average of the student, and its distribution of t - s."""
    return MomentMatching(**{"delta_power": 1.0, "ema": False} | options)
