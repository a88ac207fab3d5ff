"""Other programs' reasons, in a line of ours."""

import pytest
import typer

from workflows.cli.main import main
from workflows.cli.options import errors
from workflows.errors import UserError, in_a_line
from workflows.tracking.delivery import brief
from workflows.tracking.tracker import Tracker
from workflows.training.worker import root_cause

DIED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed by "
    "the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly due to "
    "SIGSEGV or another unexpected error."
)


def test_of_a_killed_worker_whole_sentences_are_told():
    told = root_cause(RuntimeError(f"The actor died.\n\tclass_name: RayTrainWorker\n\x1b[33m{DIED}\x1b[0m"))
    assert told == DIED.partition(" Some common")[0]


@pytest.mark.parametrize(
    ("text", "most", "told"),
    [
        ("short", 10, "short"),
        ("two\n  lines\x1b[0m", 20, "two lines"),
        ("One. Two. Three.", 11, "One. Two."),
        ("a sentence without an end (such as", 20, "a sentence..."),
        ("v1.2 is not. A sentence.", 13, "v1.2 is not."),
        ("x" * 40, 10, "x" * 7 + "..."),
    ],
)
def test_no_word_is_cut(text, most, told):
    assert in_a_line(text, most) == told
    assert len(told) <= most


def raised(kind):
    from mlflow.exceptions import MlflowException
    from ray import exceptions

    task = exceptions.RayTaskError("body", "Traceback", UserError("of ours", hint="so"))
    return {
        "OutOfMemoryError": exceptions.OutOfMemoryError("Task was killed. " + "More. " * 100),
        "NodeDiedError": exceptions.NodeDiedError("its node\nis gone"),
        "WorkerCrashedError": exceptions.WorkerCrashedError(),
        "GetTimeoutError": exceptions.GetTimeoutError("Get timed out"),
        "MlflowException": MlflowException("BAD_REQUEST: no"),
        "ConnectionError": ConnectionError("Ray is gone"),
        "of a task": task.as_instanceof_cause(),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("OutOfMemoryError", "a process was ended, as its machine ran out of memory (Task was killed. More."),
        ("NodeDiedError", "a process or a machine of the cluster was lost (its node is gone)"),
        ("WorkerCrashedError", "a process or a machine of the cluster was lost (The worker died"),
        ("GetTimeoutError", "the cluster did not answer in time (Get timed out)"),
        ("MlflowException", "the tracking store refuses (BAD_REQUEST: no)"),
        ("ConnectionError", "a connection was lost (Ray is gone)"),
        ("of a task", "of ours"),
    ],
)
def test_errors_of_rays_and_mlflows_are_a_line_by_kind(kind, said, capsys):
    error = raised(kind)
    with pytest.raises(typer.Exit) as caught, errors(debug=False):
        raise error
    assert caught.value.exit_code == 1
    first, hint = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {said}")
    assert hint.startswith("       ")
    with pytest.raises(type(error)), errors(debug=True):
        raise error


def test_our_own_faults_are_shown_whole():
    from ray.exceptions import RayTaskError

    ours = RayTaskError("body", "Traceback", ZeroDivisionError("x")).as_instanceof_cause()
    for error in (ZeroDivisionError("x"), ours, typer.BadParameter("x"), typer.Exit(3)):
        with pytest.raises(type(error)) as caught, errors(debug=False):
            raise error
        assert caught.value is error


def test_a_schema_that_is_out_of_date_is_told_with_its_command(tmp_path):
    """MLflow's own error, of a store that an older one made."""
    import sqlite3
    from contextlib import closing

    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.tracking import sqlalchemy_store  # noqa: F401  whose tables are known then

    from workflows.tracking.tracker import Tracker

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store, store:
        for table in {*Base.metadata.tables, "alembic_version"}:
            store.execute(f"create table {table} (version_num text)")
        store.execute("insert into alembic_version values ('451aebb31d03')")
    with pytest.raises(UserError) as caught:
        Tracker(uri, read_only=True)
    assert "out-of-date database schema" in str(caught.value)
    assert "mlflow db upgrade" in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_damaged_store_is_not_one_that_is_away(tmp_path):
    """There is nothing to wait for."""
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="file is not a database") as caught:
        Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", read_only=True)
    assert "when that is fixed" in caught.value.hint


def test_what_the_disk_says_is_a_line(tmp_path, capsys):
    """Of a name that is too long here, or of too many open files."""
    with pytest.raises(SystemExit) as caught:
        main(["sample", "x" * 300, "--out", str(tmp_path / "x.png")])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {'x' * 300}/model.json: File name too long")


def test_a_page_is_not_told_whole():
    assert len(brief(RuntimeError("<html>" + "word " * 1000))) <= 500


def test_of_an_error_within_an_error_the_inner_one_is_told():
    """As requests and urllib3 tell of a connection that was closed in the middle of a request."""
    from http.client import RemoteDisconnected

    import requests
    from urllib3.exceptions import ProtocolError

    closed = ProtocolError("Connection aborted.", RemoteDisconnected("Remote end closed connection without response"))
    assert brief(requests.ConnectionError(closed)) == "Remote end closed connection without response"
