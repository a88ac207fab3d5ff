"""Sweeps on Ray Tune, small but whole: every point measured once, registered through the gate, resumed after a kill."""

import io
import json
import re
import shutil
import signal

import pytest
from interruptions import Command, wait_until_gone
from rich.console import Console
from small import SMALL
from stores import PLANTED, bucket, use

from workflows.config.loading import load_config
from workflows.errors import UserError
from workflows.rendering.screen import Screen
from workflows.session.options import RunOptions
from workflows.storage import store as storage
from workflows.storage.workspace import Workspace
from workflows.sweep.options import SweepOptions
from workflows.sweep.run import run_sweep
from workflows.sweep.space import read_space
from workflows.tracking.tracker import Tracker

pytestmark = pytest.mark.ray
TINY = [*SMALL, "distill.images=2560", "distill.validate_every=640", "distill.log_every=640"]


class Swept:
    """A sweep in a workspace, run as often as wanted; `text` is what the last one showed."""

    def __init__(self, workspace, *space, overrides=(), at_once=None, **how):
        self.at_once = at_once
        self.workspace, self.config = workspace, load_config("digits", [*TINY, *overrides])
        self.space, self.how, self.text = read_space(list(space), self.config), SweepOptions(**how), ""

    def __call__(self, **options):
        shown = io.StringIO()
        try:
            how = SweepOptions(**{**vars(self.how), **options})
            screen = Screen(Console(file=shown, width=220, highlight=False))
            return run_sweep(
                self.config,
                RunOptions(workspace=self.workspace, at_once=self.at_once),
                screen,
                space=self.space,
                how=how,
            )
        finally:
            self.text = shown.getvalue()


def trials(workspace):
    """The rows of the last sweep's report, by the trial's name."""
    report = workspace / "reports" / "digits-sweep" / "trials.json"
    return {row["name"]: row for row in json.loads(report.read_text())["trials"]}


def tracker_of(workspace):
    space = Workspace(workspace)
    return Tracker(space.default_tracking_uri, artifacts=space.default_artifacts)


def tracked(workspace):
    """name -> (status, parameters, steps of the distance in training) of the trials' runs."""
    tracker = tracker_of(workspace)
    runs = [r for r in tracker.client.search_runs([tracker.experiment]) if r.info.run_name.startswith("trial")]
    assert len({r.info.run_name for r in runs}) == len(runs), "a trial has two runs"
    assert len({r.data.tags["mlflow.parentRunId"] for r in runs}) == 1
    history = {r: tracker.client.get_metric_history(r.info.run_id, "score") for r in runs}
    return {r.info.run_name: (r.info.status, r.data.params, sorted(m.step for m in history[r])) for r in runs}


def without_times(rows):
    return {name: {f: v for f, v in row.items() if f not in ("seconds", "run_id")} for name, row in rows.items()}


@pytest.fixture(scope="module")
def swept(tmp_path_factory, ray_cluster):
    sweep = Swept(
        tmp_path_factory.mktemp("swept"), "k=2,1", "pairing=uniform,grid", "seed=0,1", overrides=["gate.recall=0"]
    )
    return sweep, sweep()


def test_a_sweep_measures_every_point_and_tracks_it_once(swept):
    sweep, lines = swept
    assert [(line["point"]["k"], line["seeds"]) for line in lines] == [(1, 2), (1, 2), (2, 2), (2, 2)]
    assert all(line["frechet"]["spread"] > 0 for line in lines)
    rows, runs = trials(sweep.workspace), tracked(sweep.workspace)
    assert len(rows) == 8
    assert set(runs) == set(rows)
    for name, row in rows.items():
        status, params, steps = runs[name]
        assert (status, params["pairing"], params["k"]) == ("FINISHED", row["point"]["pairing"], str(row["point"]["k"]))
        assert steps == [640, 1280, 1920, 2560]
        assert row["images"] == 2560
    assert "8 trials over k = 2, 1, grid, 2 at once" in sweep.text


