"""The whole pipeline, small: outputs, reuse, registry, lineage, report, samples."""

import io
import json
import shutil
import subprocess

import numpy as np
import pytest
from rich.console import Console
from small import Runner

from workflows.cli.main import main
from workflows.registry.versions import Registry
from workflows.rendering.screen import Screen
from workflows.stages.report import last_screen
from workflows.storage.workspace import Workspace
from workflows.tracking.tracker import Tracker

pytestmark = pytest.mark.ray
STAGES = ["prepare", "teacher", "distill-k1", "distill-k2", "evaluate", "register", "report"]


@pytest.fixture
def tracker(finished):
    space = Workspace(finished[0].workspace)
    return Tracker(space.default_tracking_uri, artifacts=space.default_artifacts)


def test_the_summary_has_what_it_promises(finished):
    runner, summary = finished
    assert [s["name"] for s in summary["stages"]] == STAGES
    assert not any(s["reused"] for s in summary["stages"])
    assert all(s["seconds"] > 0 and len(s["run_id"]) == 32 for s in summary["stages"])
    assert summary["recipe"] == "digits"
    assert summary["floor"] > 0
    table = json.loads(next((runner.workspace / "stages").glob("evaluate-*/table.json")).read_text())
    four = next(r for r in table["rows"] if (r["who"], r["sampler"], r["k"]) == ("teacher", "ancestral", 4))
    assert summary["teacher_longest"] == {"k": 4, "frechet": four["frechet"]["mean"]}
    for student, k in zip(summary["students"], (1, 2), strict=True):
        assert (student["k"], student["nfe"]) == (k, k)
        assert student["frechet"] > 0
        assert student["teacher_frechet_same_k"] > 0
        assert student["model_uri"] == f"models:/mmdistill-digits-student/{k}"
    on_disk = json.loads((runner.workspace / "reports/digits/summary.json").read_text())
    assert on_disk == summary


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_last_screen_names_the_teachers_longest_row_and_spreads_of_several_seeds(finished, seeds):
    shown = io.StringIO()
    screen = Screen(Console(file=shown, width=200, highlight=False))
    last_screen(finished[1] | {"seeds": seeds, "report": "there"}, screen, finished[0].workspace, None)
    text = shown.getvalue()
    assert "student / teacher" in text
    assert "at 4 steps" in text
    assert f"{seeds} seed{'s' * (seeds > 1)};" in text
    assert text.count(" ± ") == (2 if seeds > 1 else 0)


def test_a_second_run_reuses_everything_and_says_so(finished):
    runner, first = finished
    second = runner()
    assert all(s["reused"] for s in second["stages"])
    assert runner.text.count("reused") == len(STAGES)
    assert [s["run_id"] for s in second["stages"]] == [s["run_id"] for s in first["stages"]]
    assert second["students"] == first["students"]


def test_force_redoes_one_stage_and_the_same_outcome_leaves_the_rest(finished):
    runner, first = finished
    again = runner(force=("distill-k2",))
    reused = {s["name"]: s["reused"] for s in again["stages"]}
    assert reused == {name: name != "distill-k2" for name in STAGES}
    assert [s["frechet"] for s in again["students"]] == [s["frechet"] for s in first["students"]]


def test_another_setting_redoes_what_depends_on_it(finished):
    runner, _ = finished
    other = runner("evaluate.samples=110", until="evaluate")
    assert {s["name"]: s["reused"] for s in other["stages"]} == {
        "prepare": True,
        "teacher": True,
        "distill-k1": True,
        "distill-k2": True,
        "evaluate": False,
    }


def test_tracking_has_a_parent_and_a_child_for_each_stage(finished, tracker):
    _, summary = finished
    runs = tracker.client.search_runs([tracker.experiment], max_results=100)
    by_id = {r.info.run_id: r for r in runs}
    parents = {by_id[s["run_id"]].data.tags["mlflow.parentRunId"] for s in summary["stages"]}
    assert len(parents) == 1
    parent = by_id[parents.pop()]
    assert parent.info.status == "FINISHED"
    assert parent.data.params["distill.k"] == "[1, 2]"
    files = {f.path for f in tracker.client.list_artifacts(parent.info.run_id)}
    assert {"config.yaml", "report.html", "summary.json"} <= files
    teacher = by_id[summary["stages"][1]["run_id"]]
    assert teacher.data.params["teacher.batch"] == "128"
    assert teacher.data.metrics["n_images"] == 19200


