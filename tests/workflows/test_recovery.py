"""Killed for real: a worker, the driver by Ctrl-C and by SIGKILL, a checkpoint on disk, the disk's space, the tracking server.
Each time the run ends with the very weights and metrics of an undisturbed one.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from servers import TrackingServer
from small import ROOT, SMALL, Runner

from workflows.context import METRICS, read_metrics
from workflows.runtime.cluster import Monitor
from workflows.runtime.workspace import Workspace

pytestmark = pytest.mark.ray
IMAGES = 307_200
LONG = [f"teacher.images={IMAGES}", "teacher.checkpoint_every=12800", "teacher.log_every=2560"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, ray_cluster):
    runner = Runner(tmp_path_factory.mktemp("undisturbed"))
    runner(*LONG, until="teacher")
    return outcome(runner.workspace)


def teacher_folder(workspace):
    return next(iter((workspace / "stages").glob("teacher-*")), Path("/nowhere"))


def outcome(workspace):
    """(the hash of the trained model, its metrics without the times)."""
    folder = teacher_folder(workspace)
    rows = [
        (step, {name: v for name, v in row.items() if name != "images_per_second"})
        for step, row in read_metrics(folder)
    ]
    return json.loads((folder / "result.json").read_text())["identity"], rows


def wait_for(workspace, images, timeout=240):
    """Until the teacher has logged that many images."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        rows = read_metrics(teacher_folder(workspace))
        if rows and rows[-1][0] >= images:
            assert rows[-1][0] < IMAGES, "the training ended before it could be disturbed"
            return
        time.sleep(0.05)
    raise AssertionError(f"no {images} images after {timeout} s")


def assert_same(workspace, undisturbed, tracking_uri=None):
    identity, rows = outcome(workspace)
    steps = [step for step, _ in rows]
    assert steps == list(range(2560, IMAGES + 1, 2560)), "a step is missing or doubled"
    assert rows == undisturbed[1]
    assert identity == undisturbed[0]
    from workflows.runtime.tracking import Tracker

    space = Workspace(workspace)
    tracker = Tracker(tracking_uri or space.default_tracking_uri, artifacts=space.default_artifacts)
    run_id = json.loads((teacher_folder(workspace) / "runs.json").read_text())[tracker.uri]
    tracked = [m.step for m in tracker.client.get_metric_history(run_id, "loss/teacher")]
    assert sorted(tracked) == steps, "a step is missing or doubled in the tracking store"


def processes_of_train(*kinds):
    """Ids of the processes of Ray Train's actors of these kinds, on this machine."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes().split(b"\0")[0]
            except OSError:
                continue
            if any(kind in title for kind in kinds):
                found.append(int(folder.name))
    return found


def wait_until_ray_train_is_gone():
    """A killed driver's workers go on for a moment, and may still write a checkpoint."""
    end = time.monotonic() + 90
    while processes_of_train(b"RayTrainWorker", b"TrainController"):
        assert time.monotonic() < end, "Ray Train outlived its driver"
        time.sleep(0.2)


def test_a_killed_worker_is_replaced_and_the_curve_goes_on(runner, undisturbed, monkeypatch):
    """Some of what it had sent is lost on the way, as when the driver dies first: the checkpoint brings it again."""
    drain = Monitor.drain

    def lossy(monitor):
        rows, notes = drain(monitor)
        lost = {n for _, row in rows if 20_000 <= (n := row["n_images"]) <= 30_000} - seen
        seen.update(lost)
        return [(topic, row) for topic, row in rows if row["n_images"] not in lost], notes

    seen: set[float] = set()
    monkeypatch.setattr(Monitor, "drain", lossy)

    errors = []

    def work():
        try:
            runner(*LONG, until="teacher")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(runner.workspace, 60_000)
    workers = processes_of_train(b"RayTrainWorker")
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGKILL)
    thread.join(timeout=300)
    assert not thread.is_alive()
    assert not errors
    assert len(seen) == 4
    assert "goes on from" in runner.text
    assert_same(runner.workspace, undisturbed)


