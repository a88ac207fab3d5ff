"""Several trainings of a recipe: what they share, and the means and spreads of their figures."""

import io
import json

import pytest
from rich.console import Console
from small import SMALL

from workflows.cli.main import main
from workflows.config.loading import load_config
from workflows.pipeline.trainings import compared, run_trainings, show
from workflows.rendering.screen import Screen
from workflows.session.options import RunOptions


def summary(student, teacher):
    """Of a run: distances of the student of 4 steps, and of the teacher by (sampler, steps); a tenth of these in `random`."""

    def row(who, sampler, k, value):
        measures = {"frechet": value, "frechet_all": 2 * value, "frechet_random": value / 10}
        figures = {name: {"mean": mean, "spread": 9.0} for name, mean in measures.items()}
        return {"who": who, "sampler": sampler, "k": k, "plain": True, **figures}

    return {
        "samples": 100, "seeds": 3, "counts": "100 samples against 50 images", "chosen_by": "mixture",
        "compared_by": "ancestral", "reference_rows": "holdout", "students": [{"k": 4}],
        "floor_of": "the training images", "floors": {"frechet": 1.0, "frechet_all": 2.0, "frechet_random": 3.0},
        "spaces": [
            {"kind": "pixels", "title": "p", "suffix": "", "beside": ["all"]},
            {"kind": "random", "title": "r", "suffix": "_random", "beside": []},
        ],
        "rows": [row("student", "ancestral", 4, student), *(row("teacher", *at, v) for at, v in teacher.items())],
    }  # fmt: skip


def test_figures_are_means_and_spreads_over_trainings():
    """The ratio is to the teacher's best row, of any sampler and number of steps, in each training by itself."""
    one = summary(2.0, {("ancestral", 4): 8.0, ("ddim", 64): 4.0, ("ancestral", 64): 5.0})
    two = summary(4.0, {("ancestral", 4): 6.0, ("ddim", 64): 5.0, ("ancestral", 64): 4.0})
    result = compared([one, two])
    main = result["spaces"][""]
    assert (main["kind"], main["rows"], main["floor"]) == ("pixels", "holdout", 1.0)
    assert main["students"]["4"] == {
        "student": {"mean": 3.0, "spread": 1.0},
        "teacher_same_steps": {"mean": 7.0, "spread": 1.0},
        "over_teachers_best": {"mean": 0.75, "spread": 0.25},
    }
    assert main["teachers_best"] == {"mean": 4.0, "spread": 0.0, "rows": ["ddim, 64 steps", "ancestral, 64 steps"]}
    assert result["spaces"]["_all"]["students"]["4"]["student"]["mean"] == 6.0
    assert result["spaces"]["_all"]["rows"] == "all"
    assert result["spaces"]["_random"]["students"]["4"]["student"]["mean"] == pytest.approx(0.3)
    assert [len(rows) for rows in result["trainings"]] == [4, 4]


@pytest.mark.ray
def test_trainings_share_the_features_and_nothing_that_is_trained(tmp_path, ray_cluster):
    shown = io.StringIO()
    screen = Screen(Console(file=shown, width=200, highlight=False))
    short = ["distill.k=[1]", "distill.images=1280", "teacher.images=3840", "evaluate.teacher_steps=[1]", "seed=4"]
    config = load_config("digits", [*SMALL, *short])
    result = run_trainings(config, RunOptions(workspace=tmp_path), screen, trainings=2)
    show(result, screen)
    stages = [path.name.rpartition("-")[0] for path in (tmp_path / "stages").iterdir()]
    assert {name: stages.count(name) for name in ("prepare", "teacher", "distill-k1", "evaluate")} == {
        "prepare": 1, "teacher": 2, "distill-k1": 2, "evaluate": 2,
    }  # fmt: skip
    assert result["seeds"] == [4, 5]
    assert set(result["spaces"]) == {"", "_all", "_random", "_random_all", "_pixels", "_pixels_all"}
    figure = result["spaces"]["_random"]["students"]["1"]["student"]
    assert figure["spread"] > 0
    text = shown.getvalue()
    assert f"{figure['mean']:.3f} ± {figure['spread']:.3f}" in text
    assert "These features chose nothing: weights were kept by those of classifier." in " ".join(text.split())
    kept = json.loads((tmp_path / "reports/digits/trainings.json").read_text())
    assert kept["spaces"] == result["spaces"]


def test_unfinished_runs_are_not_compared(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["run", "--workspace", str(tmp_path), "--trainings", "2", "--until", "teacher"])
    assert end.value.code == 2
    assert "--trainings: compares finished runs" in capsys.readouterr().err
