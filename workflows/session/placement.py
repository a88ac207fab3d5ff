"""How many workers a training gets, and how many trainings run at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workflows.cluster.session import Workers, task_options
from workflows.config.schema import RunConfig
from workflows.rendering.screen import Screen
from workflows.session.options import RunOptions, workers_of


@dataclass(frozen=True)
class Placement:
    """Workers of each training, and how many students are trained at once."""

    teacher_workers: Workers
    student_workers: Workers
    at_once: int
    use_gpu: bool

    @property
    def device(self) -> str:
        """Where a stage's tasks other than trainings compute, for `device_of_task`. `task` holds their Ray options."""
        return "cuda" if self.use_gpu else "cpu"

    @property
    def task(self) -> dict[str, Any]:
        return task_options(use_gpu=self.use_gpu)


def place(
    config: RunConfig, options: RunOptions, resources: dict[str, float], there: dict[str, float] | None = None
) -> Placement:
    """The placement on a cluster that has `there` now and may grow to `resources`. By default the cluster does not grow.

    The teacher takes all of `there`, and students share it with one worker each: small networks gain more from parallel trainings
    than from more workers. Only --workers makes a cluster grow. Raises ConfigError.
    """
    use_gpu = resources.get("GPU", 0) >= 1 if options.gpu is None else options.gpu
    requested = workers_of(options)
    slots = slots_of(there if there is not None and requested is None else resources, use_gpu)
    teacher = min(slots, config.teacher.batch)
    student = requested or Workers(1, 1)
    return Placement(
        teacher_workers=requested or Workers(teacher, teacher),
        student_workers=student,
        at_once=options.at_once or max(1, slots // student.most),
        use_gpu=use_gpu,
    )


def slots_of(resources: dict[str, float], use_gpu: bool) -> int:
    """How many workers there is room for, at least one."""
    return max(1, int(resources.get("GPU" if use_gpu else "CPU", 0)))


def suggest_workers(options: RunOptions, placement: Placement, resources: dict[str, float], screen: Screen) -> None:
    """Tells the user if the cluster may grow beyond what is used by default."""
    most, used = slots_of(resources, placement.use_gpu), placement.teacher_workers.most
    if options.workers is None and most > placement.at_once:
        kind = "GPUs" if placement.use_gpu else "CPUs"
        screen.line(
            f"  [dim]workers: {used}, for the {kind} that are there now; the cluster may have {most}: --workers {used}:{most}[/]"
        )
