"""Tracking against a real MLflow server that is killed and started again, and through a proxy that spoils its answers."""

import io
import json
import re
import signal
import subprocess
import sys

import pytest
from rich.console import Console
from small import ROOT
from tracking_reads import history, log_steps, text_of

from workflows.errors import UserError
from workflows.rendering.screen import Screen
from workflows.tools.deliver import deliver
from workflows.tracking.tracker import Tracker, outbox_of


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_has_everything_once(tmp_path, opened, server, said):
    tracker = opened(server.uri)
    run = tracker.start_run("before", tags={"mmdistill.stage": "teacher"})
    assert len(run) == 32
    log_steps(tracker, run, range(100))
    server.kill()

    file, folder = tmp_path / "grid.txt", tmp_path / "model"
    file.write_text("as it was")
    folder.mkdir()
    (folder / "model.json").write_text("{}")
    log_steps(tracker, run, range(100, 200))
    tracker.log_artifact(run, file, "grids")
    tracker.log_artifact(run, folder, "model")
    file.unlink()
    (folder / "model.json").write_text("another")
    tracker.log_params(run, {"teacher": {"batch": 8}})
    tracker.set_tags(run, {"late": "yes"})
    tracker.end_run(run)
    during = tracker.start_run("during", parent=run)
    assert during.startswith("queued-")
    log_steps(tracker, during, range(10))
    tracker.log_text(during, "text", "notes/config.yaml")
    grandchild = tracker.start_run("grandchild", parent=during)
    tracker.end_run(during, "KILLED")
    assert not tracker.settle(1)
    assert tracker.away

    server.start()
    assert tracker.settle(60)
    assert history(tracker, run, "loss") == [(step, step / 7) for step in range(200)]
    assert len(history(tracker, run, "nan")) == len(history(tracker, run, "lr_at_k")) == 200
    assert text_of(tracker, run, "grids/grid.txt", tmp_path) == "as it was"
    assert text_of(tracker, run, "model/model.json", tmp_path) == "{}"
    had = tracker.client.get_run(run)
    assert had.info.status == "FINISHED"
    assert had.data.params == {"teacher.batch": "8"}
    assert had.data.tags["late"] == "yes"
    child = tracker.client.get_run(tracker.resolve(during))
    assert (child.info.run_name, child.info.status) == ("during", "KILLED")
    assert child.data.tags["mlflow.parentRunId"] == run
    assert history(tracker, during, "loss") == [(step, step / 7) for step in range(10)]
    assert text_of(tracker, during, "notes/config.yaml", tmp_path) == "text"
    last = tracker.client.get_run(tracker.resolve(grandchild))
    assert last.data.tags["mlflow.parentRunId"] == child.info.run_id
    assert len(said) == 2
    # Refused or reset; or, of a request that was under way, closed.
    assert re.search(rf"{server.uri} does not answer \((Connection re|Remote end closed connection)", said[0])
    assert "everything that was queued was delivered" in said[1]
    assert not list(outbox_of(tmp_path / "outbox", server.uri).glob("files/*"))


@pytest.mark.parametrize("path", ["runs/create", "runs/log-batch", "artifacts", "runs/update"])
def test_a_server_that_dies_between_taking_and_answering(tmp_path, opened, proxy, path):
    """All is taken, the answer is lost, and it is sent again: three times, but for the run, which is found the second time."""
    lost = []

    def cut(asked):
        if path in asked and len(lost) < 3:
            lost.append(asked)
            return True
        return False

    tracker = opened(proxy.uri)
    proxy.cut = cut
    run = tracker.start_run(f"cut {path}", tags={"cut": path})
    log_steps(tracker, run, range(40))
    tracker.log_text(run, "text", "notes.txt")
    tracker.end_run(run)
    assert tracker.settle(60)
    assert len(lost) == (1 if path == "runs/create" else 3)
    assert history(tracker, run, "loss") == [(step, step / 7) for step in range(40)]
    assert text_of(tracker, run, "notes.txt", tmp_path) == "text"
    runs = tracker.client.search_runs([tracker.experiment], f"tags.cut = '{path}'")
    assert [r.info.run_id for r in runs] == [tracker.resolve(run)]
    assert runs[0].info.status == "FINISHED"