def test_the_best_of_each_k_are_registered_with_their_lineage(swept):
    from workflows.registry.lineage import lineage
    from workflows.registry.versions import Registry

    sweep, _ = swept
    registry = Registry(tracker_of(sweep.workspace))
    best = {
        k: min((r for r in trials(sweep.workspace).values() if r["point"]["k"] == k), key=lambda r: r["frechet"])
        for k in (1, 2)
    }
    students = {v.tags["k"]: v for v in registry.versions("mmdistill-digits-student")}
    assert set(students) == {"1", "2"}
    table = json.loads(next((sweep.workspace / "stages").glob("evaluate-*/table.json")).read_text())
    for k, row in best.items():
        version = students[str(k)]
        assert version.run_id == row["run_id"]
        reported = next(r for r in table["rows"] if (r["who"], r["k"]) == ("student", k))["frechet"]["mean"]
        assert float(version.tags["frechet"]) == pytest.approx(reported, rel=1e-5)
        assert reported != row["frechet"], "other features chose it"
        assert registry.alias("mmdistill-digits-student", f"k{k}-champion") == version.version
    found = lineage(registry, "mmdistill-digits-student")
    assert len(found["data"]) == len(found["data"][0]["teachers"]) == 1
    assert len(found["data"][0]["teachers"][0]["students"]) == 2


def test_the_report_and_the_best_settings_as_a_recipe(swept):
    sweep, _ = swept
    folder = sweep.workspace / "reports" / "digits-sweep"
    html = (folder / "report.html").read_text()
    assert html.count("<svg") == 3  # the front, the fields, the lineage
    assert not re.search(r"(src|href|url)\W{1,2}https?:", html)
    assert all(name in html for name in trials(sweep.workspace))
    best = load_config(str(folder / "best.yaml"))
    for k in (1, 2):
        row = min((r for r in trials(sweep.workspace).values() if r["point"]["k"] == k), key=lambda r: r["frechet"])
        assert best.distill.for_k(k).pairing == row["point"]["pairing"]
    assert best.recipe == "digits"
    assert best.distill.images == 2560


def test_again_everything_is_there(swept):
    sweep, lines = swept
    before, runs = trials(sweep.workspace), tracked(sweep.workspace)
    assert sweep() == lines
    assert sweep.text.count("reused") == 2 + 8 + 2  # prepare and teacher, the trials, evaluate and register
    assert "8 ended before, and are kept" in sweep.text
    assert trials(sweep.workspace) == before
    assert tracked(sweep.workspace) == runs


def test_tpe_asha_and_warm_starts(swept):
    """In the workspace of the other one, whose teacher it takes."""
    workspace = swept[0].workspace
    sweep = Swept(
        workspace, "k=2,1", "pairing=grid,uniform", "optimiser.lr=loguniform(1e-4,3e-1)", overrides=["gate.recall=0"],
        search="tpe", scheduler="asha", trials=6, warm_start=True,
        at_once=1,  # so that it is the same each time which trials are behind others
    )  # fmt: skip
    sweep()
    rows, tracker = trials(workspace), tracker_of(workspace)
    assert sorted(row["point"]["k"] for row in rows.values()) == [1, 1, 1, 2, 2, 2]
    assert {row["outcome"] for row in rows.values()} == {"finished", "stopped"}
    first = min((r for r in rows.values() if "frechet" in r and r["point"]["k"] == 2), key=lambda r: r["frechet"])
    for name, row in rows.items():
        run = tracker.client.get_run(row["run_id"])
        assert run.info.status == ("FINISHED" if row["outcome"] == "finished" else "KILLED")
        assert run.data.params.get("start") == (first["name"] if row["point"]["k"] == 1 else None)
        assert (row["images"] < 2560) == (row["outcome"] == "stopped"), name
    from workflows.registry.versions import Registry

    registry = Registry(tracker)
    student = registry.find_version("mmdistill-digits-student", {"k": "1"})
    started = registry.version("mmdistill-digits-student", student.tags["start_version"])
    assert started.run_id == first["run_id"]

    more = Swept(workspace, "k=2,1", "pairing=grid,uniform", "optimiser.lr=loguniform(1e-4,3e-1)",
                 overrides=["gate.recall=0"], search="tpe", scheduler="asha", trials=8, warm_start=True, at_once=1)  # fmt: skip
    more(register=False)
    after = trials(workspace)
    assert len(after) == 8
    best = min((r for r in after.values() if "frechet" in r and r["point"]["k"] == 2), key=lambda r: r["frechet"])
    # A better one of 2 steps starts those of 1 step anew.
    kept = {name: row for name, row in rows.items() if row["point"]["k"] == 2 or best["name"] == first["name"]}
    assert without_times(kept) == {name: row for name, row in without_times(after).items() if name in kept}
    of_1 = [tracker.client.get_run(row["run_id"]) for row in after.values() if row["point"]["k"] == 1]
    assert {run.data.params["start"] for run in of_1} == {best["name"]}


