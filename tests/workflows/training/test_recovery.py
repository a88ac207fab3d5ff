"""Killed for real: a worker, the driver by Ctrl-C and by SIGKILL, a checkpoint on disk, the disk's space, the tracking server.
Each time the run ends with the very weights and metrics of an uninterrupted one.
"""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from interruptions import (
    LONG,
    TRAIN,
    Training,
    assert_same,
    newest_checkpoint,
    processes_of,
    teacher_folder,
    wait_for,
    wait_until_gone,
)
from servers import TrackingServer
from small import SMALL

from workflows.cli.main import main
from workflows.errors import UserError
from workflows.session.metrics import METRICS
from workflows.training.mailbox import Monitor

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_killed_worker_is_replaced_and_the_curve_goes_on(runner, uninterrupted, monkeypatch):
    """Some of what it had sent is lost on the way, as when the driver dies first: the checkpoint brings it again."""
    drain = Monitor.drain

    def lossy(monitor):
        rows, notes = drain(monitor)
        metrics = {row["n_images"] for _, row in rows if "event" not in row}
        lost = {n for n in metrics if 20_000 <= n <= 30_000} - seen
        seen.update(lost)
        return [(topic, row) for topic, row in rows if "event" in row or row["n_images"] not in lost], notes

    seen: set[float] = set()
    monkeypatch.setattr(Monitor, "drain", lossy)

    with ThreadPoolExecutor(1) as beside:
        run = beside.submit(runner, *LONG, until="teacher")
        wait_for(runner.workspace, 40_000)
        workers = processes_of(os.getpid(), b"RayTrainWorker")
        assert len(workers) == 2
        os.kill(workers[-1], signal.SIGKILL)
        run.result(timeout=900)
    assert len(seen) == 4
    assert "continues from" in runner.text
    assert_same(runner.workspace, uninterrupted)


def test_losses_that_are_no_numbers_end_the_run(tmp_path, ray_cluster, capsys):
    """At once: another try would come to the same."""
    sets = [word for text in (*SMALL, "teacher.optimiser.lr=1e30") for word in ("--set", text)]
    with pytest.raises(SystemExit) as caught:
        main(["run", "--workspace", str(tmp_path), "--until", "teacher", *sets])
    shown = capsys.readouterr().err
    assert caught.value.code == 1
    assert re.search(r"error: teacher-\w+: training failed: .* was not finite in 20 updates in a row", shown)
    assert "the last checkpoint is kept" in shown
    assert shown.count("a worker failed") == 1
    assert "Traceback" not in shown


def test_a_lost_connection_stops_it_as_sigterm_does(tmp_path):
    """SIGHUP to all of its processes, as of a terminal that is gone; Ray's keep on until the checkpoint is written."""
    command = Training(tmp_path / "workspace")

    def hang_up(process):
        for pid in [*processes_of(process.pid, b"gcs_server", b"raylet", *TRAIN), process.pid]:
            os.kill(pid, signal.SIGHUP)

    code, shown = command.interrupt_at(40_000, hang_up)
    assert code == 129
    assert "stopping: each training writes a checkpoint first" in shown
    assert "interrupted: finished stages and the last checkpoints are kept" in shown
    assert newest_checkpoint(command.workspace) >= 40_000


def test_ctrl_c_then_sigkill_then_a_damaged_checkpoint(runner, uninterrupted):
    command = Training(runner.workspace)
    code, shown = command.interrupt_at(40_000, lambda process: process.send_signal(signal.SIGINT))
    assert code == 130
    assert "stopping: each training writes a checkpoint first" in shown
    assert "interrupted: finished stages and the last checkpoints are kept; run the same command again" in shown
    assert "Traceback" not in shown
    stopped = newest_checkpoint(command.workspace)
    assert stopped >= 40_000  # where it was told to, and not at the checkpoint before

    code, _ = command.interrupt_at(80_000, lambda process: process.kill())
    assert code == -signal.SIGKILL
    wait_until_gone(command.pid, *TRAIN)

    kept = sorted((command.workspace / "ray").glob("teacher-*/checkpoint-*"))
    assert len(kept) in (2, 3)  # killed before the third was removed
    damaged = kept[-1] / "state.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 255
    damaged.write_bytes(data)

    runner(*LONG, until="teacher")
    assert "reused" in runner.text  # prepare
    assert "is damaged" in runner.text
    assert "continues from" in runner.text
    assert_same(command.workspace, uninterrupted, stopped=stopped)


def test_a_full_disk_in_the_middle(runner, uninterrupted):
    """The kernel's own "no space left on device", from /dev/full in the place of the metrics' file."""
    command = Training(runner.workspace)

    def fill(_):
        metrics = teacher_folder(command.workspace) / METRICS
        metrics.rename(metrics.with_suffix(".kept"))
        metrics.symlink_to("/dev/full")

    code, shown = command.interrupt_at(40_000, fill)
    assert code == 1
    assert "the disk is full" in shown
    assert "kept" in shown
    assert "Traceback" not in shown
    wait_until_gone(command.pid, *TRAIN)
    metrics = teacher_folder(command.workspace) / METRICS
    metrics.with_suffix(".kept").replace(metrics)
    runner(*LONG, until="teacher")
    assert "continues from" in runner.text
    assert_same(command.workspace, uninterrupted)


def test_a_tracking_server_that_dies_in_the_middle_and_comes_back(runner, uninterrupted, tmp_path):
    """The training continues without it, and it has every step once when the run ends."""
    server = TrackingServer(tmp_path)
    server.start()
    try:
        with ThreadPoolExecutor(1) as beside:
            run = beside.submit(runner, *LONG, until="teacher", tracking_uri=server.uri)
            wait_for(runner.workspace, 40_000)
            server.kill()
            wait_for(runner.workspace, 80_000)
            server.start()
            run.result(timeout=900)
        assert runner.text.count(f"tracking: {server.uri} does not answer") == 1
        assert runner.text.count("answers again, and everything that was queued was delivered") == 1
        assert "continues from" not in runner.text
        assert_same(runner.workspace, uninterrupted, server.uri)
    finally:
        server.kill()


def test_a_tracking_server_that_stays_away_fails_no_run_and_the_next_run_delivers(
    runner, uninterrupted, tmp_path, monkeypatch
):
    monkeypatch.setenv("MMDISTILL_TRACKING_WAIT", "2")
    server = TrackingServer(tmp_path)
    server.start()
    try:
        with ThreadPoolExecutor(1) as beside:
            run = beside.submit(runner, *LONG, until="teacher", tracking_uri=server.uri)
            wait_for(runner.workspace, 40_000)
            server.kill()
            run.result(timeout=900)
        assert "are queued in the workspace; its next run delivers them, or: mmdistill deliver" in runner.text
        with pytest.raises(UserError, match=f"tracking: {server.uri} failed: Connection refused"):
            runner(*LONG, until="teacher", tracking_uri=server.uri)
        server.start()
        runner(*LONG, until="teacher", tracking_uri=server.uri)
        assert "entries that an earlier run had queued" in runner.text
        assert runner.text.count("reused") == 2
        assert_same(runner.workspace, uninterrupted, server.uri)
    finally:
        server.kill()
