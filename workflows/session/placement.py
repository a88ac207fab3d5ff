"""How many workers a training gets, and how many trainings run at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workflows.cluster.session import Workers, task_options
from workflows.config.schema import RunConfig
from workflows.rendering.screen import Screen
from workflows.session.options import RunOptions, workers_of


def place(
    config: RunConfig, options: RunOptions, resources: dict[str, float], there: dict[str, float] | None = None
) -> Placement:
    """How many workers each training gets, and how many trainings run at once. `resources` is what the cluster has or may have,
    `there` what it has now. By default the teacher takes all of `there`, and students share it with one worker each: small networks
    gain more from parallel trainings than from more workers. Only --workers makes a cluster grow. Raises ConfigError.
    """
    now = resources if there is None else there
    use_gpu = resources.get("GPU", 0) >= 1 if options.gpu is None else options.gpu
    asked = workers_of(options)
    slots = slots_of(now if asked is None else resources, use_gpu)
    teacher = min(slots, config.teacher.batch)
    student = asked or Workers(1, 1)
    return Placement(
        teacher_workers=asked or Workers(teacher, teacher),
        student_workers=student,
        at_once=options.at_once or max(1, slots // student.most),
        use_gpu=use_gpu,
    )


def slots_of(resources: dict[str, float], use_gpu: bool) -> int:
    """How many workers there is room for, at least one."""
    return max(1, int(resources.get("GPU" if use_gpu else "CPU", 0)))


def say_room(options: RunOptions, placement: Placement, resources: dict[str, float], screen: Screen) -> None:
    """Tells the user if the cluster may grow beyond what is used by default."""
    most, used = slots_of(resources, placement.use_gpu), placement.teacher_workers.most
    if options.workers is None and most > placement.at_once:
        kind = "GPUs" if placement.use_gpu else "CPUs"
        screen.line(
            f"  [dim]workers: {used}, for the {kind} that are there now; the cluster may have {most}: --workers {used}:{most}[/]"
        )


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