def test_a_trial_that_diverges_is_a_row(swept):
    workspace = swept[0].workspace
    sweep = Swept(workspace, "k=1", "optimiser.lr=0.0003,1e30", register=False)
    (line,) = sweep()
    assert line["point"]["optimiser.lr"] == 0.0003
    assert "of 2 trials 1 failed" in sweep.text
    failed = next(row for row in trials(workspace).values() if row["outcome"] == "failed")
    assert "not finite" in failed["why"]
    assert tracker_of(workspace).client.get_run(failed["run_id"]).info.status == "FAILED"


@pytest.mark.slow
def test_a_trial_that_an_error_ends_costs_none_of_the_others(swept, monkeypatch):
    """Its checkpoints can't be written, as a file is in their place. Students of 1 step wait for those of 2, and begin."""
    from pathlib import Path

    from workflows.sweep.ledger import Ledger

    workspace, trial_of, broken = swept[0].workspace, Ledger.trial_of, []

    def in_the_way(ledger, point, start):
        trial = trial_of(ledger, point, start)
        if point["k"] == 2 and point["eta"] == 0.25:
            broken.append(Path(trial.storage))
            Path(trial.storage).touch()
        return trial

    sweep = Swept(workspace, "k=2,1", "eta=0,0.25", warm_start=True, register=False)
    with monkeypatch.context() as patch:
        patch.setattr("workflows.sweep.run.RETRIES", 1)
        patch.setattr(Ledger, "trial_of", in_the_way)
        with pytest.raises(UserError, match=r"a trial failed: .*trial-k2"):
            sweep()
    newest = tracker_of(workspace).client.search_runs([tracker_of(workspace).experiment])
    assert next(run for run in newest if "mlflow.parentRunId" not in run.data.tags).info.status == "FAILED"
    rows = trials(workspace).values()
    assert sorted((row["point"]["k"], row["point"]["eta"]) for row in rows) == [(1, 0), (1, 0.25), (2, 0)]
    assert "Report:" in sweep.text
    broken[0].unlink()
    sweep()
    assert len(trials(workspace)) == 4


def test_a_trial_that_could_never_be_placed_is_told_at_once(swept):
    with pytest.raises(UserError, match=r"a trial asks for 0\.25 GPUs, the cluster has 0 in all"):
        Swept(swept[0].workspace, "k=1", gpus=0.25)()


def test_hours_are_over_and_the_next_sweep_goes_on(swept):
    """At once, in this case: no trial has ended, and so there is nothing to report."""
    sweep = Swept(swept[0].workspace, "k=1", "eta=0,0.5", hours=1e-5, register=False)
    assert sweep() == []
    assert "--hours 1e-05 are over: 0 of 2 trials are kept" in sweep.text
    assert "No trial has ended yet" in sweep.text
    assert len(sweep(hours=None)) == 2


