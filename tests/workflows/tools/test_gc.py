"""gc in a workspace that real runs have left: what it removes, what it keeps, and that all goes on as before afterwards."""

import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console
from small import ROOT
from stores import bucket, use

from workflows.cli.main import main
from workflows.config.loading import load_config
from workflows.errors import UserError
from workflows.pipeline.run import run_pipeline
from workflows.registry.lineage import lineage
from workflows.registry.versions import Registry
from workflows.rendering.screen import Screen
from workflows.session.options import RunOptions
from workflows.storage.store import listing, publish
from workflows.storage.workspace import Workspace
from workflows.tools.gc import make_plan, run_gc
from workflows.tracking.tracker import Tracker

pytestmark = pytest.mark.ray
SETTINGS = ["distill.k=[1,2]", "distill.warm_start=true", "teacher.images=48"]


def run(workspace, *overrides, until="report"):
    screen = Screen(Console(file=io.StringIO(), width=200))
    config = load_config("digits", [*SETTINGS, *overrides], smoke=True)
    return run_pipeline(config, RunOptions(workspace=workspace, until=until), screen)


@pytest.fixture(scope="module")
def left(tmp_path_factory, ray_cluster):
    """A workspace with a smoke run that ended, kept as it was."""
    workspace = tmp_path_factory.mktemp("left") / "workspace"
    run(workspace)
    return workspace


@pytest.fixture
def workspace(left, tmp_path):
    """It, put back afterwards where it lay: the addresses inside hold its path. MLflow keeps its store open, so that is filled anew
    by SQLite itself.
    """
    kept = tmp_path / "kept"
    shutil.copytree(left, kept)
    yield left
    for path in left.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    shutil.copytree(kept, left, dirs_exist_ok=True, ignore=shutil.ignore_patterns("mlflow.db"))
    with closing(sqlite3.connect(kept / "mlflow.db")) as source, closing(sqlite3.connect(left / "mlflow.db")) as store:
        source.backup(store)


def collect(workspace, agree=True, **options):
    """(the plan, what was shown)."""
    shown = io.StringIO()
    screen = Screen(Console(file=shown, width=200, highlight=False))
    return run_gc(workspace, None, screen, agree=lambda _: agree, **options), shown.getvalue()


def names(plan):
    return {item.what for item in plan.items}


def stages(workspace):
    return {path.name for path in (workspace / "stages").iterdir()}


def registry_of(workspace):
    space = Workspace(workspace)
    return Registry(Tracker(space.default_tracking_uri, artifacts=space.default_artifacts))


def aged(path, days=1.0):
    """The file or folder as if it had been written then."""
    when = time.time() - days * 86_400
    for part in [path, *path.rglob("*")]:
        os.utime(part, (when, when), follow_symlinks=False)


def test_a_finished_run_loses_its_checkpoints_alone_and_all_goes_on(workspace, tmp_path, capsys):
    before = stages(workspace)
    trainings = {f"ray/{name}" for name in before if name.startswith(("teacher-", "distill-"))}
    plan, shown = collect(workspace, agree=False)
    assert names(plan) == trainings
    assert len(trainings) == 3
    assert "nothing was removed" in shown
    assert all((workspace / name).is_dir() for name in trainings)

    plan, shown = collect(workspace)
    assert plan.bytes > 100_000
    assert f"removed 3, {plan.bytes / 1000:.0f} kB" in shown
    assert not any((workspace / "ray").iterdir())
    assert stages(workspace) == before
    assert names(collect(workspace)[0]) == set()

    again = run(workspace)
    assert all(stage["reused"] for stage in again["stages"])
    with pytest.raises(SystemExit) as caught:
        main(["sample", "models:/mmdistill-digits-smoke-student@k2-champion", "--n", "2", "--out", str(tmp_path / "x.npy"),
              "--workspace", str(workspace)])  # fmt: skip
    assert caught.value.code == 0, capsys.readouterr().err


