"""ASHA for a sweep: stops a trial whose measured distance lags behind others at the same k."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

GRACE, REDUCTION = 25, 2
"""Every trial gets GRACE per cent of its images. There, at twice and at four times that, the better half goes on."""


class Asha(FIFOScheduler):
    """Ray's ASHA, one for each k: students of 8 steps are nearer to the data than those of 1, whatever the settings."""

    def __init__(self, stopped: Callable[[str], None]) -> None:
        """`stopped` is called with the name of a trial that is stopped for its distance."""
        super().__init__()
        self._stopped, self._of_k = stopped, dict[int, Any]()

    def _of(self, k: int) -> Any:
        if k not in self._of_k:
            self._of_k[k] = ASHAScheduler(
                time_attr="done_share", metric="score", mode="min", max_t=100, grace_period=GRACE,
                reduction_factor=REDUCTION,
            )  # fmt: skip
        return self._of_k[k]

    def remember(self, k: int, name: str, curve: list[tuple[float, float]]) -> None:
        """Takes the (done_share, score) pairs of a trial that ended in an earlier run of the sweep. Others are compared with it."""
        trial, of_k = SimpleNamespace(trial_id=name), self._of(k)
        of_k.on_trial_add(None, trial)
        for share, score in curve:
            if share < 100:
                of_k.on_trial_result(None, trial, {"done_share": share, "score": score})

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial.config["k"]).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(self._of(trial.config["k"]).on_trial_result(tune_controller, trial, result))
        if decision == self.STOP and result["done_share"] < 100:
            self._stopped(trial.config["name"])
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial.config["k"]).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial.config["k"]).on_trial_remove(tune_controller, trial)

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune saves this state, but a sweep never restores it."""
        return {}
