"""Ray Train for a Ray of this machine alone, without the parts that serve clusters. Each part left out saves a process and its
imports of Ray, and Ray Train has no option to turn it off. Import this file late, since Ray Train takes a second to import.
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
    """TorchTrainer without Ray Data, which no training here uses."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [c for c in callbacks if not isinstance(c, DatasetsCallback)]


class LocalTrainer(Trainer):
    """A trainer on a Ray that this process started on this machine. Its processes inherit this environment, so none is restarted to
    set it. There is no autoscaler to ask for machines.
    """

    def _create_default_callbacks(self) -> list[Any]:
        """Leaves out Ray's cleaner of placement groups, which needs the dashboard."""
        return [c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if isinstance(policy := parts["scaling_policy"], FixedScalingPolicy):
            parts["scaling_policy"] = LocalScaling(policy.scaling_config)
        controller: Any = ray.remote(num_cpus=0)(LocalTrainController).remote(**parts)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


class LocalScaling(FixedScalingPolicy):
    """The requested number of workers, on the resources that exist."""

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
    """Calls `call` when a group of workers ends. No public callback covers this: a group that ends because its node will leave
    raises no exception.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self.call()