def test_metrics_are_there_once_per_step(finished, tracker):
    _, summary = finished
    run_id = next(s["run_id"] for s in summary["stages"] if s["name"] == "distill-k2")
    for name in ("moment_gap", "loss/student", "grad_norm/auxiliary", "lr", "images_per_second", "forwards"):
        steps = [m.step for m in tracker.client.get_metric_history(run_id, name)]
        assert len(steps) == len(set(steps)) >= 4, name
    levels = [n for n in tracker.client.get_run(run_id).data.metrics if n.startswith("moment_gap/level")]
    assert len(levels) == 8


def test_registered_models_have_their_lineage(finished, tracker):
    _, summary = finished
    registry = Registry(tracker)
    for student in summary["students"]:
        name, version = student["model_uri"].removeprefix("models:/").split("/")
        tags = registry.version(name, version).tags
        assert tags["k"] == str(student["k"])
        assert tags["method"] == "moment_matching"
        assert float(tags["frechet"]) == pytest.approx(student["frechet"], rel=1e-5)
        assert (tags["teacher_name"], tags["teacher_version"]) == ("mmdistill-digits-teacher", "1")
        assert len(tags["data_fingerprint"]) == 16
        assert len(tags["config_hash"]) == 12
        assert tags["git_commit"]
        assert tags["evaluation_run"] == next(s["run_id"] for s in summary["stages"] if s["name"] == "evaluate")
        assert float(tags["teacher_frechet"]) == pytest.approx(student["teacher_frechet_same_k"], rel=1e-5)
        assert (tags["data_source"], tags["data_count"], tags["seeds"]) == ("digits", "1797", "2")
        assert registry.alias(name, f"k{student['k']}-champion") == version
        (move,) = [m for m in registry.moves(name) if m.version == version]
        assert (move.before, move.by, move.done) == (None, "gate", True)
    assert registry.version("mmdistill-digits-teacher", "1").tags["k"] == "4"


def test_the_registered_model_draws_samples(finished, tracker):
    import mlflow
    import pandas as pd

    uri = finished[1]["students"][1]["model_uri"]
    mlflow.set_tracking_uri(tracker.uri)
    loaded = mlflow.pyfunc.load_model(uri)
    labels = pd.DataFrame({"label": [3, 5, 7]})
    images = loaded.predict(labels, params={"seed": 4})
    assert images.shape == (3, 1, 8, 8)
    assert images.dtype == np.float32
    assert np.array_equal(images, loaded.predict(labels, params={"seed": 4}))
    assert not np.array_equal(images, loaded.predict(labels, params={"seed": 5}))
    assert abs(images).max() <= 1
    with pytest.raises(ValueError, match="never learnt the null label"):
        loaded.predict(labels, params={"guidance": 1.0})


def test_nothing_registered_is_pickled(finished):
    files = [p for p in finished[0].workspace.rglob("*") if p.is_file() and "ray" not in p.parts]
    assert files
    assert not [p for p in files if p.suffix in {".pkl", ".pickle", ".pt", ".pth", ".bin"}]


@pytest.mark.parametrize("model", ["models:/mmdistill-digits-student@k2-champion", "folder"])
def test_sample_command(finished, tmp_path, model, capsys):
    runner, _ = finished
    if model == "folder":
        model = str(next((runner.workspace / "stages").glob("distill-k2-*")) / "model")
    for out in ("grid.png", "images.npy"):
        with pytest.raises(SystemExit) as caught:
            main(["sample", model, "--n", "6", "--labels", "3,5", "--seed", "1", "--out", str(tmp_path / out),
                  "--workspace", str(runner.workspace)])  # fmt: skip
        assert caught.value.code == 0, capsys.readouterr().err
    assert np.load(tmp_path / "images.npy").shape == (6, 1, 8, 8)
    from PIL import Image

    assert Image.open(tmp_path / "grid.png").size[0] > 100


def test_a_label_the_model_lacks_is_refused(finished, tmp_path, capsys):
    runner, _ = finished
    with pytest.raises(SystemExit) as caught:
        main(["sample", "models:/mmdistill-digits-student/1", "--labels", "12", "--workspace", str(runner.workspace)])
    assert caught.value.code == 2
    assert "0 to 9" in capsys.readouterr().err


