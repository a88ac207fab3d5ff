"""Loads the configuration of a run from a recipe, the recipes that it extends, and the command line.

Precedence: defaults < recipe < `--set section.field=value`.
"""

from __future__ import annotations

import re
from functools import cache, reduce
from pathlib import Path
from typing import Any

import yaml

from workflows.config.assembly import config_of
from workflows.config.schema import DATA_SET, ONLY_SHOWN, RunConfig
from workflows.config.smoke import smoke_values
from workflows.config.values import DEEPEST, merge, nested, parsed, without
from workflows.dataset.sources import SOURCES
from workflows.errors import ConfigError, brief, expanded

RECIPES = Path(__file__).parent / "recipes"


OF_THE_DATA = ("path", "image_size", "channels", "num_classes", "extractor", "reporting", "extractor_weights")
"""The fields that describe a recipe's own data. They are dropped for a source with a shape of its own."""


POWER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]+")


def _over(recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` merged over `recipe`. A field that `given` sets for all k replaces the recipe's overrides of that field. Overrides in
    `given` win over both.
    """
    for name in ("distill", "gate"):
        section, over = recipe.get(name), given.get(name)
        if isinstance(section, dict) and isinstance(over, dict) and isinstance(section.get("overrides"), dict):
            of_k = {k: without(own, over) if isinstance(own, dict) else own for k, own in section["overrides"].items()}
            recipe = recipe | {name: section | {"overrides": of_k}}
    return merge(recipe, given)


def _by_k(values: dict[str, Any]) -> dict[str, Any]:
    """The values with each k of `overrides` as an int: "4" and 4 are the same k. Raises ConfigError for a duplicate."""
    for name in ("distill", "gate"):
        section = values.get(name)
        if isinstance(section, dict) and isinstance(section.get("overrides"), dict):
            of_k: dict[Any, Any] = {}
            for key, own in section["overrides"].items():
                k = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
                if k in of_k or isinstance(k, bool):
                    raise ConfigError(
                        f"{name}.overrides: {key!r} {'is no k' if isinstance(k, bool) else 'stands twice'}"
                    )
                of_k[k] = own
            values = values | {name: section | {"overrides": of_k}}
    return values


def _for_its_data(recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The recipe without the description of its own data, if the command line names another source with a shape of its own."""
    data, over = recipe.get("data"), given.get("data")
    source = str(over.get("source", "")) if isinstance(over, dict) else ""
    if not (source in SOURCES or source == "dataset" or source.startswith(DATA_SET)):
        return recipe
    if isinstance(data, dict) and data.get("source") != source:
        recipe = recipe | {"data": {name: value for name, value in data.items() if name not in OF_THE_DATA}}
    teacher = recipe.get("teacher")
    if isinstance(teacher, dict) and (source not in SOURCES or SOURCES[source].exact is None):
        recipe = recipe | {"teacher": without(teacher, {"kind": None})}
    return recipe


@cache
def recipe_names() -> tuple[str, ...]:
    return tuple(sorted(p.stem for p in RECIPES.glob("*.yaml")))


def recipe_file(recipe: str) -> Path:
    """The file of a recipe: a built-in recipe by name, or the user's .yaml file. Raises ConfigError if there is none."""
    path = expanded(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not exists(path):
            raise ConfigError(f"recipe: no such file {recipe}")
        return path
    if recipe in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    raise ConfigError(
        f"recipe: {brief(recipe)} does not exist; there are: {', '.join(recipe_names())}, or a .yaml file"
    )


def read_mapping(path: Path, what: str, holds: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError; the message names `what` the file is and what it should hold (`holds`)."""
    try:
        values = parsed(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{what}: {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{what}: {path} is {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{what}: {path} should hold {holds}, not a {type(values).__name__}")
    return values


def chain(recipe: str) -> list[tuple[Path, dict[str, Any]]]:
    """The recipe's file and those that it extends, each with its values, the base first. A relative path in `extends` starts at the
    folder of the file that holds it. Raises ConfigError.
    """
    found: list[tuple[Path, dict[str, Any]]] = []
    name: str | None = recipe
    while name is not None:
        path = recipe_file(name)
        if any(exists(other) and path.samefile(other) for other, _ in found):
            names = " extends ".join(str(other) for other in (*(other for other, _ in reversed(found)), path))
            raise ConfigError(f"recipe: {names}: in a circle")
        values = _by_k(read_mapping(path, "recipe", "sections"))
        name = _beside(path, values.pop("extends", None))
        found.insert(0, (path, values))
    return found


def _beside(path: Path, parent: Any) -> str | None:
    """The recipe that the file at `path` extends: a name, or a file's path."""
    if parent is None:
        return None
    if not isinstance(parent, str) or not parent.strip():
        raise ConfigError(
            f"recipe: {path}: extends: {brief(parent)} should be a recipe's name, or a .yaml file beside it"
        )
    if Path(parent).suffix not in (".yaml", ".yml"):
        return parent
    return str(path.parent / expanded(parent))


def whole(recipe: str) -> dict[str, Any]:
    """The values of a recipe, merged over those that it extends. Raises ConfigError."""
    return reduce(_over, (values for _, values in chain(recipe)), dict[str, Any]())


def sendable(recipe: str) -> bytes:
    """The content of a recipe's file for another machine: unchanged, or with all values merged if it extends other files of the
    user. Raises ConfigError.
    """
    own = [path for path, _ in chain(recipe) if path.parent != RECIPES]
    return own[0].read_bytes() if len(own) == 1 else yaml.safe_dump(whole(recipe), sort_keys=False).encode()


def exists(path: Path) -> bool:
    """Whether `path` is a file. False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _parse_override(text: str) -> dict[str, Any]:
    field, equals, value = text.partition("=")
    field = field.strip()
    if not equals or not all(field.split(".")):
        raise ConfigError(f"--set: {brief(text)} should read section.field=value")
    if field.count(".") >= DEEPEST:
        raise ConfigError(f"--set: {brief(field)}: no such option")
    try:
        result = parsed(value)
    except ValueError as error:
        raise ConfigError(f"--set: the value of {brief(text)} is {error}") from None
    if isinstance(result, str) and POWER.fullmatch(result):  # YAML 1.1 reads 1e-3 as text
        result = float(result)
    return _by_k(nested(field, result))


def load_config(
    recipe: str, overrides: list[str] | None = None, *, smoke: bool = False, only_shown: bool = False
) -> RunConfig:
    """The resolved configuration of a recipe, given by name or by the path of a YAML file. `smoke` makes it small. `only_shown`
    skips the checks that would open a data set. Raises ConfigError with a one-line message.
    """
    given: dict[str, Any] = reduce(merge, map(_parse_override, overrides or []), dict[str, Any]())
    context = ONLY_SHOWN if only_shown else None
    values = _over(_for_its_data(whole(recipe), given), given)
    config = config_of({"recipe": Path(recipe).stem} | values, context)
    # The command line wins over the small values too.
    return config_of(merge(smoke_values(config), given), context) if smoke else config
