"""A method and an extractor from outside (tests/outside, as pip would install it), from a run to a sweep."""

from __future__ import annotations

import json

import pytest

from workflows.cli.main import main

RECIPE = """
network: {width: 16, depth: 1, heads: 2}
data: {classifier_epochs: 1, reporting: [corners, random]}
teacher: {images: 640, batch: 64, log_every: 320, optimiser: {warmup_images: 64}}
distill:
  method: mimic
  k: [1, 2, 3]
  images: 640
  batch: 64
  log_every: 128
  validate_every: 320
  validate_samples: 40
  strength: 2.0
  optimisers: {rival: {lr: 1.0e-4}}
  overrides: {3: {images: 320}}
evaluate: {samples: 40, seeds: 1, teacher_steps: [1, 4], samplers: [ddim]}
gate: {teacher_ratio: null, recall: 0.0}
"""


COMMANDS = [
    "run -r mimics.yaml",
    "sample models:/mmdistill-mimics-student/3 --n 4 --out grid.png",
    "sweep -r mimics.yaml -k 3 --space strength=0.5,2.0 --no-register",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe of the method."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "mimics.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def finished(place, ray_cluster):
    """The workspace after the commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("MLFLOW_TRACKING_URI", "")
        for line in COMMANDS:
            with pytest.raises(SystemExit) as end:
                main(line.split())
            assert end.value.code == 0, line
    return place / ".mmdistill"


def stage(workspace, name):
    (found,) = (workspace / "stages").glob(f"{name}-*")
    return found


@pytest.mark.ray
def test_its_rounds_are_stages_and_its_sampler_is_in_the_model(finished):
    rough, student = stage(finished, "distill-rough-start"), stage(finished, "distill-of-several")
    model = json.loads((student / "model/model.json").read_text())
    assert model["provenance"]["teacher"] == json.loads((rough / "result.json").read_text())["identity"]
    assert model["samplers"].keys() == {"2", "3"}
    assert model["samplers"]["3"]["name"] == "mimics:twice"
    assert model["samplers"]["3"]["times"] == pytest.approx([1, 4 / 9, 1 / 9, 0])
    rows = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert "loss/rival" in rows[0]
    assert "loss/rival" not in rows[-1], "the curriculum"
    assert not any("loss/rival" in line for line in (rough / "metrics.jsonl").read_text().splitlines())
    assert rows[-1]["n_images"] == 320, "its own images"


@pytest.mark.ray
def test_it_is_evaluated_registered_and_reported(finished):
    table = json.loads((stage(finished, "evaluate") / "table.json").read_text())
    students = {r["k"]: (r["sampler"], r["nfe"]) for r in table["rows"] if r["who"] == "student"}
    assert students == {k: ("mimics:twice", k + 1) for k in (1, 2, 3)}
    page = (finished / "reports/mimics/report.html").read_text()
    assert "How far the pupil is from its master." in page
    assert "few-step students by mimic" in page
    assert table["features"] == "corners"
    assert {"frechet", "frechet_random", "kid", "kid_random"} <= set(table["measures"])
    assert "Features of corners are those of the corners of the images." in page
    registered = json.loads((stage(finished, "register") / "result.json").read_text())
    assert registered["students"] == {k: f"models:/mmdistill-mimics-student/{k}" for k in "123"}


@pytest.mark.ray
def test_its_student_is_sampled_and_its_options_are_swept(finished):
    assert (finished.parent / "grid.png").exists()
    trials = json.loads((finished / "reports/mimics-sweep/trials.json").read_text())["trials"]
    assert {(t["point"]["strength"], t["outcome"], t["images"]) for t in trials} == {
        (0.5, "finished", 640),
        (2.0, "finished", 640),
    }


def test_a_wrong_option_of_its_is_a_line(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for setting, said in (
        ("strenght=1", "distill.strenght: no such option; did you mean strength?"),
        ("strength=0", "distill.strength: 0 should be greater than 0"),
        ("optimisers={critic: {lr: 1}}", "'critic' is none of the networks that mimic trains: pupil, rival"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["run", "-r", "mimics.yaml", "-s", f"distill.{setting}"])
        assert end.value.code == 2
        assert said in capsys.readouterr().err
