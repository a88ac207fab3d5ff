"""gc and age: trainings that nobody went on with, and copies of remote files that nothing uses. No run is needed for that."""

import io
import json
import os
import time

import pytest
from rich.console import Console
from stores import bucket, use

from workflows.rendering.screen import Screen
from workflows.storage import store as storage
from workflows.storage.workspace import Workspace
from workflows.tools.gc import make_plan, run_gc

NAME = f"teacher-{'1' * 12}"


def aged(path, days):
    """The file or folder as if it had been written then."""
    when = time.time() - days * 86_400
    for part in [*path.rglob("*"), path]:
        os.utime(part, (when, when), follow_symlinks=False)


@pytest.fixture
def halfway(tmp_path):
    """A workspace with a training that was left halfway: stage, checkpoint, and the record of its configuration."""
    space = Workspace(tmp_path / "workspace", minimum_free=0)
    stage = space.stage("teacher", "1" * 12)
    (stage.path / "depends.json").write_text("{}")
    checkpoint = space.root / "ray" / NAME / "checkpoint-000000000024"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.safetensors").write_bytes(b"x" * 1000)
    (space.root / "pipelines").mkdir()
    (space.root / "pipelines" / "digits-1.json").write_text(
        json.dumps({"run_id": "a", "stages": {"teacher": "1" * 12}})
    )
    return space


def names(space, keep_days):
    return {item.what for item in make_plan(space, None, keep_days).items}


BOTH = {f"stages/{NAME}", f"ray/{NAME}"}


def test_a_training_is_kept_until_it_is_older_than_the_days_to_keep(halfway):
    for days in (None, 0.5, 30):
        assert names(halfway, days) == set()
    for part in ("stages", "ray", "pipelines"):
        aged(halfway.root / part, days=40)
    assert names(halfway, None) == set(), "it can be resumed, and no age was given"
    assert names(halfway, 41) == set()
    assert names(halfway, 39) == BOTH
    for young in (
        halfway.root / "ray" / NAME,
        halfway.root / "stages" / NAME,
        halfway.root / "pipelines" / "digits-1.json",
    ):
        os.utime(young)
        assert names(halfway, 39) == set(), "one part of it is younger"
        aged(young, days=40)


def test_what_is_removed_is_gone_and_said(halfway):
    for part in ("stages", "ray", "pipelines"):
        aged(halfway.root / part, days=40)
    shown = io.StringIO()
    run_gc(halfway.root, None, Screen(Console(file=shown, width=200)), agree=lambda _: True, keep_days=30)
    assert "was not resumed within --keep-days" in shown.getvalue()
    assert not any((halfway.root / "ray").iterdir())
    assert not any((halfway.root / "stages").iterdir())


def test_copies_of_remote_files_that_nothing_uses_go(tmp_path, moto_server, monkeypatch):
    use(monkeypatch, moto_server, MMDISTILL_CACHE=str(tmp_path / "cache"))
    place = bucket(moto_server, "gc-copies")
    for name in ("old", "used"):
        storage.write(f"{place}/{name}/file", b"x" * 100)
    old, used = storage.fetch(f"{place}/old"), storage.fetch(f"{place}/used")
    left = old.with_name(".partial-abc")
    left.mkdir()
    space = Workspace(tmp_path / "workspace", minimum_free=0)

    def removed(keep_days):
        screen = Screen(Console(file=io.StringIO(), width=200))
        plan = run_gc(space.root, None, screen, agree=lambda _: True, keep_days=keep_days)
        return [(item.what.partition(" of")[0], item.bytes, item.why) for item in plan.items]

    assert removed(None) == removed(0) == []
    for path in (old, used, left):
        aged(path, days=8)
    assert removed(9) == []
    assert storage.fetch(f"{place}/used") == used, "which is a use of it"
    assert removed(None) == [("2 copies", 100, "not used for 7 days")]
    assert [path.name for path in old.parent.iterdir()] == [used.name]
    assert storage.fetch(f"{place}/old") == old
    assert (old / "file").read_bytes() == b"x" * 100


def test_an_interrupted_trial_can_be_resumed(halfway):
    """Its checkpoints are in a folder for each of its rounds. No pipeline names it any more."""
    name = f"trial-{'2' * 12}"
    (halfway.stage("trial", "2" * 12).path / "depends.json").write_text("{}")
    checkpoint = halfway.root / "ray" / name / "k2" / "checkpoint-000000000024"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.safetensors").write_bytes(b"x" * 1000)
    plan = make_plan(halfway, None, None)
    assert not plan.items
    assert any(name in line and "can be resumed" in line for line in plan.kept)


def test_what_a_kept_student_started_from_is_kept(halfway):
    identities = {"distill-k2": "b" * 16, "distill-k4": "c" * 16}
    for n, (name, identity) in enumerate(identities.items(), 3):
        stage = halfway.stage(name, str(n) * 12).path
        (stage / "result.json").write_text(json.dumps({"identity": identity}))
        starts = {"student": identities["distill-k4"]} if name == "distill-k2" else {}
        (stage / "depends.json").write_text(json.dumps({"starts": starts}))
    record = halfway.root / "pipelines" / "digits-1.json"
    record.write_text(json.dumps({"run_id": "a", "stages": {"teacher": "1" * 12, "distill-k2": "3" * 12}}))
    assert names(halfway, None) == set()
    (halfway.stage("distill-k2", "3" * 12).path / "depends.json").write_text(json.dumps({"starts": {}}))
    assert names(halfway, None) == {f"stages/distill-k4-{'4' * 12}"}
