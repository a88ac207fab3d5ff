"""A teacher that is there already takes the place of a trained one."""

import json

import pytest
from small import Runner

pytestmark = pytest.mark.ray
SHORT = ["distill.k=[1]", "distill.images=1280", "distill.validate_every=1280"]


def stage(runner, name):
    (found,) = (runner.workspace / "stages").glob(f"{name}-*")
    return found


def test_a_folder_by_its_relative_path(finished, tmp_path, monkeypatch):
    """The run goes to its end from another folder than its workers'; the students are of this very teacher."""
    trained = stage(finished[0], "teacher")
    monkeypatch.chdir(trained.parent)
    runner = Runner(tmp_path / "workspace")
    summary = runner(*SHORT, f"teacher={trained.name}/model")
    assert f"{trained}/model, as it is" in runner.text
    taken = json.loads((stage(runner, "teacher") / "result.json").read_text())
    assert taken["identity"] == json.loads((trained / "result.json").read_text())["identity"]
    model = json.loads((stage(runner, "distill-k1") / "model/model.json").read_text())
    assert model["provenance"]["teacher"] == taken["identity"]
    assert [s["name"] for s in summary["stages"]][-1] == "report"
    assert summary["students"][0]["frechet"] > 0


def test_a_registered_version(finished, tmp_path):
    store = f"sqlite:///{finished[0].workspace}/mlflow.db"
    runner = Runner(tmp_path / "workspace")
    summary = runner(*SHORT, "teacher=models:/mmdistill-digits-teacher/1", until="distill", tracking_uri=store)
    assert "models:/mmdistill-digits-teacher/1, as it is" in runner.text
    assert [s["name"] for s in summary["stages"]] == ["prepare", "teacher", "distill-k1"]
