"""A finished stage is used again only as it was made: its files by their hashes, its runs if the tracking store has them."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console
from stores import bucket, use
from tracking_reads import history

from workflows.errors import UserError
from workflows.rendering.screen import Screen
from workflows.session.context import Done
from workflows.session.stage import open_stage, run_stage
from workflows.storage import store as storage
from workflows.storage.integrity import check_model, damage, files_of
from workflows.storage.workspace import Workspace
from workflows.tools.gc import make_plan
from workflows.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def tracker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return Tracker(f"sqlite:///{folder / 'mlflow.db'}", artifacts=folder / "artifacts")


def context_in(workspace, tracker, *force):
    screen = Screen(Console(file=io.StringIO(), width=200))
    return SimpleNamespace(
        workspace=Workspace(workspace),
        tracker=tracker,
        pipeline="p",
        force=frozenset(force),
        screen=screen,
        parent_run=None,
    )


def stage(context, made=None, **more):
    """A stage that writes a model and two kinds of metrics, or is there."""

    def body(run):
        (run.path / "model").mkdir()
        (run.path / "model" / "weights.safetensors").write_bytes(b"weights")
        (run.path / "data" / "shards").mkdir(parents=True)
        (run.path / "data" / "shards" / "0.parquet").write_bytes(b"of which the manifest has the hash")
        run.log(10, {"loss": 0.5})
        run.log_at(4, {"frechet": 0.25})
        if made is not None:
            made.append(run)
        return {"identity": "i", "artifacts": ["model"]}

    return run_stage(context, "teacher", depends={"a": 1}, params={"a": 1}, body=body, **more)


def weights_of(done):
    return done.folder / "model" / "weights.safetensors"


def test_what_is_written_down_of_a_stage(tmp_path, tracker):
    done = stage(context_in(tmp_path, tracker))
    files = json.loads((done.folder / "result.json").read_text())["files"]
    assert files["model/weights.safetensors"]["bytes"] == 7
    assert not {"result.json", "runs.json", "depends.json", "clock.json", "metrics.jsonl"} & set(files)
    assert not any(name.startswith("data/shards") for name in files)
    assert stage(context_in(tmp_path, tracker)).reused


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has 0 bytes, and had 7 when it was made"),
        (b"weigh", "has 5 bytes, and had 7"),
        (b"Weights", "has other content than when it was made"),
        (None, "is gone"),
    ],
)
def test_weights_that_are_others_are_not_used(tmp_path, tracker, content, said):
    path = weights_of(stage(context_in(tmp_path, tracker)))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^teacher: {path} {said}") as caught:
        stage(context_in(tmp_path, tracker))
    assert "--force teacher" in caught.value.hint
    with pytest.raises(UserError, match=f"^teacher: {path} {said}"):
        check_model(path.parent)
    again = stage(context_in(tmp_path, tracker, "teacher"))
    assert not again.reused
    assert path.read_bytes() == b"weights"
    assert check_model(path.parent) == path.parent


def test_a_model_of_no_stage_is_taken_as_it_is(tmp_path):
    for text in (None, "[]", '{"files": {"other/x": {"bytes": 1, "sha256": "0"}}}', "{"):
        if text:
            (tmp_path / "result.json").write_text(text)
        assert check_model(tmp_path / "model") == tmp_path / "model"


def test_a_stage_of_before_hashes_were_written_down_is_used(tmp_path, tracker):
    done = stage(context_in(tmp_path, tracker))
    result = json.loads((done.folder / "result.json").read_text())
    del result["files"]
    (done.folder / "result.json").write_text(json.dumps(result))
    assert stage(context_in(tmp_path, tracker)).reused


def test_a_damaged_copy_of_what_a_store_has_is_fetched_again(tmp_path, tracker, moto_server, monkeypatch):
    use(monkeypatch, moto_server, MMDISTILL_CACHE=str(tmp_path / "cache"))
    place = bucket(moto_server, "intact") + "/runs"
    path = weights_of(stage(context_in(place, tracker)))
    path.write_bytes(b"")
    assert stage(context_in(place, tracker)).reused
    assert path.read_bytes() == b"weights"
    storage.write(f"{place}/stages/{path.parents[1].name}/model/weights.safetensors", b"Weights")
    path.write_bytes(b"")
    with pytest.raises(UserError, match="has other content"):
        stage(context_in(place, tracker))


def test_a_store_that_was_made_anew_gets_the_runs_of_stages_that_are_reused(tmp_path, tracker):
    """Its runs are gone, as with its file; or one was deleted. What the stage had logged is in the new one."""
    first = stage(context_in(tmp_path, tracker)).run_id
    tracker.client.delete_run(first)
    second = stage(context_in(tmp_path, tracker))
    assert second.reused
    assert second.run_id != first
    runs = second.folder / "runs.json"
    runs.write_text(json.dumps({tracker.uri: "0" * 32}))
    third = stage(context_in(tmp_path, tracker))
    assert third.reused
    for done in (second, third):
        assert history(tracker, done.run_id, "loss") == [(10, 0.5)]
        assert history(tracker, done.run_id, "frechet") == [(4, 0.25)]
        assert [f.path for f in tracker.client.list_artifacts(done.run_id)] == ["model"]
    assert stage(context_in(tmp_path, tracker)).run_id == third.run_id


def test_a_stage_is_done_again_where_what_it_made_elsewhere_is_gone(tmp_path, tracker):
    made = []
    stage(context_in(tmp_path, tracker), made)
    context = context_in(tmp_path, tracker)
    assert stage(context, made, missing=lambda result: None).reused
    assert not stage(context, made, missing=lambda result: f"{result['identity']} is nowhere").reused
    assert len(made) == 2
    assert "teacher: i is nowhere: the stage runs again" in context.screen.console.file.getvalue()
    assert isinstance(open_stage(context, "teacher", depends={"a": 1}, params={}), Done)


def test_the_first_damage_is_told_and_sizes_come_first(tmp_path):
    for name in ("a", "b/c", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = files_of(tmp_path, skip=lambda name: False)
    assert list(files) == ["a", "b/c"]
    assert damage(tmp_path, files) is None
    (tmp_path / "a").write_text("A")
    (tmp_path / "b" / "c").write_text("")
    assert damage(tmp_path, files).startswith(f"{tmp_path / 'b' / 'c'} has 0 bytes")
    (tmp_path / "b" / "c").write_text("b/c")
    assert damage(tmp_path, files).startswith(f"{tmp_path / 'a'} has other content")


@pytest.mark.parametrize(
    "content", ["", '{"run_id": "1", "sta', "[1]", '{"stages": [1]}', '{"stages": null}', b"\xff\xfe"]
)
def test_a_damaged_record_of_a_configuration_costs_no_stage(tmp_path, tracker, content):
    """Which stages it refers to can't be read, so that gc leaves all of them."""
    stage(context_in(tmp_path, tracker))
    assert make_plan(Workspace(tmp_path), None, None).items == []
    record = tmp_path / "pipelines" / "p.json"
    record.write_bytes(content if isinstance(content, bytes) else content.encode())
    plan = make_plan(Workspace(tmp_path), None, None)
    assert plan.items == []
    assert "or the record is damaged (p)" in plan.kept[0]


def test_a_result_of_another_format_damages_no_model(tmp_path, tracker):
    done = stage(context_in(tmp_path, tracker))
    for files in (5, {"model/weights.safetensors": 5}, {"model/weights.safetensors": {}}):
        (done.folder / "result.json").write_text(json.dumps({"identity": [1], "files": files}))
        assert check_model(done.folder / "model") == done.folder / "model"
        make_plan(Workspace(tmp_path), None, None)
