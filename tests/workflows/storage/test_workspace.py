"""The workspace: whole files, one run at a time, keys that follow the code."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workflows.cli.main import main
from workflows.errors import ConfigError, UserError
from workflows.registry.lineage import open_registry
from workflows.session.metrics import read_metrics
from workflows.storage import workspace as module
from workflows.storage.code import closure, code_version
from workflows.storage.workspace import Workspace, explain_os_error
from workflows.tracking import tracker as tracking
from workflows.tracking.tracker import Tracker


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        Workspace(tmp_path / "file" / "below")
    assert "--workspace" in caught.value.hint


def test_too_little_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MINIMUM_FREE", 10**18)
    with pytest.raises(UserError, match=rf"free on the disk of .*, {10**18 // 2**20} MB are needed"):
        Workspace(tmp_path)
    with pytest.raises(UserError, match=rf"{10**17 // 2**20} MB are needed"):
        Workspace(tmp_path, minimum_free=10**17)


ODD = "w%20 x?y[v2]#c;d&e=f'g\"h~ü"


def test_a_folder_of_any_name_has_its_tracking_store_in_it(tmp_path):
    """And leaves nothing beside it: its address is MLflow's, which quotes."""
    from mlflow.store.db.utils import create_sqlalchemy_engine_with_retry
    from sqlalchemy import text

    for name in (ODD, "plain name"):
        space = Workspace(tmp_path / name)
        engine = create_sqlalchemy_engine_with_retry(space.default_tracking_uri)
        with engine.begin() as connection:
            connection.execute(text("create table t (x int)"))
        engine.dispose()
        assert (space.root / "mlflow.db").stat().st_size
        assert tracking._file(space.default_tracking_uri) == space.root / "mlflow.db"
    assert {path.name for path in tmp_path.iterdir()} == {ODD, "plain name"}
    assert space.default_tracking_uri == f"sqlite:///{tmp_path}/plain name/mlflow.db"


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\x1b[31mb", "a\udcffb"])
def test_a_name_that_cannot_be_shown_is_refused_at_the_start(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder name"):
        Workspace(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a?b", "a#b", "runs[v2]", "a*"])
def test_a_prefix_that_would_lead_elsewhere_is_refused_before_the_store_is_asked(name):
    for read_only in (True, False):
        with pytest.raises(ConfigError, match="a prefix in an object store can't have"):
            Workspace(f"s3://bucket/{name}", read_only=read_only)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s3:/bucket/runs", "lacks a slash"),
        ("file:/runs", "lacks a slash"),
        ("s3://", "names no bucket"),
        ("s3:///runs", "names no bucket"),
        ("gs://bucket/runs", "should be a folder, or s3://BUCKET/PREFIX"),
        ("ftp://host/runs", "should be a folder, or s3://BUCKET/PREFIX"),
        ("~nobody-of-that-name/runs", "there is no such home"),
    ],
)
def test_a_place_that_is_none_is_refused_and_nothing_is_made(tmp_path, monkeypatch, place, said):
    monkeypatch.chdir(tmp_path)
    for read_only in (True, False):
        with pytest.raises(ConfigError, match=said):
            Workspace(place, read_only=read_only)
    assert not list(tmp_path.iterdir())


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises((ConfigError, UserError), match=r"links form a loop|cannot be written"):
        Workspace(tmp_path / "link")


def test_all_commands_mean_the_same_place(tmp_path, monkeypatch, capsys):
    """With ~ and by file:// too, as `run` does."""
    Workspace(tmp_path / "w")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("~/w", f"file://{tmp_path}/w"):
        with pytest.raises(SystemExit) as caught:
            main(["gc", "--workspace", place])
        assert caught.value.code == 0, capsys.readouterr().err
    Tracker(Workspace(tmp_path / "w").default_tracking_uri)
    assert open_registry("~/w", None).names() == open_registry(f"file://{tmp_path}/w", None).names() == []


def test_a_stage_is_done_when_its_result_is_there(tmp_path):
    folder = Workspace(tmp_path).stage("teacher", "abc")
    assert folder.result is None
    (folder.path / "result.json").write_text('{"half": ')
    assert folder.result is None
    folder.finish({"identity": "x"})
    assert folder.result == {"identity": "x"}


def test_discard_forgets_outputs_and_checkpoints(tmp_path):
    space = Workspace(tmp_path)
    folder = space.stage("teacher", "abc")
    folder.finish({"identity": "x"})
    checkpoints = Path(space.training_storage) / "teacher-abc"
    checkpoints.mkdir()
    space.discard(folder)
    assert folder.result is None
    assert folder.path.is_dir()
    assert not checkpoints.exists()


HOLD = """
import sys, time
from workflows.storage.workspace import Workspace
with Workspace(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_run_at_a_time_and_a_killed_one_frees_it(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by another run .process {other.pid}"), Workspace(tmp_path).lock():
        pass
    other.kill()
    other.wait()
    with Workspace(tmp_path).lock():
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [(1, {"loss": 2.0})]
    assert read_metrics(tmp_path / "none") == []


def test_keys_follow_the_code_that_matters(tmp_path):
    assert code_version("mmdistill_core/diffusion") != code_version("mmdistill_core/engine")
    assert len(code_version("workflows/stages/teacher.py")) == 12


TYPES = """
import typing
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import typed.types_only
else:
    import typed.otherwise
if not TYPE_CHECKING:
    import typed.runs
else:
    import typed.types_only_too
if typing.TYPE_CHECKING:
    from typed import types_only
def late():
    if not typing.TYPE_CHECKING:
        import typed.runs_late
"""


def test_imports_for_types_alone_change_no_key(tmp_path, monkeypatch):
    """And the branch that runs does, be it that of `not TYPE_CHECKING` or the else of the other."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "typed").mkdir()
    for name in ("__init__", "types_only", "types_only_too", "otherwise", "runs", "runs_late"):
        (tmp_path / "typed" / f"{name}.py").write_text("")
    (tmp_path / "typed" / "start.py").write_text(TYPES)
    assert set(closure("typed.start")) == {f"typed.{name}" for name in ("start", "otherwise", "runs", "runs_late")}


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "cannot be written")])
def test_the_systems_errors_are_explained(tmp_path, number, said):
    explained = explain_os_error(OSError(number, "no", "file"), tmp_path)
    assert said in str(explained)
    assert f"the last checkpoints in {tmp_path} are kept" in str(explained)
    assert explain_os_error(OSError(errno.ECHILD, "no"), tmp_path) is None
    assert "kept" not in str(explain_os_error(OSError(number, "no", "file"))), "of a command without a workspace"


def test_a_run_on_a_full_disk_names_its_workspace(tmp_path):
    """/dev/full is one, for real."""
    space = Workspace(tmp_path / "mine")
    with (
        pytest.raises(UserError, match=f"the disk is full .{space.uri}.; .* in {space.uri} are kept"),
        space.explained(),
        open("/dev/full", "w") as file,
    ):
        file.write("x")
    with pytest.raises(FileNotFoundError), space.explained():
        (tmp_path / "nothing").read_text()
