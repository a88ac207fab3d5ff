"""doctor looks, and makes nothing: of the tracking store, whose address it says where it has from."""

import os

import pytest
from servers import PostgreSQL

from workflows.tools.doctor import _object_store, _tracking, _workspace
from workflows.tracking.tracker import Tracker, origin, store_exists


def line(workspace, uri=None):
    (found,) = _tracking(str(workspace), uri)
    return found[0], found[2]


def test_a_store_that_is_not_there_is_not_made(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    fine, said = line(tmp_path / "w")
    assert fine is None
    assert said.endswith("mlflow.db: does not exist yet; the first run creates it")
    (tmp_path / "empty.db").touch()
    for name in ("none.db", "empty.db"):
        fine, said = line(tmp_path / "w", f"sqlite:///{tmp_path}/{name}")
        assert fine is False
        assert "the file does not exist, or is empty; name the store with --tracking-uri" in said
    assert (tmp_path / "empty.db").stat().st_size == 0
    assert not list(tmp_path.rglob("*mlflow*"))
    assert not (tmp_path / "none.db").exists()


def test_a_wrong_variable_or_name_is_a_line(monkeypatch):
    monkeypatch.setenv("MMDISTILL_S3_ADDRESSING", "sideways")
    assert list(_object_store()) == [
        (False, "object store", "MMDISTILL_S3_ADDRESSING: 'sideways' is not one of auto, path, virtual")
    ]
    ((fine, _, said),) = _workspace("s3:/bucket/runs")
    assert fine is False
    assert said.endswith("lacks a slash: write s3://BUCKET/PREFIX or file:///FOLDER")


def test_in_one_that_is_there_no_experiment_is_made(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    uri = f"sqlite:///{tmp_path}/store.db"
    other = Tracker(uri, artifacts=tmp_path / "artifacts", experiment="other")
    before = (tmp_path / "store.db").read_bytes()
    assert line(tmp_path / "w", uri) == (True, f"{uri} answers")
    assert {e.name for e in other.client.search_experiments()} == {"Default", "other"}
    assert (tmp_path / "store.db").read_bytes() == before


def test_where_an_address_comes_from_is_said(tmp_path, monkeypatch):
    """It may be in the environment by accident."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:secret@127.0.0.1:9")
    fine, said = line(tmp_path)
    assert fine is False
    assert said.startswith("tracking: http://127.0.0.1:9 (of MLFLOW_TRACKING_URI) failed: ")
    assert "secret" not in said
    _, said = line(tmp_path, "http://127.0.0.1:8")
    assert said.startswith("tracking: http://127.0.0.1:8 failed: ")
    assert origin("http://127.0.0.1:8") == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense")
    assert "nonsense (of MLFLOW_TRACKING_URI)" in line(tmp_path)[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+nope://host/db")
    assert "postgresql+nope://host/db (of MLFLOW_TRACKING_URI) is not the address of a store" in line(tmp_path)[1]


@pytest.mark.services
def test_an_empty_database_stays_empty(tmp_path):
    """MLflow's client would write its tables to it."""
    from sqlalchemy import create_engine, inspect

    database = PostgreSQL()
    try:
        assert not store_exists(database.uri)
        fine, said = line(tmp_path, database.uri)
        assert fine is False
        assert "the database has no MLflow tables" in said
        engine = create_engine(database.uri)
        assert inspect(engine).get_table_names() == []
        engine.dispose()
        assert os.environ.get("MLFLOW_TRACKING_URI", "") == ""
    finally:
        database.close()