def test_what_a_run_registers_is_its_whole_lineage(left):
    found = lineage(registry_of(left), "mmdistill-digits-smoke-student")
    (data,) = found["data"]
    (teacher,) = data["teachers"]
    one, two = teacher["students"]
    assert (data["source"], data["count"]) == ("digits", "240")
    assert [s["start"] for s in (one, two)] == [two["uri"], None]
    evaluation = json.loads(next((left / "stages").glob("evaluate-*/result.json")).read_text())
    rows = {(row["who"], row["sampler"], row["k"]): row["frechet"]["mean"] for row in evaluation["rows"]}
    for k, student in ((1, one), (2, two)):
        assert student["k"] == k
        assert student["aliases"] == [f"k{k}-champion"]
        measured = student["evaluation"]
        assert measured["frechet"] == pytest.approx(rows["student", "ancestral", k], rel=1e-5)
        assert measured["teacher_frechet"] == pytest.approx(rows["teacher", "ancestral", k], rel=1e-5)
        assert (measured["samples"], measured["seeds"], measured["reference_count"]) == (20, 1, 48)
    assert [(m["alias"], m["before"], m["by"]) for m in found["moves"]] == [
        ("k1-champion", None, "gate"),
        ("k2-champion", None, "gate"),
    ]
    assert found["notes"] == []


def test_a_gate_that_is_changed_alone_makes_no_new_version(workspace):
    before = registry_of(workspace).versions()
    run(workspace, "gate.recall=0.9")
    after = registry_of(workspace).versions()
    assert [v.uri for v in after] == [v.uri for v in before]
    assert [json.loads(v.tags["gate"])["recall"] for v in after] == [0.9, 0.9, 0]  # students, teacher


def test_an_interrupted_training_resumes_and_the_rest_is_reused(workspace):
    """As a kill leaves it, after 24 of 48 images: no result, and the checkpoint of then."""
    stage = next((workspace / "stages").glob("teacher-*"))
    (stage / "result.json").unlink()
    shutil.rmtree(stage / "model")
    training = workspace / "ray" / stage.name
    (last,) = training.glob("checkpoint-*48")
    shutil.rmtree(last)
    records = (workspace / "pipelines").rename(workspace / "away")  # no configuration refers to it either
    plan, shown = collect(workspace)
    assert f"ray/{stage.name}" not in names(plan)
    assert f"{stage.name}: a training that can be resumed" in shown
    assert [p.name for p in training.glob("checkpoint-*")] == ["checkpoint-000000000024"]
    assert any(name.startswith("prepare-") for name in stages(workspace))

    records.rename(workspace / "pipelines")
    screen = io.StringIO()
    config = load_config("digits", SETTINGS, smoke=True)
    again = run_pipeline(config, RunOptions(workspace=workspace), Screen(Console(file=screen, width=200)))
    assert "teacher: continues from 24 images" in screen.getvalue()
    reused = {s["name"]: s["reused"] for s in again["stages"]}
    assert not reused.pop("teacher")
    assert reused.pop("prepare")
    assert reused.pop("distill-k1")  # the very same teacher came of it


def test_stages_that_nothing_refers_to_go_and_those_of_versions_stay(workspace):
    space = Workspace(workspace)
    for name in ("teacher", "prepare", "evaluate", "register", "report"):
        source = next((workspace / "stages").glob(f"{name}-*"))
        shutil.copytree(source, source.with_name(f"{name}-{'0' * 12}"))
        os.utime(source.with_name(f"{name}-{'0' * 12}") / "result.json", (1, 1))
    old = {f"stages/{name}-{'0' * 12}" for name in ("teacher", "prepare", "evaluate", "register", "report")}
    assert {n for n in names(collect(workspace, agree=False)[0]) if n.startswith("stages/")} == old

    for record in (workspace / "pipelines").iterdir():  # without a configuration there are still the versions
        record.unlink()
    gone = {n.removeprefix("stages/") for n in names(collect(workspace)[0]) if n.startswith("stages/")}
    kept = {name.rpartition("-")[0] for name in stages(workspace)}
    assert kept == {"prepare", "teacher", "distill-k1", "distill-k2", "evaluate"}
    assert {name.rpartition("-")[0] for name in gone} == {"teacher", "prepare", "evaluate", "register", "report"}
    assert not any(name.endswith("0" * 12) for name in stages(workspace))

    registry = registry_of(workspace)
    for version in registry.versions():
        registry.client.delete_model_version(version.name, version.version)
    collect(workspace)
    assert stages(workspace) == set()
    assert space.pipelines() == {}
    assert not list((workspace / "mlartifacts" / "models").iterdir())


def test_another_configuration_counts_while_it_is_young_enough(workspace):
    run(workspace, "evaluate.samples=22", until="evaluate")
    both = sorted((workspace / "stages").glob("evaluate-*"))
    assert len(both) == 2
    assert not [n for n in names(collect(workspace, agree=False)[0]) if n.startswith("stages/")]
    record = max((workspace / "pipelines").iterdir(), key=lambda p: p.stat().st_mtime)
    mine = json.loads(record.read_text())["stages"]["evaluate"]
    aged(record, days=3)
    plan, _ = collect(workspace, agree=False, keep_days=2)
    assert names(plan) == set()  # none of it was written so long ago
    for path in (workspace / "stages").iterdir():
        aged(path, days=3)
    assert names(collect(workspace, agree=False, keep_days=2)[0]) == {f"stages/evaluate-{mine}"}
    assert names(collect(workspace, agree=False, keep_days=4)[0]) == set()


