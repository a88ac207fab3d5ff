"""`mmdistill init`: a recipe for a teacher and images of the user."""

import json

import pytest
import yaml

from workflows.cli.main import main
from workflows.config.loading import load_config
from workflows.errors import ConfigError, UserError
from workflows.tools.init import recipe_for, recipe_of_command, write_recipe


@pytest.fixture
def teacher(tmp_path):
    """The configurations of a pipeline of diffusers, whose weights nobody needs here."""
    folder = tmp_path / "ddpm"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    config = {"_class_name": "UNet2DModel", "sample_size": 16, "in_channels": 3, "num_class_embeds": 5}
    (folder / "unet/config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_takes_its_shape_from_the_teacher(teacher, tmp_path, capsys):
    images, file = tmp_path / "my images", tmp_path / "mine.yaml"
    images.mkdir()
    (images / "x.png").touch()
    with pytest.raises(SystemExit) as end:
        main(["init", str(file), "--teacher", str(teacher), "--data", str(images)])
    assert end.value.code == 0
    assert "mmdistill run -r" in capsys.readouterr().out
    config = load_config(str(file))
    assert (config.recipe, config.teacher.model) == ("mine", str(teacher))
    data = config.data
    assert (data.source, data.path, data.image_size, data.channels, data.num_classes) == (
        "folder",
        str(images),
        16,
        3,
        5,
    )
    assert data.reference == "holdout"
    assert config.distill.z_t == "rollout"
    with pytest.raises(UserError, match="exists"):
        write_recipe(file, str(teacher), str(images))


def test_a_source_keeps_its_shape_and_every_name_survives_yaml():
    for teacher in ("models:/a@b", "package.module:function", "/x: y/#z"):
        values = yaml.safe_load(recipe_for(teacher, "digits"))
        assert values["data"] == {"source": "digits", "reference": "holdout"}
        assert values["teacher"] == teacher
    assert yaml.safe_load(recipe_for("models:/a@b", "dataset://s3://b/c"))["data"]["source"] == "dataset://s3://b/c"


def test_the_recipe_of_a_command_is_the_same_each_time(teacher, tmp_path):
    space = tmp_path / "space"
    first = recipe_of_command(str(space), str(teacher), "digits")
    assert first == space / "recipes/digits.yaml"
    assert recipe_of_command(str(space), str(teacher), "digits") == first
    assert recipe_of_command(str(space), str(teacher), f"{tmp_path}/a b/").name == "a-b.yaml"


def test_what_does_not_go_is_a_line(teacher, tmp_path):
    with pytest.raises(ConfigError, match="belong together"):
        recipe_of_command(str(tmp_path), str(teacher), None)
    with pytest.raises(ConfigError, match=r"ends in \.yaml"):
        write_recipe(tmp_path / "mine", str(teacher), "digits")
    with pytest.raises(ConfigError, match="does not say the shape"):
        recipe_for("models:/a@b", str(tmp_path))
    with pytest.raises(UserError, match="neither a pipeline"):
        recipe_for(str(tmp_path / "nothing"), str(tmp_path))
