"""The paper's choices through the whole pipeline: guidance, told students, noise of the teacher, instant, warm starts."""

import json

import pytest
from small import Runner

from mmdistill_core.artifact import load_model

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def chosen(tmp_path_factory, ray_cluster):
    """A teacher that can be guided; told students of 2 steps, by instant moment matching, and of 1 step, from the former."""
    runner = Runner(tmp_path_factory.mktemp("chosen"))
    summary = runner(
        "teacher.label_dropout=0.1",
        "teacher.images=6400",
        "distill.images=2560",
        "distill.warm_start=true",
        "distill.micro_batch=32",
        "distill.dropout=0.1",
        "distill.guidance=[0,2]",
        "distill.overrides={1: {eta: 0.5}, 2: {update: instant, transition: unconditional}}",
        "evaluate.teacher_noise=[0.2]",
        "evaluate.guidance=[1]",
        "evaluate.samples=60",
        "evaluate.seeds=1",
        "evaluate.teacher_steps=[1,2]",
    )
    return runner, summary


def model(runner, stage):
    return load_model(next((runner.workspace / "stages").glob(f"{stage}-*")) / "model")


def test_rows_of_the_teachers_noise_and_of_guidance(chosen):
    runner, summary = chosen
    table = json.loads(next((runner.workspace / "stages").glob("evaluate-*/table.json")).read_text())
    rows = {(r["who"], r["sampler"], r["k"]): r for r in table["rows"]}
    for k in (1, 2):
        for sampler in ("ancestral", "ddim", "ancestral, extra noise 0.2", "ancestral, guidance 1", "ddim, guidance 1"):
            assert ("teacher", sampler, k) in rows
        assert ("student", "ancestral", k) in rows
    assert rows["teacher", "ancestral, guidance 1", 2]["nfe"] == 4
    assert rows["student", "ancestral, guidance 1", 1]["nfe"] == 1
    assert rows["student", "ancestral, guidance 1", 2]["frechet"] != rows["student", "ancestral", 2]["frechet"]
    assert [rows["student", "ancestral", k]["shown"] for k in (1, 2)] == ["ancestral, eta 0.5", "renoise"]
    plain, noisy = rows["teacher", "ancestral", 2], rows["teacher", "ancestral, extra noise 0.2", 2]
    assert plain["frechet"]["mean"] != noisy["frechet"]["mean"]
    best = min((r for r in table["rows"] if r["who"] == "teacher"), key=lambda r: r["frechet"]["mean"])
    assert summary["teacher_best"] == {"sampler": best["sampler"], "k": best["k"], "frechet": best["frechet"]["mean"]}


def test_students_keep_how_they_are_sampled(chosen):
    runner, _ = chosen
    teacher, one, two = (model(runner, stage) for stage in ("teacher", "distill-k1", "distill-k2"))
    assert teacher.null_label
    assert (one.guidance, one.options, one.sampler) == ((0.0, 2.0), {"eta": 0.5}, "ancestral")
    assert one.network.conditions == ("guidance",)
    assert (two.guidance, two.sampler) == ((0.0, 2.0), "renoise")
    assert one.sample(3, guidance=1.0).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="guidance: 3 is not within 0 to 2"):
        two.sample(3, guidance=3.0)


def test_the_report_says_which_curve_is_an_instant_students(chosen):
    page = next((chosen[0].workspace / "stages").glob("report-*/report.html")).read_text()
    assert "Squared moments (k = 2)" in page
    assert "Moment gap" in page


def test_the_figure_of_moments_draws_what_each_student_logged(chosen, monkeypatch):
    """Panels for both kinds, each with its mean and its levels; values below 0 are there."""
    from workflows.rendering import plots as figures
    from workflows.session.context import read_metrics

    folders = {k: next((chosen[0].workspace / "stages").glob(f"distill-k{k}-*")) for k in (1, 2)}
    drawn = {}
    monkeypatch.setattr(figures, "svg", lambda figure: drawn.update(axes=figure.axes))
    histories = {k: read_metrics(folder) for k, folder in folders.items()}
    (n, last), *_ = histories[2][-1:]
    histories[2] = [*histories[2][:-1], (n, last | {"squared_moments": -last["squared_moments"]})]
    figures.moment_gap(histories)
    assert [axis.get_yscale() for axis in drawn["axes"]] == ["log", "symlog"]
    assert [axis.get_ylabel() for axis in drawn["axes"]] == ["moment gap", "squared moments"]
    for axis, history, name in zip(drawn["axes"], histories.values(), ("moment_gap", "squared_moments"), strict=True):
        mean = next(line for line in axis.lines if line.get_label() == "mean")
        assert list(mean.get_ydata()) == [m[name] for _, m in history if name in m]
        assert len(axis.lines) > 4


def test_one_step_starts_from_two(chosen):
    """Its run waited for the other's, and names it in what it depends on."""
    runner, _ = chosen
    stages = runner.workspace / "stages"
    depends = json.loads(next(stages.glob("distill-k1-*/depends.json")).read_text())
    result = json.loads(next(stages.glob("distill-k2-*/result.json")).read_text())
    assert depends["start"] == result["identity"]


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "of other weights"])
def test_a_lambda_that_does_not_fit_is_a_line(chosen, tmp_path, missing):
    """Before training starts, and naming what to do."""
    import shutil

    from workflows.errors import UserError

    runner = Runner(tmp_path / "w")
    shutil.copytree(
        chosen[0].workspace, runner.workspace, ignore=shutil.ignore_patterns("ray", "mlflow*", "mlartifacts")
    )
    model = next((runner.workspace / "stages").glob("teacher-*")) / "model"
    (model / "second_moments.safetensors").unlink()
    of_stage = json.loads((model.parent / "result.json").read_text())
    del of_stage["files"]  # as of a teacher from before these were kept: else the file that is gone is missed first
    (model.parent / "result.json").write_text(json.dumps(of_stage))
    said = "the teacher has none"
    if not missing:
        from mmdistill_core.artifact import WEIGHTS, save_second_moments

        own = (model / WEIGHTS).read_bytes()
        (model / WEIGHTS).write_bytes(own + b" ")
        save_second_moments(model, {})
        (model / WEIGHTS).write_bytes(own)
        said = "of other weights"
    with pytest.raises(UserError, match=said) as caught:
        runner(
            "teacher.label_dropout=0.1",
            "teacher.images=6400",
            "distill.k=[2]",
            "distill.update=instant",
            "distill.images=1280",
            until="distill",
        )
    assert "\n" not in str(caught.value)