def test_retries_of_mlflows_own_make_no_second_run(opened, proxy, monkeypatch):
    """MLflow sends a request again itself when the connection is cut, the creation of a run as well."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    lost = []
    tracker = opened(proxy.uri)
    proxy.cut = lambda path: "runs/create" in path and len(lost) < 1 and not lost.append(path)
    run = tracker.start_run("twice", tags={"cut": "twice"})
    assert tracker.settle(60)
    assert len(lost) == 1
    assert sum("runs/create" in path for _, path, _ in proxy.seen) == 2
    runs = tracker.client.search_runs([tracker.experiment], "tags.cut = 'twice'")
    assert [r.info.run_id for r in runs] == [tracker.resolve(run)]


@pytest.mark.parametrize("status", [404, 408, 429, 500, 502, 503, 504])
def test_answers_that_mean_later(opened, proxy, status):
    tracker = opened(proxy.uri)
    run = tracker.start_run("later")
    assert tracker.settle(20)
    proxy.status = status
    log_steps(tracker, run, range(3))
    assert not tracker.settle(0.3)
    assert tracker.away
    proxy.status = None
    assert tracker.settle(20)
    assert len(history(tracker, run, "loss")) == 3


def test_an_answer_that_does_not_come_means_later(opened, proxy, monkeypatch):
    tracker = opened(proxy.uri)
    run = tracker.start_run("slow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    proxy.delay = 3
    log_steps(tracker, run, range(3))
    assert not tracker.settle(1.5)
    assert tracker.away
    proxy.delay = 0
    assert tracker.settle(30)
    assert history(tracker, run, "loss") == [(step, step / 7) for step in range(3)]


@pytest.mark.parametrize("status", [401, 403])
def test_wrong_credentials_are_raised_and_what_was_logged_is_kept(tmp_path, opened, proxy, status):
    tracker = opened(proxy.uri)
    run = tracker.start_run("denied")
    assert tracker.settle(20)
    proxy.status = status
    log_steps(tracker, run, range(1))
    with pytest.raises(UserError, match=f"tracking: {proxy.uri} failed: .*{status}"):
        tracker.settle(20)
    with pytest.raises(UserError):
        log_steps(tracker, run, range(1, 2))
    with pytest.raises(UserError):
        tracker.start_run("another")
    tracker.close()
    with pytest.raises(UserError):
        opened(proxy.uri)
    proxy.status = None
    again = opened(proxy.uri)
    assert again.settle(20)
    assert len(history(again, run, "loss")) == 2


def test_a_bad_request_is_raised_and_holds_up_nothing(opened, server):
    tracker = opened(server.uri)
    run, deleted = tracker.start_run("bad"), tracker.start_run("deleted")
    tracker.client.delete_run(deleted)
    log_steps(tracker, deleted, range(1))
    with pytest.raises(UserError, match=r"failed: .*must be in the 'active' state"):
        tracker.settle(20)
    with pytest.raises(UserError):
        log_steps(tracker, run, range(1))
    tracker.close()
    again = opened(server.uri)
    assert again.settle(20)
    assert len(history(again, run, "loss")) == 1
    assert not again.resume_run(deleted)
    assert again.resume_run(run)
    assert not again.resume_run("queued-" + "0" * 32)


def test_at_the_start_a_server_that_does_not_answer_is_a_line(tmp_path, opened, proxy):
    proxy.gone = True
    with pytest.raises(UserError, match=f"tracking: {proxy.uri} failed: ") as caught:
        opened(proxy.uri)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "outbox").exists()


def test_a_run_that_another_machine_queued_and_delivered_is_found_by_its_own_id(tmp_path):
    """Its folder in the bucket names the run by that id, and the note of what it became stayed with the other machine's outbox."""
    store, own = f"sqlite:///{tmp_path / 'store.db'}", "queued-" + "1" * 32
    first = Tracker(store, artifacts=tmp_path, outbox=tmp_path / "one")
    first._put({"kind": "run", "run": own, "parent": None, "tags": {"x": "y"}, "time": 1})
    assert first.settle(20)
    known = first.resolve(own)
    for outbox_ in (tmp_path / "other", None):
        other = Tracker(store, outbox=outbox_)
        assert other.has(own)
        assert other.resolve(own) == known
        assert other.resume_run(own)
        assert not other.has("queued-" + "2" * 32)
        other.close()
    first.client.delete_run(known)
    assert not Tracker(store).resume_run(own)
    first.close()


@pytest.mark.parametrize(
    "uri",
    ["postgresql://u:PLANTED@h:port/db", "http://[bad", "postgresql+nope://u:PLANTED@h/db", "postgresql:/u:PLANTED@h/db:",
     "mysql+nothing://u:PLANTED@h/db", "ftp://h/x", "nonsense", "http://u:PLANTED@h:port"],
)  # fmt: skip
def test_an_address_that_is_none_is_a_line(uri):
    with pytest.raises(UserError) as caught:
        Tracker(uri)
    told = f"{caught.value} {caught.value.hint}"
    assert "\n" not in told
    assert "PLANTED" not in told
    assert "is back" not in told