@pytest.mark.slow
def test_in_a_bucket_and_again_from_another_machine(swept, moto_server, monkeypatch, tmp_path):
    use(monkeypatch, moto_server, AWS_SECRET_ACCESS_KEY=PLANTED)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MMDISTILL_CACHE", str(tmp_path / "one"))
    place = bucket(moto_server, "sweeps") + "/team"
    for stage in ("prepare", "teacher"):
        (folder,) = (swept[0].workspace / "stages").glob(f"{stage}-*")
        storage.publish(folder, f"{place}/stages/{folder.name}", last="result.json")
    sweep = Swept(place, "k=2,1", "pairing=grid", warm_start=True, register=False)
    lines = sweep()
    names = storage.listing(place)
    assert sum(name.endswith("model/weights.safetensors") and "/trial-" in name for name in names) == 2
    assert not any("/trial-" in name for name in names if name.startswith("ray/"))
    assert {"reports/digits-sweep/report.html", "reports/digits-sweep/trials.json"} <= set(names)

    monkeypatch.setenv("MMDISTILL_CACHE", str(tmp_path / "another"))
    assert sweep() == lines
    assert sweep.text.count("reused") == 4


# Killed


LONG = ["distill.images=12800", "distill.validate_every=1280", "distill.log_every=1280"]
SPACE = ["optimiser.lr=loguniform(1e-4,1e-3)", "pairing=grid,uniform", "k=2,1"]


class Sweep(Command):
    """`mmdistill sweep`."""

    def __init__(self, workspace):
        words = ("sweep", "--workspace", str(workspace), "--trials", "6", "--no-register")
        super().__init__(*words, *(w for text in SPACE for w in ("--space", text)), settings=[*TINY, *LONG])
        self.workspace = workspace

    def ended(self):
        return sorted(p.parent.name for p in (self.workspace / "stages").glob("trial-*/result.json"))

    def halfway(self):
        return list((self.workspace / "ray").glob("trial-*/*/checkpoint-*/manifest.json"))


@pytest.mark.slow
def test_ctrl_c_then_sigkill_of_the_driver(swept, tmp_path):
    """It ends with the very rows of a sweep that nobody interrupted, no trial is run twice, and none is tracked twice."""
    for name in ("uninterrupted", "interrupted"):  # both with the teacher of the other sweep
        for stage in ("prepare", "teacher"):
            (folder,) = (swept[0].workspace / "stages").glob(f"{stage}-*")
            shutil.copytree(folder, tmp_path / name / "stages" / folder.name)
    uninterrupted = Swept(tmp_path / "uninterrupted", *SPACE, overrides=LONG, trials=6, register=False)
    uninterrupted()

    command = Sweep(tmp_path / "interrupted")
    code, shown = command.interrupt(
        lambda: command.ended() and command.halfway(), lambda p: p.send_signal(signal.SIGINT)
    )
    assert code == 130, shown
    assert "of 6 trials are kept" in shown
    assert "to continue: mmdistill sweep --workspace" in shown
    assert "Traceback" not in shown
    wait_until_gone(command.pid, b"ImplicitFunc")

    first = {name: (command.workspace / "stages" / name / "result.json").stat().st_mtime_ns for name in command.ended()}
    assert 1 <= len(first) < 6
    code, _ = command.interrupt(lambda: len(command.ended()) > len(first) and command.halfway(), lambda p: p.kill())
    assert code == -signal.SIGKILL
    wait_until_gone(command.pid, b"ImplicitFunc")
    assert len(command.ended()) < 6

    finished = Swept(command.workspace, *SPACE, overrides=LONG, trials=6, register=False)
    finished()
    assert "continues from" in finished.text
    for name, written in first.items():
        assert (command.workspace / "stages" / name / "result.json").stat().st_mtime_ns == written, "run again"
    assert without_times(trials(command.workspace)) == without_times(trials(uninterrupted.workspace))
    found, expected = tracked(command.workspace), tracked(uninterrupted.workspace)
    assert found == expected
    assert all(steps == list(range(1280, 12801, 1280)) for _, _, steps in found.values())
    assert not list((command.workspace / "ray").glob("trial-*"))