def test_a_folder_that_a_setting_names_stays(workspace):
    """Statistics to measure against, of a stage that nothing else refers to."""
    source = next((workspace / "stages").glob("prepare-*"))
    other = Path(shutil.copytree(source, source.with_name(f"prepare-{'0' * 12}")))
    assert names(collect(workspace, agree=False)[0]) >= {f"stages/{other.name}"}
    run(workspace, f"evaluate.reference={other / 'reporting/classifier/statistics/holdout'}", until="evaluate")
    assert f"stages/{other.name}" not in names(collect(workspace, agree=False)[0])


def test_a_record_of_before_keeps_every_stage(workspace):
    shutil.copytree(next((workspace / "stages").glob("report-*")), workspace / "stages" / f"report-{'0' * 12}")
    record = next((workspace / "pipelines").iterdir())
    record.write_text(json.dumps({"run_id": json.loads(record.read_text())["run_id"]}))
    plan, shown = collect(workspace, agree=False)
    assert not [n for n in names(plan) if n.startswith("stages/")]
    assert "kept  all stages: 1 configuration ran before" in shown


def test_a_store_that_does_not_answer_keeps_its_stages(workspace):
    stage = shutil.copytree(next((workspace / "stages").glob("report-*")), workspace / "stages" / f"report-{'0' * 12}")
    (Path(stage) / "runs.json").write_text(json.dumps({"http://ada:secret@127.0.0.1:9": "0" * 32}))
    plan, shown = collect(workspace, agree=False)
    assert not [n for n in names(plan) if n.startswith("stages/")]
    assert "http://127.0.0.1:9, which does not answer" in shown
    assert "secret" not in shown


def tracked(folder, uri, run_id):
    """A workspace with one finished stage, which no pipeline names, and which this store has a run of."""
    space = Workspace(folder)
    stage = space.stage("report", "0" * 12)
    (stage.path / "result.json").write_text('{"identity": "abc"}')
    (stage.path / "runs.json").write_text(json.dumps({uri: run_id}))
    return space


def test_a_store_is_asked_with_the_password_that_was_given(tmp_path, monkeypatch):
    space, asked = tracked(tmp_path, "http://host", "0" * 32), []
    monkeypatch.setattr("workflows.tools.gc._registered", lambda uri, runs: asked.append(uri) or set())
    assert names(make_plan(space, "http://ada:secret@host", None)) == {f"stages/report-{'0' * 12}"}
    assert asked == ["http://ada:secret@host"]

    def denied(uri, runs):
        raise UserError("no")

    monkeypatch.setattr("workflows.tools.gc._registered", denied)
    plan = make_plan(space, "http://ada:secret@host", None)
    assert names(plan) == set()
    assert "secret" not in str(plan.kept)


def test_a_file_of_the_same_name_on_another_machine_is_another_store(tmp_path):
    uri = f"sqlite:///{tmp_path}/store.db"
    mine = Tracker(uri, artifacts=tmp_path / "artifacts").start_run("mine")
    plan = make_plan(tracked(tmp_path / "other", uri, "0" * 32), None, None)
    assert names(plan) == set()
    assert "which does not answer here" in plan.kept[-1]
    assert names(make_plan(tracked(tmp_path / "own", uri, mine), None, None)) == {f"stages/report-{'0' * 12}"}


def test_partial_files_go_and_what_a_worker_may_be_writing_stays(workspace):
    half = workspace / "stages" / next(iter(stages(workspace))) / ".result.json.partial"
    half.write_text("{")
    folder = workspace / "stages" / ".teacher-abc.partial"
    shutil.copytree(next((workspace / "stages").glob("teacher-*")), folder)
    stage = next((workspace / "stages").glob("teacher-*"))
    (stage / "result.json").unlink()
    writing = workspace / "ray" / stage.name / ".checkpoint.partial"
    writing.mkdir()
    plan, _ = collect(workspace)
    assert {str(half.relative_to(workspace)), "stages/.teacher-abc.partial"} <= names(plan)
    assert not half.exists()
    assert not folder.exists()
    assert writing.exists()


