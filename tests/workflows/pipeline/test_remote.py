"""A workspace in an object store: the same run, from any machine, by one at a time, and nothing secret left anywhere."""

import json
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from small import Runner
from stores import PLANTED, bucket, use

from workflows.errors import UserError
from workflows.session.metrics import read_metrics
from workflows.session.stage import StageRun
from workflows.storage import store as storage
from workflows.storage.lease import WAITS, Lease
from workflows.storage.uri import join
from workflows.storage.workspace import RUNS, Workspace
from workflows.tracking.tracker import Tracker

pytestmark = pytest.mark.ray
SHORT = (
    "teacher.images=3840",
    "distill.k=[1]",
    "distill.images=1920",
    "distill.validate_every=1920",
    "data.reporting=[classifier]",
    "evaluate.teacher_steps=[1]",
)


@pytest.fixture
def machine(moto_server, monkeypatch, tmp_path):
    """`machine(name)` moves to another machine: one with a cache of its own."""

    def move(name):
        monkeypatch.setenv("MMDISTILL_CACHE", str(tmp_path / name))

    use(monkeypatch, moto_server, AWS_SECRET_ACCESS_KEY=PLANTED)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    move("one")
    return move


def runner_in(uri):
    return Runner(uri)


def test_a_run_in_a_bucket_goes_on_from_any_machine_and_leaves_no_secret(machine, moto_server, ray_cluster, tmp_path):
    import ray

    place = bucket(moto_server, "workspace") + "/team/digits"
    first = runner_in(place)
    summary = first(*SHORT, workers=2)
    assert summary["report"] == f"{place}/reports/digits/report.html"
    names = set(storage.listing(place))
    assert {"reports/digits/report.html", "reports/digits/summary.json"} <= names
    finished = {name.split("/")[1] for name in names if name.startswith("stages/") and name.endswith("/result.json")}
    assert len(finished) == 6
    assert any(name.endswith(".parquet") for name in names)
    assert not any(name.endswith(".partial") for name in names)
    assert json.loads(storage.read(f"{place}/.lock"))["until"] == 0, "nobody holds it"
    # A training's checkpoints are there too.
    assert any(name.startswith("ray/teacher-") and name.endswith("state.safetensors") for name in names)

    # Some of it waited for the tracking store on the first machine, which is gone.
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        before = store.execute("select key, step, value, timestamp from metrics order by 1, 2, 4").fetchall()
        lost = store.execute("delete from metrics where step > 1000").rowcount
        store.commit()
    assert lost > 3
    machine("another")
    second = runner_in(place)
    again = second(*SHORT, workers=2)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        assert store.execute("select key, step, value, timestamp from metrics order by 1, 2, 4").fetchall() == before
    assert all(stage["reused"] for stage in again["stages"]), second.text
    assert again["students"] == summary["students"]
    assert not list((tmp_path / "another").rglob("*.parquet")), "shards are read where they are"

    # Redone from the other machine; the first one sees that, not its old copy.
    second(*SHORT, workers=2, force=("distill-k1",))
    redone = {name: e.tag for name, e in storage.listing(place).items() if name.endswith("result.json")}
    machine("one")
    third = runner_in(place)(*SHORT, workers=2)
    assert all(stage["reused"] for stage in third["stages"])
    assert redone == {name: e.tag for name, e in storage.listing(place).items() if name.endswith("result.json")}

    # Nowhere is the key: not in the store, on a disk, in the tracking store, in Ray's logs, on the screen.
    for name in storage.listing(place):
        assert PLANTED.encode() not in storage.read(join(place, name)), name
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    for path in [*tmp_path.rglob("*"), *logs.rglob("*")]:
        if path.is_file():
            assert PLANTED.encode() not in path.read_bytes(), path
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        assert PLANTED not in "\n".join(store.iterdump())
    assert PLANTED not in first.text + second.text


def test_one_run_at_a_time(machine, moto_server, ray_cluster):
    place = bucket(moto_server, "in-use")
    with Lease(f"{place}/.lock", "workspace").held(), pytest.raises(UserError, match="is in use by another run"):
        runner_in(place)(*SHORT, until="prepare")
    space = Workspace(place)
    with space.lock():
        machine("another")
        with pytest.raises(UserError, match="is in use by another run"), Workspace(place).lock():
            pass
        space.check_held()
        assert space._lease is not None
        space._lease.taken_over = True
        with pytest.raises(UserError, match="was taken over by another run"):
            space.check_held()


def test_a_job_waits_for_the_lease_of_one_that_was_killed(machine, moto_server, monkeypatch):
    """And not for that of one that lives, which renews it."""
    place = bucket(moto_server, "killed")
    dead = Lease(f"{place}/.lock", "workspace", seconds=3)
    dead._id = "dead"
    dead._take()
    with pytest.raises(UserError, match="in use by another run"), Lease(f"{place}/.lock", "workspace").held():
        pass
    monkeypatch.setenv(WAITS, "1")
    with Lease(f"{place}/.lock", "workspace", seconds=10).held():
        began = time.monotonic()
        with pytest.raises(UserError, match="in use by another run"), Lease(f"{place}/.lock", "workspace").held():
            pass
        assert time.monotonic() - began < 8


