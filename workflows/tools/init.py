"""`mmdistill init`: writes a recipe for a teacher and images of the user."""

from __future__ import annotations

from pathlib import Path

import yaml

from workflows.config.places import names_code
from workflows.config.schema import DATA_SET
from workflows.dataset.sources import SOURCES
from workflows.errors import ConfigError, UserError
from workflows.storage.local import read_json
from workflows.storage.store import fetch
from workflows.storage.uri import is_remote, resolved, shown

TEXT = """# Distils {teacher} on {data}. All options: mmdistill config FILE.
data: {section}
teacher: {place}
distill:
  k: [1, 2, 4, 8]      # a student for each number of steps
  images: 384_000      # of each training; what it costs: mmdistill plan FILE
  batch: 128
  z_t: rollout         # trained on the states of its own sampler
  w_s: sigmoid
  # optimiser: {{lr: 3.0e-4}}   # the auxiliary learns at auxiliary_lr_ratio times this rate
  # guidance: 1.0      # of the teacher, if it learnt the null label
evaluate:
  samples: 1000
  teacher_steps: [1, 2, 4, 8, 64]
"""


def write_recipe(file: Path, teacher: str, data: str) -> str:
    """Writes the recipe to a new .yaml file, and returns a line that says so. Raises ConfigError and UserError."""
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{file}: a recipe's name ends in .yaml")
    if file.exists():
        raise UserError(f"{file} exists", hint="name a new file")
    file.write_text(recipe_for(teacher, data))
    return f"{file}: run it with  mmdistill run -r {file}"


def recipe_of_command(workspace: str, teacher: str | None, data: str | None) -> Path:
    """The recipe of `run --teacher --data`, in recipes/ of the workspace, or in the current folder for a workspace in a store. The
    same two have the same recipe, so that a run is continued.
    """
    if teacher is None or data is None:
        raise ConfigError("--teacher and --data belong together; with a recipe: --set teacher=PLACE")
    text = recipe_for(teacher, data)
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in data.rstrip("/").rpartition("/")[2]) or "images"
    folder = Path() if is_remote(workspace) else Path(workspace).expanduser() / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return file


def recipe_for(teacher: str, data: str) -> str:
    """The text of a recipe. A folder of images takes its shape from the teacher."""
    section: dict[str, object] = {"source": data}
    if data not in SOURCES and not data.startswith(DATA_SET):
        size, channels, classes = shape_of(teacher)
        section = {"source": "folder", "path": resolved(data), "image_size": size}
        section |= {"channels": channels, "num_classes": classes}
    section["reference"] = "holdout"
    place = teacher if teacher.startswith("models:/") or names_code(teacher) else resolved(teacher)
    return TEXT.format(teacher=shown(teacher), data=shown(data), section=_flow(section), place=_flow(place))


def _flow(value: object) -> str:
    """YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("...\n").strip()


def shape_of(teacher: str) -> tuple[int, int, int]:
    """The image size, channels and classes of a teacher in a folder."""
    from mmdistill_core.imports import NotATeacher, shape_in

    if teacher.startswith("models:/") or names_code(teacher):
        raise ConfigError(
            f"--teacher: {teacher} does not say the shape of its images here; start from a recipe of yours"
        )
    folder = fetch(teacher)
    if network := (read_json(folder / "model.json") or {}).get("network"):
        return network["image_size"], network["channels"], network["num_classes"]
    try:
        return shape_in(folder)
    except NotATeacher as error:
        raise UserError(f"--teacher: {error}") from error
