"""Trainings at once: what becomes of the others when an error ends the run."""

import os
import signal
import threading
import time

import pytest

from workflows.cluster.session import fits_a_machine, run_together
from workflows.errors import UserError


def test_those_that_wait_for_their_turn_do_not_begin_after_an_error():
    begun, release = [], threading.Event()

    def job(i):
        begun.append(i)
        release.wait(30)

    def tick():
        if begun:
            raise UserError("the workspace was taken over")

    with pytest.raises(UserError, match="taken over"):
        run_together([lambda i=i: job(i) for i in range(2)], at_once=1, tick=tick, done=lambda i: None)
    release.set()
    time.sleep(0.5)
    assert len(begun) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_the_others_are_ended_before_the_run(runner, monkeypatch, ray_cluster):
    """Ray must not be shut down below them; and on a cluster that goes on they would hold their workers' CPUs, or take them as soon
    as there is room.
    """
    import ray
    from ray._private.state import actors

    from workflows.private.ray_train import CONTROLLERS
    from workflows.session.context import Context
    from workflows.training import crew

    class Holder:
        def there(self):
            return True

    def an_error(controllers):
        raise UserError("an error of the run")

    def a_kill(controllers):
        os.kill(controllers[0]["Pid"], signal.SIGKILL)

    def ticking(interrupt):
        begun = [time.monotonic()]

        def tick(self):
            ticks(self)
            if not controllers():
                begun[0] = time.monotonic()
            elif time.monotonic() > begun[0] + 6:
                interrupt(controllers())

        return tick

    def controllers():
        return [a for a in actors().values() if a["ActorClassName"] in CONTROLLERS and a["State"] == "ALIVE"]

    runner(until="teacher")
    before, ticks = threading.active_count(), Context.tick
    for own, room, interrupt, said in (
        (True, True, an_error, "an error of the run"),
        (False, True, an_error, "an error of the run"),
        (False, True, a_kill, "the process that leads its workers died"),
        (False, False, an_error, "an error of the run"),
    ):
        wait_for_cpus(2)
        # As on a cluster: a crew for each training at once, which holds its CPU.
        monkeypatch.setattr(crew, "own_ray", lambda own=own: own)
        monkeypatch.setattr(Context, "tick", ticking(interrupt))
        taken = None if room else ray.remote(num_cpus=2)(Holder).remote()
        assert room or ray.get(taken.there.remote())
        with pytest.raises(UserError, match=said):
            runner("distill.images=6400000", until="distill")
        assert not controllers()
        assert threading.active_count() <= before + 1
        if taken:
            ray.kill(taken)
    wait_for_cpus(2)


def wait_for_cpus(n):
    import ray

    end = time.monotonic() + 60
    while ray.available_resources().get("CPU") != n:
        assert time.monotonic() < end, "workers, or room for them, are still held"
        time.sleep(0.1)


class Cluster:
    """Of machines with these resources, as Ray tells of them."""

    def __init__(self, monkeypatch, *machines):
        import ray

        total = {name: sum(machine.get(name, 0.0) for machine in machines) for name in ("CPU", "GPU")}
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": machine} for machine in machines])
        monkeypatch.setattr(ray, "cluster_resources", lambda: total)
        self.total = total


@pytest.mark.parametrize(
    ("cpus", "gpus", "fits"), [(64, 0, True), (65, 0, False), (8, 1, True), (16, 1, False), (1, 2, False)]
)
def test_a_trial_is_of_one_machine(monkeypatch, cpus, gpus, fits):
    cluster = Cluster(monkeypatch, {"CPU": 64.0}, {"CPU": 8.0, "GPU": 1.0})
    assert fits_a_machine({"CPU": cpus, "GPU": gpus}, cluster.total) == fits
    assert fits_a_machine({"CPU": cpus, "GPU": gpus}, {"CPU": 200.0, "GPU": 8.0}), (
        "a machine that may yet come may have it"
    )