def test_a_stage_that_was_cut_off_is_not_done(machine, moto_server):
    """Uploads end with result.json: a folder without it is no stage, here or on another machine."""
    place = bucket(moto_server, "cut")
    folder = Workspace(place).stage("teacher", "key")
    (folder.path / "model").mkdir()
    (folder.path / "model/weights").write_bytes(b"w" * 1000)
    upload = storage.upload

    def until_the_last(path, uri):
        if uri.endswith("result.json"):
            raise KeyboardInterrupt
        upload(path, uri)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "upload", until_the_last)
        with pytest.raises(KeyboardInterrupt):
            folder.finish({"identity": "x"})
    assert Workspace(place).stage("teacher", "key").result is None, "the copy here is no better than the store"
    machine("another")
    other = Workspace(place).stage("teacher", "key")
    assert other.result is None
    assert (other.path / "model/weights").read_bytes() == b"w" * 1000, "what was there is used"
    other.finish({"identity": "x"})
    assert Workspace(place).stage("teacher", "key").result == {"identity": "x"}
    Workspace(place).discard(other)
    assert Workspace(place).stage("teacher", "key").result is None
    assert storage.listing(f"{place}/stages") == {}


def test_what_another_machine_began_anew_is_not_what_lies_here(machine, moto_server):
    place = bucket(moto_server, "anew")
    folder = Workspace(place).stage("teacher", "key")
    for name, text in ((RUNS, "mine"), ("metrics.jsonl", "mine")):
        (folder.path / name).write_text(text)
    folder.keep(RUNS)
    assert (Workspace(place).stage("teacher", "key").path / "metrics.jsonl").exists(), "begun here, it goes on here"
    machine("another")
    other = Workspace(place).stage("teacher", "key")
    Workspace(place).discard(other)
    (other.path / RUNS).write_text("another's")
    other.keep(RUNS)
    machine("one")
    folder = Workspace(place).stage("teacher", "key")
    assert {p.name: p.read_text() for p in folder.path.iterdir()} == {RUNS: "another's"}
    machine("another")
    Workspace(place).discard(other)
    machine("one")
    assert not list(Workspace(place).stage("teacher", "key").path.iterdir())


def test_a_stage_that_is_being_discarded_is_not_done(machine, moto_server, tmp_path, monkeypatch):
    """Killed in the middle of it, here or in a store: without its result, whatever else is left."""
    for place in (str(tmp_path / "workspace"), bucket(moto_server, "discarded")):
        space = Workspace(place)
        folder = space.stage("teacher", "key")
        (folder.path / "metrics.jsonl").write_text("{}")
        folder.finish({"identity": "x"})
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                space.discard(folder)
        assert Workspace(place).stage("teacher", "key").result is None
        space.discard(space.stage("teacher", "key"))
        assert not list(space.stage("teacher", "key").path.iterdir())
    left = tmp_path / "workspace/stages/.teacher-key.partial"
    left.mkdir()
    (left / "a").write_text("of a removal that was killed")
    Workspace(tmp_path / "workspace").remove(tmp_path / "workspace/stages/teacher-key")
    assert not left.exists()


def test_a_bucket_that_is_not_there_is_a_line(machine, tmp_path):
    with pytest.raises(UserError, match="there is no such bucket"):
        Workspace("s3://never-made/workspace")
    os.environ["MMDISTILL_CACHE"] = str(tmp_path / "one")
    shutil.rmtree(tmp_path / "one", ignore_errors=True)


def test_what_one_machine_tracked_another_does_not_track_again(machine, moto_server, tmp_path):
    """The other has no rows of it, and is sent them all again by the checkpoint: they are in its file, and tracked once."""
    place = bucket(moto_server, "tracked")
    tracker = Tracker(os.environ["MLFLOW_TRACKING_URI"], artifacts=tmp_path / "artifacts")
    context = SimpleNamespace(tracker=tracker, parent_run=None)

    def stage():
        folder = Workspace(place).stage("teacher", "key")
        return StageRun(context, folder, {"a": 1}, began=(folder.path / RUNS).exists())

    one = stage()
    for n in (10, 20):
        one.log(n, {"loss": 1.0 / n, "n_images": float(n)})
    one.log_at(4, {"teacher/frechet": 2.0})
    machine("another")
    other = stage()
    assert other.run_id == one.run_id
    assert read_metrics(other.path) == []
    for n in (10, 20, 30):
        other.log(n, {"loss": 1.0 / n, "n_images": float(n)})
    other.log_at(4, {"teacher/frechet": 2.0})
    assert [step for step, _ in read_metrics(other.path)] == [10, 20, 30]
    for metric, steps in (("loss", [10, 20, 30]), ("n_images", [10, 20, 30]), ("teacher/frechet", [4])):
        assert sorted(m.step for m in tracker.client.get_metric_history(one.run_id, metric)) == steps
