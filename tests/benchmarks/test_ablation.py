"""The ablation: every choice is a valid setting of its recipe, and its table says what the rows say."""

import pytest

from benchmarks.ablation import CHOICES, COST, IMAGES, merge_rows, run_ablation, setting, table, write_table
from workflows.config.loading import load_config
from workflows.errors import ConfigError
from workflows.rendering.screen import Screen
from workflows.session.options import RunOptions
from workflows.sweep.space import section


@pytest.mark.parametrize("recipe", IMAGES)
@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_is_a_setting_that_costs_what_the_base_does(recipe, choice):
    own = section(load_config(recipe), 8, {"setting": setting(recipe, choice), "seed": 1, "k": 8})
    base = section(load_config(recipe), 8, {"setting": setting(recipe, "base")})
    assert own.images * COST[own.update] == pytest.approx(base.images * COST["joint"], rel=0.02)
    differs = {f for f in type(own).model_fields if getattr(own, f) != getattr(base, f)} - {"images"}
    assert {f.split(".")[0] for f in CHOICES[choice]} >= differs - {"preconditioner"}
    assert choice == "base" or differs


def row(choice, k, seed, distance):
    return {
        "point": {"setting": {"choice": choice}, "k": k, "seed": seed},
        "frechet": 0.0,
        "frechet_reported": distance,
        **dict.fromkeys(("accuracy", "recall"), 0.0),
        "seconds": 10.0,
    }


def test_the_table(tmp_path):
    rows = [row("base", 1, 0, 0.1), row("base", 1, 1, 0.3), row("instant", 1, 0, 0.5), row("instant", 2, 0, 0.25)]
    lines = table(rows).splitlines()
    assert lines[0] == "| | k = 1 | k = 2 | seconds |"
    assert lines[2] == "| base | **0.200 ± 0.100** |  | 10 |"
    assert lines[3] == "| instant | 0.500 ± 0.000 | **0.250 ± 0.000** | 10 |"

    page = tmp_path / "docs" / "page.md"
    write_table(page, "gmm", rows)
    page.write_text("before\n\n" + page.read_text() + "\nafter\n")
    write_table(page, "gmm", rows[:2])
    write_table(page, "digits", rows)
    text = page.read_text()
    assert text.startswith("before")
    assert text.count("<!-- gmm -->") == 1
    assert text.index("after") < text.index("<!-- digits -->")
    assert "instant" not in text[: text.index("after")]


def test_new_rows_go_to_those_that_were_kept(tmp_path):
    import json

    def file(name, teacher, *rows):
        (tmp_path / name).write_text(json.dumps({"recipe": "gmm", "teacher": teacher, "trials": rows}))
        return tmp_path / name

    kept = file("kept", "a", row("base", 1, 0, 0.1), row("instant", 1, 0, 0.3))
    merge_rows(kept, file("new", "a", row("instant", 1, 0, 0.2), row("instant", 2, 0, 0.4)))
    assert [r["frechet_reported"] for r in json.loads(kept.read_text())["trials"]] == [0.1, 0.2, 0.4]
    merge_rows(kept, file("new", "another", row("base", 8, 0, 0.5)))
    assert [r["frechet_reported"] for r in json.loads(kept.read_text())["trials"]] == [0.5]
    assert not (tmp_path / "new").exists()


def test_what_is_not_there_is_a_line(tmp_path):
    options = RunOptions(workspace=tmp_path)
    for recipes, only, said in ((["photos"], [], "recipe: 'photos'"), ([], ["bases"], "--only: 'bases'")):
        with pytest.raises(ConfigError, match=said):
            run_ablation(recipes, options, Screen(), page=tmp_path / "p.md", only=only, ks=[1], seeds=1)
