"""By default workers use what the cluster has now. Only --workers makes it grow."""

import io

import pytest
from rich.console import Console

from workflows.cluster.session import Workers
from workflows.config.loading import load_config
from workflows.rendering.screen import Screen
from workflows.session.options import RunOptions
from workflows.session.placement import place, suggest_workers


def placed(resources, there=None, recipe="digits", **options):
    return place(load_config(recipe), RunOptions("nowhere", **options), resources, there)


@pytest.mark.parametrize("cpus", [1, 2, 3, 16])
def test_the_teacher_takes_the_machine_whatever_its_batch_is_divided_by(cpus):
    found = placed({"CPU": cpus})
    assert (found.teacher_workers, found.student_workers) == (Workers(cpus, cpus), Workers(1, 1))
    assert (found.at_once, found.use_gpu) == (cpus, False)


@pytest.mark.parametrize(("there", "used"), [({"CPU": 8, "GPU": 2}, 2), ({"CPU": 4}, 1)])
def test_nodes_that_may_come_are_not_asked_for(there, used):
    room = {"CPU": 512, "GPU": 64}
    found = placed(room, there)
    assert (found.teacher_workers, found.at_once, found.use_gpu) == (Workers(used, used), used, True)
    shown = io.StringIO()
    screen = Screen(Console(file=shown, width=200))
    suggest_workers(RunOptions("nowhere"), found, room, screen)
    assert (
        f"workers: {used}, for the GPUs that are there now; the cluster may have 64: --workers {used}:64"
        in shown.getvalue()
    )
    suggest_workers(RunOptions("nowhere", workers="2:8"), placed(room, there, workers="2:8"), room, screen)
    assert shown.getvalue().count("\n") == 1


def test_those_that_are_asked_for_may_come():
    found = placed({"CPU": 512, "GPU": 64}, {"CPU": 4}, workers="2:8")
    assert (found.teacher_workers, found.student_workers, found.at_once) == (Workers(2, 8), Workers(2, 8), 8)


def test_there_are_no_more_workers_than_images():
    config = load_config("digits", ["teacher.batch=4"])
    assert place(config, RunOptions("nowhere"), {"CPU": 64}).teacher_workers == Workers(4, 4)
