"""Ray Train on a Ray of this machine alone, without what serves clusters. Each part left out saves a process and its imports of
Ray, and Ray Train has no option for any of them. This file is imported only where a run begins, as Ray Train takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

CONTROLLERS = ("TrainController", "LocalTrainController")
"""Class names of the actors that lead the workers."""


class Trainer(TorchTrainer):
    """Without Ray Data, which no training here is fed by."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [c for c in callbacks if not isinstance(c, DatasetsCallback)]


class LocalTrainer(Trainer):
    """On a Ray of this machine alone, started by this process: its processes have the environment of this one, so that none needs
    to be started again to be told it, and no autoscaler is to be asked for machines.
    """

    def _create_default_callbacks(self) -> list[Any]:
        """Without Ray's cleaner of placement groups, which asks the dashboard's API for all it does."""
        return [c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if isinstance(policy := parts["scaling_policy"], FixedScalingPolicy):
            parts["scaling_policy"] = LocalScaling(policy.scaling_config)
        controller: Any = ray.remote(num_cpus=0)(LocalTrainController).remote(**parts)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


class LocalScaling(FixedScalingPolicy):
    """As many workers as were asked for, from what is there."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class LocalWorkerGroup(WorkerGroup):
    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return custom_runtime_env


class LocalTrainController(TrainController):
    worker_group_cls = LocalWorkerGroup


class WorkersGone(WorkerGroupCallback):
    """Calls when there are no workers any more: a group that ends as its node is to go meets with no exception, so that no public
    callback hears of it.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self.call()
