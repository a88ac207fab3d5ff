"""Workers that stay: trainings follow one another on them, nothing of one is left in the next, and lost ones come again."""

import os
import signal
import threading
import time

import pytest
from jobs import job_of, write_data

from workflows.cluster.session import Workers
from workflows.errors import UserError
from workflows.training import crew
from workflows.training.mailbox import CLOSED, Mailbox, Monitor, Order


class Kept:
    """The handle of a mailbox, as an actor's is."""

    def __init__(self):
        self.rows = []
        self.push = self

    def remote(self, topic, row):
        self.rows.append((topic, {name: value for name, value in row.items() if name != "time"}))


def order(number, rank, topic="t", mailbox=None):
    return Order(number, rank, topic, mailbox, [])


def test_an_order_is_for_one_worker_or_for_all_until_it_is_done():
    desk = Mailbox()
    assert desk.order("crew", 0, 0) is None
    desk.post("crew", order(1, None))
    desk.post("other", order(7, None))
    assert [desk.order("crew", rank, 0).number for rank in (0, 1)] == [1, 1]
    assert desk.order("crew", 1, 1) is None, "it has had that one"
    desk.done("crew", 1, 24)
    assert desk.order("crew", 0, 0) is None, "a worker that begins again does not do it again"
    assert desk.answer("crew", 1) == [24]
    desk.withdraw("crew", 1)
    assert desk.answer("crew", 1) == []

    desk.post("crew", order(2, 1))
    desk.post("crew", order(3, 0))
    assert [desk.order("crew", rank, 1).number for rank in (0, 1)] == [3, 2]
    desk.close("crew")
    assert desk.order("crew", 0, 0) == CLOSED
    assert desk.order("other", 0, 0).number == 7


def test_what_happens_to_a_worker_is_told_to_its_training():
    desk, kept = Mailbox(), Kept()
    desk.post("crew", order(1, 0, "a", kept))
    desk.post("crew", order(2, 1, "b", kept))
    desk.post("crew", order(3, 2, "c", kept))
    desk.done("crew", 3, None)
    desk.tell("crew", {"event": "failed", "why": "nan"}, {1: {"event": "failed", "why": "nan"}})
    (first, beside), (second, own) = kept.rows
    assert (first, second) == ("a", "b")
    assert own == {"event": "failed", "why": "nan"}
    assert beside["event"] == "lost"
    assert "beside it" in beside["why"]
    kept.rows.clear()
    desk.tell("crew", {"event": "down"})
    assert [topic for topic, _ in kept.rows] == ["a", "b"]


def train(job, monitor, workers=1, at_once=2, **more):
    return crew.train(job, mailbox=monitor.actor, workers=Workers.of(workers), use_gpu=False, at_once=at_once, **more)


def weights_of(job):
    with open(f"{job.output}/weights.safetensors", "rb") as file:
        return file.read()


@pytest.mark.ray
def test_trainings_follow_one_another_on_the_same_workers(tmp_path, ray_cluster):
    """Of one or of two workers each, and come out the same wherever they stand."""
    write_data(tmp_path)
    monitor = Monitor()

    def trained(name, workers, **fields):
        job = job_of(tmp_path, name=name, output=str(tmp_path / name), images=64, checkpoint_every=64, **fields)
        assert train(job, monitor, workers) == 64
        return weights_of(job)

    a, pair, b = trained("a", 1), trained("pair", 2, seed=1), trained("b", 1, seed=2)
    assert trained("b-first", 1, seed=2) == b != a
    assert trained("pair-again", 2, seed=1) == pair
    assert trained("a-again", 1) == a
    pids = {train(job_of(tmp_path, name=f"pid{n}"), monitor, n, loop=lambda config: os.getpid()) for n in (1, 2, 1)}
    assert len(pids) == 1


@pytest.mark.ray
def test_on_this_machine_alone_ray_train_brings_workers_and_what_leads_them(tmp_path, ray_cluster):
    """What it has for clusters would be a process each, and the workers' variables another start of theirs."""
    from ray._private.state import actors

    def seen(config):
        return os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]

    crew.CREWS.dismiss()
    before = actors()
    assert train(job_of(tmp_path), Monitor(), loop=seen) == "1"
    new = {actor["ActorClassName"] for name, actor in actors().items() if name not in before}
    assert new == {"Mailbox", "LocalTrainController", "RayTrainWorker", "SynchronizationActor"}


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_worker_takes_nothing_from_the_training_beside_it(tmp_path, ray_cluster):
    """Two trainings, each on a worker of its own; one of these is killed, once, after its training's first checkpoint."""
    from workflows.training.worker import train_worker

    write_data(tmp_path)
    monitor, events = Monitor(), []

    def dying(config):
        from workflows.storage.uri import join
        from workflows.training.checkpoints import Checkpoints

        job = config["job"]
        kept = Checkpoints(join(job["storage"], job["name"]))

        def watch():
            while kept.images() < 0:
                pass
            os.kill(os.getpid(), signal.SIGKILL)

        if kept.images() < 0:
            threading.Thread(target=watch, daemon=True).start()
        return train_worker(config)

    jobs = {
        name: job_of(tmp_path, name=name, output=str(tmp_path / name), seed=seed, images=8000, checkpoint_every=800,
                     log_every=800)
        for seed, name in enumerate(("dies", "stays"))
    }  # fmt: skip
    uninterrupted = {}
    for name, job in jobs.items():
        plain = job_of(tmp_path, **{**vars(job), "name": f"{name}-plain", "output": str(tmp_path / f"{name}-plain")})
        train(plain, monitor)
        uninterrupted[name] = weights_of(plain)
    monitor.drain()
    threads = [
        threading.Thread(target=train, args=(job, monitor), kwargs={"loop": dying if name == "dies" else train_worker})
        for name, job in jobs.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    events = [(topic, row) for topic, row in monitor.drain()[0] if "event" in row]
    assert {name: weights_of(job) for name, job in jobs.items()} == uninterrupted
    begun = [row["n_images"] for topic, row in events if topic == "dies" and row["event"] == "begun"]
    assert len(begun) == 2
    assert begun[1] >= 800
    assert [row["event"] for topic, row in events if topic == "dies" and row["event"] in ("lost", "failed")] == ["lost"]


@pytest.mark.ray
@pytest.mark.slow
def test_on_a_cluster_workers_hold_their_cpus_and_give_them_back(tmp_path, ray_cluster, monkeypatch):
    """At the end of a stage, and when an error ends them."""
    import ray

    monkeypatch.setattr(crew, "own_ray", lambda: False)
    monkeypatch.setattr(crew, "FAILURES", 0)

    def free(config):
        return ray.available_resources().get("CPU", 0)

    def broken(config):
        raise ValueError("the moon is in the wrong quarter")

    def given_back():
        """Ray's books follow what its nodes report, some seconds later."""
        end = time.monotonic() + 30
        while ray.available_resources()["CPU"] < 2 and time.monotonic() < end:
            time.sleep(0.1)
        return ray.available_resources()["CPU"] == 2

    job, monitor = job_of(tmp_path), Monitor()
    assert train(job, monitor, loop=free) == 1
    crew.CREWS.rest()
    assert given_back()
    assert not list((tmp_path / "ray").glob("crew-*")), "Ray Train's own notes are gone with it"
    with pytest.raises(UserError, match="rows: training failed: the moon is in the wrong quarter"):
        train(job, monitor, loop=broken)
    assert given_back()