def test_another_tracking_store_gets_the_finished_stages(finished, tmp_path):
    runner, first = finished
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    second = runner(tracking_uri=uri)
    names = {s["name"]: s["reused"] for s in second["stages"]}
    assert names["teacher"]
    assert not names["register"]
    other = Tracker(uri, artifacts=tmp_path / "artifacts")
    run_id = next(s["run_id"] for s in second["stages"] if s["name"] == "distill-k2")
    assert run_id not in {s["run_id"] for s in first["stages"]}
    assert other.client.get_metric_history(run_id, "moment_gap")


def test_a_store_stays_with_its_workspace(tmp_path):
    """Two workspaces in one process: the first one's store is not found in the environment by the second."""
    import os

    before = os.environ.get("MLFLOW_TRACKING_URI")
    Tracker(f"sqlite:///{tmp_path / 'one.db'}", artifacts=tmp_path / "artifacts")
    assert os.environ.get("MLFLOW_TRACKING_URI") == before


@pytest.fixture(scope="session")
def browser():
    found = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
    assert found, "the report's test needs a browser: apt-get install chromium"
    return found


def test_the_report_renders_without_network(finished, browser, tmp_path):
    from PIL import Image

    path = finished[0].workspace / "reports/digits/report.html"
    html = path.read_text()
    for outside in ("http://", "https://", "//cdn", "<script"):
        assert outside not in html.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
            "http://purl.org", ""
        ).replace("http://creativecommons.org", "")
    shot = tmp_path / "report.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    for extra in ([f"--screenshot={shot}", "--window-size=1200,4000"], ["--dump-dom"]):
        done = subprocess.run([*command, *extra, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert "few-step students by moment matching" in done.stdout
    assert done.stdout.count("<svg") == 4
    assert done.stdout.count("data:image/png") == 1 + 2 * 2 + 1  # all at the top, a pair for each k, the longest
    picture = np.asarray(Image.open(shot).convert("L"), dtype=float)
    assert picture.shape[1] == 1200
    for top in range(0, 2400, 400):  # something is drawn all the way down
        assert picture[top : top + 400].std() > 5


def test_what_the_demo_shows_at_its_end(finished, capsys):
    import io
    from pathlib import Path

    from rich.console import Console

    from workflows.rendering.screen import Screen
    from workflows.stages.report import last_screen

    shown = io.StringIO()
    last_screen(finished[1], Screen(Console(file=shown, width=160)), Path("elsewhere"), None)
    text = shown.getvalue()
    assert "report.html" in text
    assert "mmdistill sample models:/mmdistill-digits-student/2 --n 64 --workspace elsewhere" in text
    assert "mmdistill ui --workspace elsewhere" in text
    last_screen(
        finished[1] | {"tracking": "https://team:8443"}, Screen(Console(file=shown, width=160)), Path("x"), None
    )
    assert "https://team:8443  is MLflow's page" in shown.getvalue()
    assert "mmdistill ui --workspace x" not in shown.getvalue()


# A teacher that is there already takes the place of a trained one


ONE_STUDENT = ["distill.k=[1]", "distill.images=1280", "distill.validate_every=1280"]


def stage_of(runner, name):
    (found,) = (runner.workspace / "stages").glob(f"{name}-*")
    return found


def test_a_folder_by_its_relative_path(finished, tmp_path, monkeypatch):
    """The run goes to its end from another folder than its workers'; the students are of this very teacher."""
    trained = stage_of(finished[0], "teacher")
    monkeypatch.chdir(trained.parent)
    runner = Runner(tmp_path / "workspace")
    summary = runner(*ONE_STUDENT, f"teacher={trained.name}/model")
    assert f"{trained}/model, as it is" in runner.text
    taken = json.loads((stage_of(runner, "teacher") / "result.json").read_text())
    assert taken["identity"] == json.loads((trained / "result.json").read_text())["identity"]
    model = json.loads((stage_of(runner, "distill-k1") / "model/model.json").read_text())
    assert model["provenance"]["teacher"] == taken["identity"]
    assert [s["name"] for s in summary["stages"]][-1] == "report"
    assert summary["students"][0]["frechet"] > 0


def test_a_registered_version(finished, tmp_path):
    store = f"sqlite:///{finished[0].workspace}/mlflow.db"
    runner = Runner(tmp_path / "workspace")
    summary = runner(*ONE_STUDENT, "teacher=models:/mmdistill-digits-teacher/1", until="distill", tracking_uri=store)
    assert "models:/mmdistill-digits-teacher/1, as it is" in runner.text
    assert [s["name"] for s in summary["stages"]] == ["prepare", "teacher", "distill-k1"]
