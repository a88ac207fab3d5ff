"""Sweeps: what may be swept, and a small one on Ray Tune."""

import io
import json

import pytest
from rich.console import Console
from small import SMALL

from workflows.config import ConfigError, load_config
from workflows.pipeline import RunOptions, run_sweep
from workflows.runtime.progress import Screen
from workflows.stages.sweep import parse_space, section, summarise


def test_space():
    config = load_config("digits")
    space = parse_space(
        ["pairing=uniform,grid", "optimiser.lr=1e-4,0.001", "auxiliary_lr=loguniform(1e-4, 1e-2)"], config
    )
    assert space == {
        "pairing": ["uniform", "grid"],
        "optimiser.lr": [1e-4, 1e-3],
        "auxiliary_lr": ("loguniform", 1e-4, 1e-2),
    }


def test_a_trial_wins_over_the_recipes_own_setting_for_its_k():
    config = load_config("digits", ["distill.overrides.8.pairing=uniform"])
    assert section(config, 8, {}).pairing == "uniform"
    own = section(config, 8, {"pairing": "grid", "optimiser.lr": 0.5, "seed": 3, "k": 8})
    assert (own.pairing, own.optimiser.lr, own.k) == ("grid", 0.5, (8,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pairin=grid", "pairin: no such option; did you mean pairing"),
        ("pairing=grid,both", "pairing: 'both' is not one of"),
        ("optimiser.lr=loguniform(-1,1)", "optimiser.lr: -1.0 should be greater than 0"),
        ("pairing", "field=a,b,c"),
        ("k=0", "at least 1"),
        ("guidance=1", "teacher.label_dropout is 0"),
        ("warm_start=true", "warm_start: a sweep trains each student alone"),
    ],
)
def test_mistakes_are_one_line(text, said):
    with pytest.raises(ConfigError, match=said.split("(")[0]) as caught:
        parse_space([text], load_config("digits"))
    assert "\n" not in str(caught.value)


def test_rows_that_differ_in_the_seed_become_one():
    def row(pairing, seed, frechet):
        rest = dict.fromkeys(("frechet_pixels", "accuracy", "recall", "seconds"), 1.0)
        return {"point": {"k": 8, "pairing": pairing, "seed": seed}, "frechet": frechet, **rest}

    lines = summarise([row("grid", 0, 1.0), row("uniform", 0, 0.5), row("grid", 1, 3.0)])
    assert [line["point"]["pairing"] for line in lines] == ["uniform", "grid"]
    assert lines[1]["frechet"] == {"mean": 2.0, "spread": 1.0}
    assert lines[1]["seeds"] == 2


@pytest.mark.ray
def test_a_sweep_measures_every_point(tmp_path, ray_cluster):
    config = load_config("digits", [*SMALL, "distill.k=[2]", "distill.images=2560", "distill.validate_every=1280"])
    shown = io.StringIO()
    lines = run_sweep(
        config,
        RunOptions(workspace=tmp_path / "w"),
        Screen(Console(file=shown, width=200)),
        space=parse_space(["pairing=uniform,grid", "seed=0,1"], config),
        out=tmp_path / "out.json",
    )
    assert {line["point"]["pairing"] for line in lines} == {"uniform", "grid"}
    assert all(line["seeds"] == 2 and line["frechet"]["spread"] > 0 for line in lines)
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written["trials"]) == 4
    assert all(row["images"] == 2560 for row in written["trials"])
    assert "pairing" in shown.getvalue()

    from workflows.runtime.tracking import Tracker
    from workflows.runtime.workspace import Workspace

    space = Workspace(tmp_path / "w")
    tracker = Tracker(space.default_tracking_uri, artifacts=space.default_artifacts)
    runs = tracker.client.search_runs([tracker.experiment])
    trials = [r for r in runs if r.info.run_name.startswith("trial")]
    assert len(trials) == 4
    assert {r.data.params["pairing"] for r in trials} == {"uniform", "grid"}
