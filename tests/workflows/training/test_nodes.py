"""A cluster that loses and gains nodes: the run continues on those that remain, and nothing is lost.

Training does not depend on the number of workers, so its curves are compared with those of a run with one worker.
"""

import os
import signal
import time

import pytest
from clusters import LocalCluster, temporary_folder
from faults import Faults
from heads import Shown
from interruptions import (
    IMAGES,
    LONG,
    Training,
    assert_alike,
    events,
    newest_checkpoint,
    outcome,
    processes_of,
    teacher_folder,
    wait_for,
    wait_for_event,
)
from stores import KEYS, bucket

from workflows.session.metrics import read_metrics
from workflows.training.events import interruptions

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
ENDLESS = 100_000_000
WAITS = r"teacher: its workers \(3\) have not begun for 30 s"


@pytest.fixture(scope="module")
def cluster():
    with temporary_folder() as folder:
        cluster = LocalCluster(folder, cpus=0, **KEYS)
        try:
            cluster.add(cpus=2)
            yield cluster
        finally:
            cluster.stop()


def command(cluster, workspace, *more, images=IMAGES, **environment):
    settings = [*LONG, f"teacher.images={images}"]
    return Training(workspace, *more, settings=settings, **cluster.environment, **environment)


@pytest.fixture(scope="module")
def alone(cluster, tmp_path_factory):
    """The outcome of a run with one worker."""
    workspace = tmp_path_factory.mktemp("alone")
    command(cluster, workspace, "--workers", "1").finish()
    return outcome(workspace)


def test_a_stopped_training_ends_with_a_checkpoint_and_goes_on_with_more_workers(cluster, alone, tmp_path):
    first = command(cluster, tmp_path, "--workers", "1", "--checkpoint-every", "1000000")
    code, shown = first.interrupt_at(30_000, lambda process: process.send_signal(signal.SIGTERM), of=IMAGES)
    assert code == 143, shown
    assert "stopping: each training writes a checkpoint first" in shown
    assert "Traceback" not in shown
    stopped = newest_checkpoint(tmp_path)
    assert stopped >= 30_000
    shown = command(cluster, tmp_path, "--workers", "2").finish()
    assert "continues from" in shown
    assert_alike(tmp_path, alone, images=IMAGES)


def test_a_node_is_lost(cluster, alone, tmp_path):
    """The run finishes on what remains."""
    spot = cluster.add(cpus=1, noticed=True)
    try:
        run = command(cluster, tmp_path, "--workers", "1:3")
        process = run.start()
        wait_for(tmp_path, 20_000, of=IMAGES)
        kept = newest_checkpoint(tmp_path)
    finally:
        cluster.kill(spot)
    _, shown = process.communicate(timeout=900)
    assert process.returncode == 0, shown
    assert_alike(tmp_path, alone, images=IMAGES)

    begun = [row for row in events(tmp_path) if row["event"] == "begun"]
    assert [(row["workers"], row.get("cause")) for row in begun] == [(3, None), (2, "lost")]
    assert begun[1]["n_images"] >= kept
    assert [row["event"] for row in events(tmp_path) if row["event"] in ("lost", "failed")] == ["lost"]
    sums = interruptions(events(tmp_path))
    assert 0 <= sums["most_again"] <= sums["between_checkpoints"] + 5120
    assert "with 2 workers (workers were lost" in shown
    assert "interrupted 1 time" in shown
    assert f"{sums['again']:,} images trained again" in shown


def test_a_node_joins(cluster, tmp_path):
    """In a training too long to end first: it continues with one more worker."""
    run = command(cluster, tmp_path, "--workers", "1:3", images=ENDLESS, MMDISTILL_RESIZED_EVERY="5")
    process = run.start()
    wait_for(tmp_path, 20_000, of=ENDLESS)
    assert [row["workers"] for row in events(tmp_path) if row["event"] == "begun"] == [2]
    kept = newest_checkpoint(tmp_path)
    spot = cluster.add(cpus=1)
    try:
        wait_for_event(tmp_path, lambda row: row["event"] == "begun" and row["workers"] == 3, process)
        begun = [row for row in events(tmp_path) if row["event"] == "begun"][-1]
        assert begun["cause"] == "resized"
        assert begun["n_images"] >= kept
        wait_for(tmp_path, begun["n_images"] + 10_000, of=ENDLESS)
        process.send_signal(signal.SIGTERM)
        _, shown = process.communicate(timeout=300)
        assert process.returncode == 143, shown
        steps = [step for step, _ in read_metrics(teacher_folder(tmp_path))]
        assert steps == list(range(2560, steps[-1] + 1, 2560)), "a step is missing or doubled"
    finally:
        cluster.kill(spot)


