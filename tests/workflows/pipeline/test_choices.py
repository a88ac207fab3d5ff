"""The paper's options in the whole pipeline: guided students, a teacher with extra noise, the instant update, warm starts."""

import json

import pytest
from small import Runner

from mmdistill_core.artifact import load_model
from mmdistill_core.methods.base import Sampler

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def chosen(tmp_path_factory, ray_cluster):
    """A teacher that can be guided, and students conditioned on the guidance: one of 2 steps by instant moment matching, and one of
    1 step that starts from it.
    """
    runner = Runner(tmp_path_factory.mktemp("chosen"))
    summary = runner(
        "data.reporting=[random]",
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
    assert rows["teacher", "ancestral, guidance 1", 2]["nfe"] == 4
    assert ("student", "ancestral, eta 0.5", 1) in rows
    assert rows["student", "ancestral, eta 0.5, guidance 1", 1]["nfe"] == 1
    assert rows["student", "renoise, guidance 1", 2]["frechet"] != rows["student", "renoise", 2]["frechet"]
    plain, noisy = rows["teacher", "ancestral", 2], rows["teacher", "ancestral, extra noise 0.2", 2]
    assert plain["frechet"]["mean"] != noisy["frechet"]["mean"]
    best = min((r for r in table["rows"] if r["who"] == "teacher"), key=lambda r: r["frechet"]["mean"])
    assert summary["teacher_best"] == {"sampler": best["sampler"], "k": best["k"], "frechet": best["frechet"]["mean"]}


def test_students_keep_how_they_are_sampled(chosen):
    runner, _ = chosen
    teacher, one, two = (model(runner, stage) for stage in ("teacher", "distill-k1", "distill-k2"))
    assert teacher.null_label
    asked = {"guidance": (0.0, 2.0)}
    assert one.samplers == {1: Sampler("ancestral", {"eta": 0.5}, ranges=asked)}
    assert one.network.conditions == ("guidance",)
    assert two.samplers == {2: Sampler("renoise", ranges=asked)}
    assert one.sample(3, guidance=1.0).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="guidance: 3 is not within 0 to 2"):
        two.sample(3, guidance=3.0)


def test_the_report_explains_each_methods_curve(chosen):
    page = next((chosen[0].workspace / "stages").glob("report-*/report.html")).read_text()
    assert "the squared moments of Algorithm 3" in page
    assert "How far the student&#39;s samples are from the data" in page


def test_the_figure_of_moments_draws_what_each_student_logged(chosen, monkeypatch):
    """Each curve has its own panels, with its mean, its noise levels, and values below 0."""
    from mmdistill_core.diffusion.schedules import Cosine
    from mmdistill_core.methods.moment_matching import MomentMatching
    from workflows.rendering import plots
    from workflows.session.metrics import read_metrics

    folders = {k: next((chosen[0].workspace / "stages").glob(f"distill-k{k}-*")) for k in (1, 2)}
    drawn = {}
    monkeypatch.setattr(plots, "svg", lambda figure: drawn.update(axes=figure.axes))
    histories = {k: read_metrics(folder) for k, folder in folders.items()}
    (n, last), *_ = histories[2][-1:]
    histories[2] = [*histories[2][:-1], (n, last | {"squared_moments": -last["squared_moments"]})]
    for k, update, scale, label in (
        (1, "joint", "symlog", "squared moment gap"),
        (2, "instant", "symlog", "squared moments"),
    ):
        (curve,) = MomentMatching(schedule=Cosine(), update=update).curves
        plots.curve_in_training({f"k = {k}": history for k, history in histories.items()}, curve)
        (axis,) = drawn["axes"]
        assert (axis.get_title(loc="left"), axis.get_yscale(), axis.get_ylabel()) == (f"k = {k}", scale, label)
        mean = next(line for line in axis.lines if line.get_label() == "mean")
        assert list(mean.get_ydata()) == [m[curve.metric] for _, m in histories[k] if curve.metric in m]
        assert len(axis.lines) > 4


def test_one_step_starts_from_two(chosen):
    """Its stage waits for the other, and depends on its result."""
    runner, _ = chosen
    stages = runner.workspace / "stages"
    depends = json.loads(next(stages.glob("distill-k1-*/depends.json")).read_text())
    result = json.loads(next(stages.glob("distill-k2-*/result.json")).read_text())
    assert depends["starts"] == {"student": result["identity"]}


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "of other weights"])
def test_a_lambda_that_does_not_fit_is_a_line(chosen, tmp_path, missing):
    """A one-line error before training starts."""
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
    if not missing:  # there, and of other weights
        from mmdistill_core.artifact import WEIGHTS, save_beside

        own = (model / WEIGHTS).read_bytes()
        (model / WEIGHTS).write_bytes(own + b" ")
        save_beside(model, "second_moments", {})
        (model / WEIGHTS).write_bytes(own)
    said = "adam needs the second moments of the teacher's optimiser"
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