def test_a_database_without_its_driver_is_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UserError, match=r"not the address of a store: .*psycopg2"):
        Tracker("postgresql+psycopg2://h/db")


def test_of_a_store_that_is_away_it_is_said_that_it_may_come_back(proxy, monkeypatch):
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)
    proxy.gone = True
    with pytest.raises(UserError) as caught:
        Tracker(proxy.uri)
    assert "when the store is back" in caught.value.hint
    with pytest.raises(UserError, match="refused") as caught:
        Tracker("postgresql+psycopg2://u:pw@127.0.0.1:9/db")
    assert "when the store is back" in caught.value.hint


CHILD = """
import sys
from pathlib import Path
from workflows.registry.versions import Registry
from workflows.tracking.tracker import Tracker
uri, folder = sys.argv[1], Path(sys.argv[2])
tracker = Tracker(uri, outbox=folder / "outbox", artifacts=folder / "artifacts")
run = tracker.start_run("parent")
tracker.log_metrics(run, [(0, {"loss": 0.0})])
assert tracker.settle(20)
print(run, flush=True)
sys.stdin.readline()
child = tracker.start_run("child", parent=run)
for step in range(1, 50):
    tracker.log_metrics(run, [(step, {"loss": float(step)})])
    tracker.log_metrics(child, [(step, {"loss": float(step)})])
tracker.log_text(child, "text", "notes.txt")
print(child, flush=True)
sys.stdin.readline()
"""


def test_what_a_killed_driver_had_queued_is_delivered_by_the_next(tmp_path, opened, proxy):
    words = [sys.executable, "-c", CHILD, proxy.uri, str(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    run = process.stdout.readline().strip()
    proxy.gone = True
    process.stdin.write("\n")
    process.stdin.flush()
    child = process.stdout.readline().strip()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert child.startswith("queued-")
    proxy.gone = False
    tracker = opened(proxy.uri)
    assert tracker.pending == 1 + 2 * 49 + 1
    assert tracker.resume_run(child)
    assert tracker.settle(30)
    assert history(tracker, run, "loss") == [(step, float(step)) for step in range(50)]
    assert history(tracker, child, "loss") == [(step, float(step)) for step in range(1, 50)]
    assert text_of(tracker, child, "notes.txt", tmp_path) == "text"
    assert len(tracker.client.search_runs([tracker.experiment], f"tags.`mlflow.parentRunId` = '{run}'")) == 1


def test_the_deliver_command(tmp_path, proxy, opened, monkeypatch):
    workspace = tmp_path / "workspace"
    tracker = Tracker(proxy.uri, outbox=workspace / "outbox")
    run = tracker.start_run("left")
    proxy.gone = True
    log_steps(tracker, run, range(5))
    tracker.close()
    monkeypatch.setenv("MMDISTILL_TRACKING_WAIT", "0.5")

    def said(uri):
        shown = io.StringIO()
        done = deliver(workspace, uri, Screen(Console(file=shown, width=300)))
        return done, shown.getvalue()

    with pytest.raises(UserError, match=r"failed: "):
        said(proxy.uri)
    proxy.gone = False
    proxy.cut = lambda path: "log-batch" in path
    done, text = said(proxy.uri)
    assert not done
    assert "5 entries for" in text
    done, text = said(None)
    assert done
    assert f"5 entries are queued for {proxy.uri}" in text
    proxy.cut = lambda path: False
    assert said(proxy.uri) == (True, f"tracking: 5 entries were delivered to {proxy.uri}\n")
    assert "nothing is queued" in said(proxy.uri)[1]
    assert len(history(opened(proxy.uri), run, "loss")) == 5


def test_what_a_store_refuses_is_not_said_to_be_delivered(tmp_path):
    uri, workspace = f"sqlite:///{tmp_path}/store.db", tmp_path / "workspace"
    tracker = Tracker(uri, outbox=workspace / "outbox", artifacts=tmp_path / "artifacts")
    run, deleted = tracker.start_run("good"), tracker.start_run("bad")
    tracker.client.delete_run(deleted)
    tracker.close()
    rows = [{"n": n, "kind": "tags", "run": run_id, "tags": {"a": "b"}} for n, run_id in ((3, run), (4, deleted))]
    (tracker._folder / "journal.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shown = io.StringIO()
    assert not deliver(workspace, uri, Screen(Console(file=shown, width=400)))
    assert "1 entries were delivered to" in shown.getvalue()
    assert "1 entries were refused, and are kept in" in shown.getvalue()
    assert deliver(workspace, uri, Screen(Console(file=shown, width=400)))