class Command:
    """`mmdistill run` in a process of its own."""

    def __init__(self, workspace, *more):
        self.workspace, self.more = workspace, more

    def start(self):
        words = [sys.executable, "-m", "workflows", "run", "--workspace", str(self.workspace), "--until", "teacher"]
        words += self.more
        for text in [*SMALL, *LONG]:
            words += ["--set", text]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_TRACKING"))}
        # Tests that run in the background have Ctrl-C ignored, and would pass that on.
        heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(words, cwd=ROOT, text=True, env=environment, preexec_fn=heeds, **pipes)

    def disturb(self, images, how, timeout=120):
        """`how(process)` once that many images are logged: (exit code, what it said)."""
        process = self.start()
        wait_for(self.workspace, images)
        how(process)
        _, shown = process.communicate(timeout=timeout)
        return process.returncode, shown

    def finish(self):
        process = self.start()
        _, shown = process.communicate(timeout=400)
        assert process.returncode == 0, shown
        return shown


@pytest.mark.slow
def test_ctrl_c_then_sigkill_then_a_damaged_checkpoint(tmp_path, undisturbed):
    command = Command(tmp_path / "workspace")
    code, shown = command.disturb(40_000, lambda process: process.send_signal(signal.SIGINT))
    assert code == 130
    assert "interrupted: finished stages and the last checkpoints are kept; run the same command again" in shown
    assert "Traceback" not in shown

    code, _ = command.disturb(100_000, lambda process: process.kill())
    assert code == -signal.SIGKILL
    wait_until_ray_train_is_gone()

    snapshot = next((command.workspace / "ray").glob("teacher-*/checkpoint_manager_snapshot.json"))
    results = json.loads(snapshot.read_text())["checkpoint_results"]
    assert len(results) == 2
    damaged = snapshot.parent / results[-1]["checkpoint_dir_name"] / "state.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 255
    damaged.write_bytes(data)

    shown = command.finish()
    assert "reused" in shown  # prepare
    assert "is damaged" in shown
    assert "goes on from" in shown
    assert_same(command.workspace, undisturbed)


@pytest.mark.slow
def test_a_full_disk_in_the_middle(tmp_path, undisturbed):
    """The kernel's own "no space left on device", from /dev/full in the place of the metrics' file."""
    command = Command(tmp_path / "workspace")

    def fill(_):
        metrics = teacher_folder(command.workspace) / METRICS
        metrics.rename(metrics.with_suffix(".kept"))
        metrics.symlink_to("/dev/full")

    code, shown = command.disturb(60_000, fill)
    assert code == 1
    assert "the disk is full" in shown
    assert "kept" in shown
    assert "Traceback" not in shown
    wait_until_ray_train_is_gone()
    metrics = teacher_folder(command.workspace) / METRICS
    metrics.with_suffix(".kept").replace(metrics)
    assert "goes on from" in command.finish()
    assert_same(command.workspace, undisturbed)


@pytest.mark.slow
def test_a_tracking_server_that_dies_in_the_middle_and_comes_back(tmp_path, undisturbed):
    """The training goes on without it, and it has every step once when the run ends."""
    server = TrackingServer(tmp_path)
    command = Command(tmp_path / "workspace", "--tracking-uri", server.uri)
    server.start()
    try:
        process = command.start()
        wait_for(command.workspace, 60_000)
        server.kill()
        wait_for(command.workspace, 120_000)
        server.start()
        _, shown = process.communicate(timeout=400)
        assert process.returncode == 0, shown
        assert shown.count(f"tracking: {server.uri} does not answer") == 1
        assert shown.count("answers again, and everything that was queued was delivered") == 1
        assert "goes on from" not in shown
        assert_same(command.workspace, undisturbed, server.uri)
    finally:
        server.kill()


@pytest.mark.slow
def test_a_tracking_server_that_stays_away_fails_no_run_and_the_next_run_delivers(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setenv("MMDISTILL_TRACKING_WAIT", "2")
    server = TrackingServer(tmp_path)
    command = Command(tmp_path / "workspace", "--tracking-uri", server.uri)
    server.start()
    try:
        code, shown = command.disturb(60_000, lambda _: server.kill(), timeout=400)
        assert code == 0, shown
        assert "are queued in the workspace; its next run delivers them, or: mmdistill deliver" in shown
        refused = command.start()
        _, shown = refused.communicate(timeout=120)
        assert refused.returncode == 1
        assert f"tracking: {server.uri} failed: Connection refused" in shown
        server.start()
        shown = command.finish()
        assert "entries that an earlier run had queued" in shown
        assert shown.count("reused") == 2
        assert_same(command.workspace, undisturbed, server.uri)
    finally:
        server.kill()