def test_deleted_runs_and_models_go_and_those_of_versions_stay(workspace):
    registry = registry_of(workspace)
    client, tracker = registry.client, registry.tracker
    mine, other = tracker.start_run("mine"), client.create_experiment("other")
    tracker.log_text(mine, "x" * 5000, "note.txt")
    teacher, first, second = registry.versions()
    kept = client.get_run(teacher.run_id)
    for run_id in (mine, teacher.run_id):
        client.delete_run(run_id)
    client.delete_experiment(other)
    client.delete_model_version(first.name, first.version)
    unversioned = first.source.removeprefix("models:/")
    plan, _ = collect(workspace)
    found = {item.what: item for item in plan.items if not item.what.startswith("ray/")}
    assert set(found) == {f"run {mine}", f"model {unversioned}"}
    assert found[f"run {mine}"].bytes == 5000
    folders = {path.name for path in (workspace / "mlartifacts" / "models").iterdir()}
    assert folders == {v.source.removeprefix("models:/") for v in (teacher, second)}
    assert not (workspace / "mlartifacts" / mine).exists()
    assert (workspace / "mlartifacts" / teacher.run_id).exists()
    assert client.get_run(teacher.run_id).data.params == kept.data.params
    assert client.get_experiment(other).lifecycle_stage == "deleted"
    with pytest.raises(Exception, match="not found"):
        client.get_run(mine)
    assert names(collect(workspace)[0]) == set()


HOLD = """
import sys, time
from workflows.storage.workspace import Workspace
with Workspace(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_not_while_a_run_is_on(workspace):
    words = [sys.executable, "-c", HOLD, str(workspace)]
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use by another run"):
            collect(workspace)
    finally:
        other.kill()
        other.wait()
    assert any((workspace / "ray").iterdir())


def test_the_command_asks_and_yes_answers(workspace, capsys, monkeypatch):
    def command(*more):
        with open(os.devnull) as nobody, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", nobody)
            with pytest.raises(SystemExit) as caught:
                main(["gc", "--workspace", str(workspace), *more])
        shown = capsys.readouterr()
        assert caught.value.code == 0, shown.err
        return shown.out + shown.err

    assert "nothing was removed" in command()
    assert any((workspace / "ray").iterdir())
    command("--yes")
    assert not any((workspace / "ray").iterdir())


def test_a_workspace_in_an_object_store(left, workspace, moto_server, monkeypatch, tmp_path):
    """The same plan as of the same files in a folder, and what it names is gone from the store."""
    monkeypatch.setenv("MMDISTILL_CACHE", str(tmp_path / "cache"))
    use(monkeypatch, moto_server)
    place = bucket(moto_server, "gc-runs") + "/runs"
    other = shutil.copytree(next((workspace / "stages").glob("report-*")), workspace / "stages" / f"report-{'0' * 12}")
    publish(workspace, place, skip=lambda name: name.startswith("mlflow") or name == ".lock")
    expected, _ = collect(workspace, agree=False)
    plan, _ = collect(place, agree=False)
    assert {(i.what, i.bytes, i.why) for i in plan.items} == {(i.what, i.bytes, i.why) for i in expected.items}
    assert f"stages/{Path(other).name}" in names(plan)
    before = set(listing(place))
    plan, _ = collect(place)
    gone = before - set(listing(place))
    assert gone == {name for name in before if any(name.startswith(f"{what}/") for what in names(plan))}
    assert not any(name.startswith("ray/") for name in listing(place))
    assert names(collect(place)[0]) == set()
    with pytest.raises(UserError, match="not a workspace"):
        collect(place.replace("/runs", "/nothing"))


def test_young_objects_stay(left, moto_server, monkeypatch, tmp_path):
    monkeypatch.setenv("MMDISTILL_CACHE", str(tmp_path / "cache"))
    use(monkeypatch, moto_server)
    place = bucket(moto_server, "gc-young") + "/runs"
    publish(left, place, skip=lambda name: name.startswith("mlflow") or name == ".lock")
    assert names(collect(place, agree=False)[0])
    assert names(collect(place, agree=False, keep_days=1)[0]) == set()


def test_a_folder_that_is_no_workspace_is_left_alone(tmp_path):
    with pytest.raises(UserError, match="not a workspace"):
        collect(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_no_reason_not_to(workspace, monkeypatch):
    from workflows.storage import workspace as module

    monkeypatch.setattr(module, "MINIMUM_FREE", 10**18)
    assert collect(workspace)[0].items


def test_what_is_not_in_the_workspace_is_not_removed(workspace, tmp_path):
    with pytest.raises(UserError, match="not in the workspace"):
        Workspace(workspace).remove(tmp_path)
    assert tmp_path.exists()
