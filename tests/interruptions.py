"""A training long enough to interrupt, the means to interrupt it, and what is left afterwards."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import ROOT, SMALL

from workflows.session.metrics import read_metrics
from workflows.storage import jsonl as lines
from workflows.storage.workspace import Workspace
from workflows.training.events import EVENTS

IMAGES, LOG_EVERY = 102_400, 2560
LONG = [
    "data.extractor=pixels",
    "data.reporting=[random]",  # no classifier to train first
    f"teacher.images={IMAGES}",
    "teacher.checkpoint_every=12800",
    f"teacher.log_every={LOG_EVERY}",
]


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


def newest_checkpoint(workspace):
    """Its images."""
    names = sorted(path.name for path in (workspace / "ray").glob("teacher-*/checkpoint-*"))
    assert names, "there is no checkpoint yet"
    return int(names[-1].removeprefix("checkpoint-"))


def has_logged(workspace, images, of=IMAGES):
    """Whether the teacher has logged so many of its images."""
    rows = read_metrics(teacher_folder(workspace))
    if not rows or rows[-1][0] < images:
        return False
    assert rows[-1][0] < of, "the training ended before it could be interrupted"
    return True


def wait_for(workspace, images, timeout=600, of=IMAGES):
    end = time.monotonic() + timeout
    while not has_logged(workspace, images, of):
        assert time.monotonic() < end, f"no {images} images after {timeout} s"
        time.sleep(0.05)


def events(workspace):
    return list(lines.read(teacher_folder(workspace) / EVENTS))


def wait_for_event(workspace, wanted, process, timeout=600):
    """While the process goes on."""
    end = time.monotonic() + timeout
    while not any(wanted(row) for row in events(workspace)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, events(workspace)
        time.sleep(0.05)


def assert_same(workspace, uninterrupted, tracking_uri=None, *, stopped=None, images=IMAGES):
    """Each step is there once. The weights and figures are those of an uninterrupted training, bit for bit. `stopped`: the images
    at which it was stopped; the losses of several workers are added in another order in that row, which agrees to rounding.
    """
    identity, rows = outcome(workspace)
    assert_each_step_once(workspace, tracking_uri, images)
    for (step, row), (also, expected) in zip(rows, uninterrupted[1], strict=True):
        cut = stopped is not None and step - LOG_EVERY < stopped <= step
        assert (step, row) == (also, pytest.approx(expected, rel=1e-6) if cut else expected)
    assert identity == uninterrupted[0]


def assert_alike(workspace, uninterrupted, tracking_uri=None, *, images=IMAGES):
    """As `assert_same`, where another number of workers had a part in it: the same but for rounding, which grows on the way."""
    _, rows = outcome(workspace)
    assert_each_step_once(workspace, tracking_uri, images)
    apart = [
        abs(a["loss/teacher"] / b["loss/teacher"] - 1) for (_, a), (_, b) in zip(rows, uninterrupted[1], strict=True)
    ]
    assert max(apart) < 0.03
    assert sum(apart) / len(apart) < 0.005


def assert_each_step_once(workspace, tracking_uri=None, images=IMAGES):
    from workflows.tracking.tracker import Tracker

    steps = [step for step, _ in outcome(workspace)[1]]
    assert steps == list(range(2560, images + 1, 2560)), "a step is missing or doubled"
    space = Workspace(workspace)
    tracker = Tracker(tracking_uri or space.default_tracking_uri, artifacts=space.default_artifacts)
    run_id = json.loads((teacher_folder(workspace) / "runs.json").read_text())[tracker.uri]
    tracked = [m.step for m in tracker.client.get_metric_history(run_id, "loss/teacher")]
    assert sorted(tracked) == steps, "a step is missing or doubled in the tracking store"


TRAIN = (b"RayTrainWorker", b"TrainController")


def processes_of(owner, *kinds):
    """Ids of the processes of Ray's actors of these kinds, in the session of Ray that the process `owner` began: other tests may
    run beside this one.
    """
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes().split(b"\0")[0]
                log = os.readlink(folder / "fd" / "1")
            except OSError:
                continue
            if any(kind in title for kind in kinds) and f"_{owner}/logs/" in log:
                found.append(int(folder.name))
    return found


def wait_until_gone(owner, *kinds):
    """A killed driver's workers go on for a moment, and may still write a checkpoint."""
    end = time.monotonic() + 90
    while processes_of(owner, *kinds):
        assert time.monotonic() < end, "workers outlived their driver"
        time.sleep(0.2)


STARTED: list[subprocess.Popen] = []
"""By a test: what it leaves, as it failed, is killed (conftest.py)."""


class Command:
    """`mmdistill` with these words and settings, in a process of its own; `pid` of the last one."""

    pid = 0

    def __init__(self, *words, settings=(), **environment):
        self.words = [sys.executable, "-m", "workflows", *words, *(w for text in settings for w in ("--set", text))]
        self.environment = environment

    def start(self):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_TRACKING"))}
        environment |= self.environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(self.words, cwd=ROOT, text=True, env=environment, **pipes)
        STARTED.append(process)
        self.pid = process.pid
        return process

    def interrupt(self, when, how, timeout=600):
        """`how(process)` as soon as `when()`: (exit code, what it said)."""
        process, end = self.start(), time.monotonic() + 600
        while not when():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.02)
        how(process)
        _, shown = process.communicate(timeout=timeout)
        return process.returncode, shown

    def finish(self):
        process = self.start()
        _, shown = process.communicate(timeout=900)
        assert process.returncode == 0, shown
        return shown


class Training(Command):
    """`mmdistill run` up to its teacher."""

    def __init__(self, workspace, *more, settings=LONG, **environment):
        words = ("run", "--workspace", str(workspace), "--until", "teacher", *more)
        super().__init__(*words, settings=[*SMALL, *settings], **environment)
        self.workspace = workspace

    def interrupt_at(self, images, how, timeout=600, of=IMAGES):
        """`how(process)` once that many images are logged."""
        return self.interrupt(lambda: has_logged(self.workspace, images, of), how, timeout)
