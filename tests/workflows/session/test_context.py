"""A stage's metrics: a row that is logged on two machines is stored once, and a line that was cut short damages no other."""

from types import SimpleNamespace

import pytest

from workflows.session.metrics import read_metrics
from workflows.session.stage import StageRun
from workflows.storage.workspace import Workspace
from workflows.tracking.tracker import Tracker
from workflows.training import worker


@pytest.fixture
def tracker(tmp_path):
    return Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", artifacts=tmp_path / "artifacts")


def stage(tracker, workspace, began=False):
    context = SimpleNamespace(tracker=tracker, parent_run=None)
    return StageRun(context, Workspace(workspace).stage("teacher", "key"), {"a": 1}, began=began)


def test_rows_of_a_checkpoint_are_tracked_once_though_the_store_could_not_be_asked(tmp_path, tracker, monkeypatch):
    """Another machine goes on while the store is away: it can't know which rows the first one's outbox still holds."""
    monkeypatch.setattr(worker.time, "time", lambda: 1000.0)
    rows = [worker.timed({"n_images": n, "loss/x": 1 / n}) for n in (10.0, 20.0)]
    monkeypatch.undo()
    one = stage(tracker, tmp_path / "one")
    for row in rows:
        one.log(int(row["n_images"]), row)
    monkeypatch.setattr(tracker, "steps", lambda *_: set())
    runs = Workspace(tmp_path / "other").stage("teacher", "key").path / "runs.json"
    runs.write_text((one.path / "runs.json").read_text())
    other = stage(tracker, tmp_path / "other", began=True)
    assert other.run_id == one.run_id
    for row in rows:
        other.log(int(row["n_images"]), row)
    found = [(m.step, m.timestamp) for m in tracker.client.get_metric_history(one.run_id, "loss/x")]
    assert sorted(found) == [(10, 1_000_000), (20, 1_000_000)]
    assert read_metrics(other.path) == [(n, {"n_images": n, "loss/x": 1 / n}) for n in (10, 20)]
    assert "time" not in tracker.client.get_run(one.run_id).data.metrics


@pytest.mark.parametrize("when", ["before", "after"])
def test_who_is_killed_as_a_run_begins_leaves_one_run(tmp_path, tracker, monkeypatch, when):
    start = tracker.start_run

    def killed(*arguments, **options):
        if when == "after":
            start(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(tracker, "start_run", killed)
    with pytest.raises(KeyboardInterrupt):
        stage(tracker, tmp_path)
    monkeypatch.undo()
    stage(tracker, tmp_path, began=True)
    (run,) = tracker.client.search_runs([tracker.experiment])
    assert run.data.params == {"a": "1"}


@pytest.mark.parametrize("half", ['{"step": 5, "time": 1, "lo', '{"step": 5, "time": 1, "loss": 0.5}'])
def test_a_row_after_half_a_line_is_whole(tmp_path, tracker, half):
    run = stage(tracker, tmp_path)
    (run.path / "metrics.jsonl").write_text(half)
    for step in (10, 20):
        run.log(step, {"loss": 1.0})
    assert [step for step, _ in read_metrics(run.path)][-2:] == [10, 20]
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 3
