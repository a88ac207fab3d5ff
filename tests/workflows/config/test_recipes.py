"""Every recipe, made small: three steps of each training."""

import numpy as np
import pytest
from PIL import Image

from mmdistill_core.artifact import load_model
from mmdistill_core.networks.config import network_class
from workflows.cli.main import main
from workflows.config.loading import load_config, recipe_names
from workflows.tools.sample import fetch_model


@pytest.mark.parametrize("name", recipe_names())
def test_smoke_is_three_steps_a_stage_whatever_the_recipe(name):
    small, full = load_config(name, smoke=True), load_config(name)
    assert small.recipe == f"{name}-smoke"
    for section in (small.teacher, *(small.distill.for_k(k) for k in small.distill.k)):
        assert section.images == 3 * section.batch
    for k in small.distill.k:
        ours, theirs = small.distill.for_k(k), full.distill.for_k(k)
        for field in ("method", "update", "pairing", "delta_power", "p_s", "w_s", "pull", "ema", "optimisers"):
            assert getattr(ours, field) == getattr(theirs, field)
        assert ours.optimiser.lr == theirs.optimiser.lr
    shrunk = network_class(full.network.kind).small
    for mine, theirs in ((small, full), (small.network, full.network)):
        same = mine.model_fields_set & {"schedule", "prediction", "kind", "patch", "attention"} - set(shrunk)
        assert same
        assert all(getattr(mine, field) == getattr(theirs, field) for field in same)


def test_the_command_line_wins_over_smoke_and_a_folder_that_is_given_is_used(tmp_path):
    small = load_config("imagenet64", [f"data.path={tmp_path}", "distill.k=[2]", "teacher.images=80"], smoke=True)
    assert (small.data.source, small.data.path, small.distill.k, small.teacher.images) == (
        "folder",
        str(tmp_path),
        (2,),
        80,
    )
    assert load_config("imagenet64", smoke=True).data.source == "made"


@pytest.mark.parametrize("name", ["imagenet64", "cifar10"])
def test_a_recipe_without_its_folder_is_a_line_before_anything_starts(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", "-r", name, "--workspace", str(tmp_path / "space")])
    assert caught.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error: data.path: this recipe needs a folder of images"
    assert "--smoke" in said[1]
    assert not (tmp_path / "space").exists()


def run(config, workspace, until):
    from workflows.pipeline.run import run_pipeline
    from workflows.rendering.screen import Screen
    from workflows.session.options import RunOptions

    return run_pipeline(config, RunOptions(workspace=workspace, until=until), Screen())


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """One workspace for all recipes: a tracking store takes long to make."""
    return tmp_path_factory.mktemp("recipes")


@pytest.mark.ray
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_runs_three_steps(name, space, ray_cluster):
    summary = run(load_config(name, ["distill.k=[8]", "data.limit=100"], smoke=True), space, "distill")
    assert [s["name"] for s in summary["stages"]] == ["prepare", "teacher", "distill-k8"]


@pytest.mark.ray
@pytest.mark.parametrize("labels", [True, False])
def test_colour_images_from_a_folder_to_the_report(labels, tmp_path, ray_cluster):
    rng = np.random.default_rng(0)
    for i in range(120):
        file = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(file)
    data = [f"data.path={tmp_path / 'images'}", "data.image_size=8", "data.num_classes=2"]
    data += [] if labels else ["data.num_classes=0"]
    space = tmp_path / "a%20b ?y[v2]#c"
    summary = run(load_config("cifar10", [*data, "distill.k=[2]"], smoke=True), space, "report")
    assert summary["stages"][-1]["name"] == "report"
    (student,) = summary["students"]
    assert student["frechet"] > 0
    assert {"report.html", "samples.png"} <= {file.name for file in (space / "reports/cifar10-smoke").iterdir()}
    assert (space / "mlflow.db").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"images", space.name}
    folder = fetch_model(summary["students"][0]["model_uri"], tmp_path / "loaded", str(space), None)
    assert load_model(folder).k == 2