def test_a_node_is_preempted_with_notice(cluster, tmp_path):
    """By SIGTERM, as a notice of preemption: a checkpoint is written before the node goes, though none was due."""
    spot = cluster.add(cpus=1, noticed=True)
    run = command(cluster, tmp_path, "--workers", "1:3", "--checkpoint-every", f"{ENDLESS}", images=ENDLESS)
    try:
        process = run.start()
        wait_for(tmp_path, 20_000, of=ENDLESS)
        assert not [row for row in events(tmp_path) if row["event"] == "checkpoint"]
        cluster.nodes[spot].send_signal(signal.SIGTERM)
        wait_for_event(tmp_path, lambda row: row["event"] == "checkpoint", process)
        wait_for_event(tmp_path, lambda row: "cause" in row, process)
    finally:
        cluster.kill(spot)
    saved, *_, begun = [row for row in events(tmp_path) if row["event"] in ("checkpoint", "begun")][1:]
    assert saved["event"] == "checkpoint"
    assert begun["workers"] == 2
    assert begun["n_images"] >= saved["n_images"] >= 20_000
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=300)
    assert process.returncode == 143, shown


def test_without_room_it_says_so_goes_on_with_room_and_can_be_stopped(cluster, tmp_path):
    """It needs exactly three workers. A node is announced to go, another comes, and is lost without notice."""
    spots = [cluster.add(cpus=1)]
    try:
        process = command(cluster, tmp_path, "--workers", "3", images=ENDLESS).start()
        wait_for(tmp_path, 20_000, of=ENDLESS)
        shown = Shown(process)
        cluster.nodes[spots[0]].send_signal(signal.SIGTERM)
        shown.until(WAITS, 300)
        cluster.kill(spots[0])
        kept = newest_checkpoint(tmp_path)
        spots.append(cluster.add(cpus=1))
        wait_for(tmp_path, kept + 15_000, of=ENDLESS)
        cluster.kill(spots[1])
        shown.until(f"{WAITS}(.|\n)*{WAITS}", 300)
        process.send_signal(signal.SIGTERM)
        assert shown.wait(120) == 143, shown.err
    finally:
        for spot in spots:
            cluster.kill(spot)
    assert "Traceback" not in shown.err
    assert newest_checkpoint(tmp_path) > kept


def test_a_worker_is_killed_while_a_checkpoint_is_written(cluster, alone, tmp_path):
    run = command(cluster, tmp_path, "--workers", "2", "--checkpoint-every", "2560")
    process = run.start()
    wait_for(tmp_path, 20_000, of=IMAGES)
    workers = processes_of(cluster.head.pid, b"RayTrainWorker")
    assert len(workers) == 2
    end = time.monotonic() + 60
    while not list((tmp_path / "ray").glob("teacher-*/.checkpoint-*.partial")):
        assert time.monotonic() < end, "no checkpoint was seen half written"
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    _, shown = process.communicate(timeout=900)
    assert process.returncode == 0, shown
    assert "continues from" in shown
    assert_alike(tmp_path, alone, images=IMAGES)


def test_the_store_is_away_while_a_checkpoint_is_due(cluster, alone, tmp_path, moto_server):
    """For half a minute. The run still finishes, with the curve of an uninterrupted one."""
    place = bucket(moto_server, "nodes")
    with Faults(moto_server) as faults:
        store = {"AWS_ENDPOINT_URL": faults.url, "MMDISTILL_CACHE": str(tmp_path / "cache")}
        run = command(cluster, f"{place}/run", "--workers", "2", **store)
        process = run.start()
        end = time.monotonic() + 120
        while not (copies := list((tmp_path / "cache" / "workspaces").glob("*/stages/teacher-*"))):
            assert time.monotonic() < end
            time.sleep(0.2)
        copy = copies[0].parents[1]
        wait_for(copy, 15_000, of=IMAGES)
        faults.shares["refused"] = 1.0
        time.sleep(30)
        faults.shares["refused"] = 0.0
        _, shown = process.communicate(timeout=900)
        assert process.returncode == 0, shown
        assert faults.counts["refused"] > 3
    assert_alike(copy, alone, images=IMAGES)
