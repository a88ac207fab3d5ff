"""As a team has it: real servers, workspace and data in their bucket, two workers; machines that die, a network that is bad."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import interruptions
import numpy as np
import pytest
from faults import Faults
from PIL import Image
from services import clean_environment
from small import ROOT, SMALL

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]
LONG = [*interruptions.LONG, "distill.k=[1]"]
names = itertools.count()


class Machine:
    """A machine of the team's: a cache of its own, and the stack's environment."""

    def __init__(self, stack, folder, **environment):
        self.env = clean_environment() | stack | {
            "MMDISTILL_CACHE": str(folder), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "", "COLUMNS": "200",
        } | environment  # fmt: skip

    def start(self, *words):
        words = [sys.executable, "-m", "workflows", *words]
        return subprocess.Popen(words, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                start_new_session=True)  # fmt: skip

    def __call__(self, *words):
        process = self.start(*words)
        text, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, text[-3000:]
        return text

    def run(self, workspace, *overrides, start=False, until="report"):
        sets = [word for override in [*SMALL, *overrides] for word in ("--set", override)]
        how = self.start if start else self
        return how("run", "--recipe", "digits", "--workspace", workspace, "--workers", "2", "--until", until, *sets)


@pytest.fixture
def place(stack):
    """A prefix of the stack's bucket that nobody else uses."""
    return f"{stack['MMDISTILL_BUCKET']}/team-{next(names)}"


@pytest.fixture
def here(stack, monkeypatch):
    """This process reads the stack's stores too."""
    from stores import use

    use(monkeypatch, stack["AWS_ENDPOINT_URL"], **{name: value for name, value in stack.items()})


def tracked(stack, name, metric):
    """[(run id, steps of a metric)] of the runs of this name."""
    import mlflow

    client = mlflow.MlflowClient(stack["MLFLOW_TRACKING_URI"])
    found = client.search_runs(
        [client.get_experiment_by_name("mmdistill").experiment_id], f"tags.`mlflow.runName` = '{name}'"
    )
    return [(run.info.run_id, [m.step for m in client.get_metric_history(run.info.run_id, metric)]) for run in found]


def test_a_driver_killed_on_one_machine_is_gone_on_with_on_another(runner, stack, here, place, tmp_path):
    """SIGKILL of the driver and of all that it started; from another machine the run ends with the very weights and metrics of an
    uninterrupted one, and from a third nothing is left to do.
    """
    from workflows.storage import store as storage

    first = Machine(stack, tmp_path / "first")
    driver = first.run(f"{place}/killed", *LONG, start=True)
    until = time.monotonic() + 600
    while not any("checkpoint" in name and "teacher" in name for name in storage.listing(f"{place}/killed/ray")):
        assert time.monotonic() < until
        assert driver.poll() is None, driver.stdout.read()
        time.sleep(0.2)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    runner(*LONG, until="distill", workers=2)  # the uninterrupted one, while the dead driver's lease runs out
    text = Machine(stack, tmp_path / "second", MMDISTILL_LEASE_WAIT="1").run(f"{place}/killed", *LONG)
    assert "continues from" in text, text[-2000:]

    def results(workspace):
        found = {}
        for name in storage.listing(f"{workspace}/stages"):
            if name.endswith("result.json"):
                result = json.loads(storage.read(f"{workspace}/stages/{name}"))
                found[name.split("-")[0] + name.split("/")[0][-12:]] = result["identity"]
        return {
            name: identity for name, identity in found.items() if name.startswith(("prepare", "teacher", "distill"))
        }

    assert results(f"{place}/killed") == results(str(runner.workspace))
    runs = tracked(stack, "teacher", "loss/teacher")
    assert len(runs) == 2
    for _, steps in runs:
        assert sorted(steps) == list(range(2560, interruptions.IMAGES + 1, 2560)), "a step is missing or doubled"
    third = Machine(stack, tmp_path / "third")
    assert third.run(f"{place}/killed", *LONG).count("reused") == 6
    text = third("lineage", "mmdistill-digits-student")
    assert "teacher" in text


def pictures(n):
    for i in range(n):
        sink = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)).save(sink, "PNG")
        yield f"class{i % 3}/{i:04d}.png", sink.getvalue()


def test_a_bad_network_loses_nothing_and_doubles_nothing(runner, stack, here, place, tmp_path):
    """A tenth of the requests refused, some answers cut or lost, one in a hundred slower than a request may be: the data set is
    that of a quiet network, and a training on it, streamed, with its checkpoints in the bucket, has the same weights.
    """
    from workflows.dataset.manifest import read_manifest
    from workflows.dataset.shards import read_all
    from workflows.storage import store as storage

    for name, content in pictures(600):
        storage.write(f"{place}/raw/{name}", content)
    how = ["--size", "16", "--channels", "1", "--shard-mb", "0.1", "--encoding", "uint8"]
    quiet = str(tmp_path / "set")
    Machine(stack, tmp_path / "quiet")("prepare", f"{place}/raw", quiet, *how)
    train = ["data.extractor=pixels", "teacher.images=19200", "teacher.checkpoint_every=3840", "data.memory_gib=0",
             "distill.k=[1]", "distill.images=1280", "distill.validate_every=1280", "network.patch=4"]  # fmt: skip
    runner(f"data.source=dataset://{quiet}", *train, until="teacher", workers=2)
    with Faults(stack["AWS_ENDPOINT_URL"], refused=0.10, cut=0.02, lost=0.01, delayed=0.01, delay=6.0) as faults:
        bad = Machine(stack, tmp_path / "bad", AWS_ENDPOINT_URL=faults.url, MMDISTILL_S3_TIMEOUT="3")
        bad("prepare", f"{place}/raw", f"{place}/set-bad", *how)
        bad.run(f"{place}/bad", f"data.source=dataset://{place}/set-bad", *train)
    counts = dict(faults.counts)
    assert counts["refused"] > 50, counts
    assert min(counts[kind] for kind in ("cut", "lost", "delayed")) >= 1, counts
    good, other = read_manifest(quiet), read_manifest(f"{place}/set-bad")
    assert (other.count, other.fingerprint, other.skipped) == (600, good.fingerprint, {"count": 0, "listed": []})
    assert np.array_equal(read_all(f"{place}/set-bad").images, read_all(quiet).images)

    def teacher(workspace):
        (name,) = (
            n for n in storage.listing(f"{workspace}/stages") if n.startswith("teacher-") and n.endswith("result.json")
        )
        return json.loads(storage.read(f"{workspace}/stages/{name}"))["identity"]

    assert teacher(f"{place}/bad") == teacher(str(runner.workspace))
