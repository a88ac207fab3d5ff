"""The space of a sweep: for each k, the fields of the distill section to try and their distributions, and the points drawn.

A space is read from YAML (workflows/config/spaces/, or a user's file) and from the command line, which wins:

    k: [8, 4, 2, 1]                               by default the recipe's
    images: 48_000                                one value: a constant
    pairing: [uniform, grid]                      a list of values, also {choice: [...]} or {grid: [...]}
    optimiser.lr: {loguniform: [1.0e-4, 1.0e-3]}  also uniform, quniform (low, high, step), randint (low, below)
    seed: [0, 1]                                  allowed besides the fields of the distill section
    overrides: {1: {pairing: grid}}               what differs for one k
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictInt, ValidationError, model_validator

from workflows.config.assembly import config_of
from workflows.config.loading import exists, read_mapping
from workflows.config.messages import one_line
from workflows.config.schema import Distill, RunConfig
from workflows.config.section import MOST_STEPS, SEEDS, Section
from workflows.config.values import merge, nested, parsed
from workflows.errors import ConfigError, brief

SPACES = Path(__file__).parents[1] / "config" / "spaces"
CALL = re.compile(r"^(\w+)\(([^()]*)\)$")
SECTIONS = [name for name, info in Distill.model_fields.items() if hasattr(info.annotation, "model_fields")]
"""The sections within the distill section."""
BESIDE = ("k", "seed", "setting", "choice")
"""Names in a point that are not fields of the distill section. `setting` is several of its fields at once, and their "choice" is
the setting's name.
"""

Point = dict[str, Any]
"""A trial's k and its value for each field."""

Number = float | int
Positive = Annotated[Number, Field(gt=0)]


class Uniform(Section):
    """The numbers of a distribution, in the order in which they are written."""

    low: Number
    high: Number

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if not self.low < self.high:
            raise ValueError("low should be below high")
        return self


class LogUniform(Uniform):
    low: Positive


class QUniform(Uniform):
    step: Positive


class RandInt(Uniform):
    """Whole numbers from low to below high."""

    low: StrictInt
    high: StrictInt


LAWS: dict[str, type[Uniform]] = {
    "uniform": Uniform,
    "loguniform": LogUniform,
    "quniform": QUniform,
    "randint": RandInt,
}


@dataclass(frozen=True)
class Domain:
    """The values of a field. `law` is "choice", or one of LAWS with its numbers in `values`."""

    law: str
    values: tuple[Any, ...]

    def draw(self, rng: random.Random) -> Any:
        if self.law == "choice":
            return rng.choice(self.values)
        low, high, *step = self.values
        if self.law == "randint":
            return rng.randrange(low, high)
        if self.law == "loguniform":
            return math.exp(rng.uniform(math.log(low), math.log(high)))
        return self._step(rng.randint(0, self._steps)) if step else rng.uniform(low, high)

    @property
    def _steps(self) -> int:
        """How many steps of quniform lie between its bounds. Rounding must neither lose the last one nor add one."""
        low, high, step = self.values
        return math.floor((high - low) / step * (1 + 1e-9))

    def _step(self, i: int) -> float:
        low, high, step = self.values
        return min(high, float(f"{low + step * i:.12g}"))  # .3, and not .30000000000000004

    @property
    def checked(self) -> tuple[Any, ...]:
        """The values to validate on behalf of all."""
        if self.law == "choice":
            return self.values
        low, high = self.values[:2]
        if self.law == "randint":
            return (low, high - 1)
        if self.law == "quniform":
            return (low, self._step(self._steps))
        return (low, low + (high - low) / math.pi, high)


@dataclass(frozen=True)
class Space:
    """k -> field -> domain, with k descending."""

    of_k: dict[int, dict[str, Domain]]

    @property
    def ks(self) -> tuple[int, ...]:
        return tuple(self.of_k)

    @property
    def listed(self) -> bool:
        """Whether every field has a list of values, so that all combinations can be tried."""
        return all(domain.law == "choice" for fields in self.of_k.values() for domain in fields.values())

    @property
    def described(self) -> dict[int, dict[str, list[Any]]]:
        """As plain values: k -> field -> [law, ...]."""
        return {k: {f: [d.law, *d.values] for f, d in fields.items()} for k, fields in self.of_k.items()}

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields for which some k tries more than one value."""
        names = dict.fromkeys(f for fields in self.of_k.values() for f, d in fields.items() if len(d.values) > 1)
        return tuple(names)

    def grid(self, k: int) -> list[Point]:
        """Every combination of the lists."""
        fields = self.of_k[k]
        return [
            {"k": k} | dict(zip(fields, values, strict=True))
            for values in itertools.product(*(d.values for d in fields.values()))
        ]

    def drawn(self, k: int, n: int, seed: int) -> list[Point]:
        """n different points, or all there are. The first are the same for every n: a larger sweep contains a smaller one."""
        points: list[Point] = []
        for i in range(n * 100):
            if len(points) == n:
                break
            rng = random.Random(f"{seed} {k} {i}")
            point = {"k": k} | {field: domain.draw(rng) for field, domain in self.of_k[k].items()}
            if point not in points:
                points.append(point)
        return points


def shares(ks: tuple[int, ...], trials: int) -> dict[int, int]:
    """k -> its number of trials, shared evenly; the first ks get one more if there is a remainder."""
    return {k: trials // len(ks) + (i < trials % len(ks)) for i, k in enumerate(ks)}


def section(config: RunConfig, k: int, point: Point) -> Distill:
    """The distill section of one trial: the recipe's for k, with the point's values. Raises ConfigError for invalid values."""
    return with_points(config, {k: point}).distill.for_k(k)


def with_points(config: RunConfig, points: dict[int, Point]) -> RunConfig:
    """The recipe with these k only, each with its point's values. Raises ConfigError for invalid values."""
    distill = config.distill.model_dump() | {"k": list(points), "overrides": {}}
    for k, point in points.items():
        values = dict(config.distill.overrides.get(k, {}))
        for field, value in (point | point.get("setting", {})).items():
            if field not in BESIDE:
                values = merge(values, nested(field, value))
        distill["overrides"][k] = values
    try:
        return config_of(config.model_dump() | {"distill": distill})
    except ConfigError as error:
        message = re.sub(r"^distill\.overrides\.(\d+)\.", r"k = \1: ", str(error))
        raise ConfigError(f"--space: {message}") from None


# Reading


def read_space(texts: list[str], config: RunConfig) -> Space:
    """The space of the `--space` options: each a name in SPACES, a path to a YAML file, or field=values, which win over files.

    Raises ConfigError with a one-line message for a field or a value that the distill section does not allow.
    """
    raw: dict[str, Any] = {}
    for text in sorted(texts, key=lambda text: "=" in text):
        raw = {**raw, **(_parsed_option(text) if "=" in text else _read_file(text))}
    return space_of(raw, config)


def space_of(raw: dict[str, Any], config: RunConfig) -> Space:
    """The space of a mapping as in a file. Raises ConfigError."""
    raw = dict(raw)
    ks, overrides = raw.pop("k", list(config.distill.k)), raw.pop("overrides", {})
    ks = ks if isinstance(ks, list) else [ks]
    if not ks or not all(type(k) is int and 1 <= k <= MOST_STEPS for k in ks) or len(set(ks)) < len(ks):
        raise ConfigError(
            f"--space: k: {brief(ks)} should be different whole numbers, at least 1 and at most {MOST_STEPS}"
        )
    if not isinstance(overrides, dict) or not all(isinstance(v, dict) for v in overrides.values()):
        raise ConfigError("--space: overrides: should hold fields by k, such as {1: {pairing: grid}}")
    if unknown := [k for k in overrides if k not in ks]:
        raise ConfigError(f"--space: overrides: {unknown[0]!r} is not one of k: {ks}")
    common = dict(_domains(raw))
    space = Space({k: common | dict(_domains(overrides.get(k, {}))) for k in sorted(ks, reverse=True)})
    for k, fields in space.of_k.items():
        _check(config, k, fields)
    return space


def space_names() -> list[str]:
    return sorted(path.stem for path in SPACES.glob("*.yaml"))


def _read_file(text: str) -> dict[str, Any]:
    path = Path(text)
    if path.suffix not in (".yaml", ".yml"):
        path = SPACES / f"{text}.yaml"
        if not exists(path):
            near = difflib.get_close_matches(text, space_names(), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"--space: {text!r} is neither a space ({hint}there are: {', '.join(space_names())}), nor a .yaml file, "
                "nor field=a,b,c or field=loguniform(low,high)"
            )
    elif not exists(path):
        raise ConfigError(f"--space: no such file {text}")
    return read_mapping(path, "--space", "fields")


def _parsed_option(text: str) -> dict[str, Any]:
    """ "optimiser.lr=loguniform(1e-4,1e-2)" or "pairing=uniform,grid" as a mapping like a file's."""
    field, _, values = text.replace(" ", "").partition("=")
    if not field or not values:
        raise ConfigError(f"--space: {text!r} should read field=a,b,c or field=loguniform(low,high)")
    call = CALL.match(values)
    try:
        listed = parsed(f"[{call[2] if call else values}]")
    except ValueError as error:
        raise ConfigError(f"--space: the values of {brief(text)} are {error}") from None
    return {field: {call[1]: listed} if call else listed}


def _domains(raw: dict[str, Any], above: str = "") -> Iterator[tuple[str, Domain]]:
    """(field, domain) pairs of a mapping. Fields of a nested section may be nested or dotted."""
    for key, value in raw.items():
        field = f"{above}{key}"
        if isinstance(value, dict) and field in SECTIONS:
            yield from _domains(value, f"{field}.")
        else:
            yield field, _domain(field, value)


def _domain(field: str, value: Any) -> Domain:
    if not isinstance(value, dict) or field == "setting":
        return _choice(field, value)
    kinds, kind = ("choice", "grid", *LAWS), str(next(iter(value), ""))
    if len(value) != 1 or kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--space: {field}: {brief(value)} should be a list, or one of {', '.join(kinds)}{hint}")
    if kind not in LAWS:
        return _choice(field, value[kind])
    law, numbers = LAWS[kind], [_number(n) for n in value[kind]] if isinstance(value[kind], list) else []
    where = f"--space: {field}: {kind}({', '.join(map(brief, numbers))})"
    if len(numbers) != len(law.model_fields):
        raise ConfigError(f"{where} takes {', '.join(law.model_fields)}")
    try:
        valid = law.model_validate(dict(zip(law.model_fields, numbers, strict=True)))
    except ValidationError as error:
        raise ConfigError(f"{where}: {one_line(error, law)}") from None
    return Domain(kind, tuple(valid.model_dump().values()))


def _choice(field: str, value: Any) -> Domain:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ConfigError(f"--space: {field}: no value is given")
    if field == "setting" and not all(isinstance(v, dict) for v in values):
        raise ConfigError("--space: setting: should hold fields, such as {choice: NAME, pairing: grid}")
    return Domain("choice", tuple(_number(v) for v in values))


def _number(value: Any) -> Any:
    """Text as a number where it is one: YAML 1.1 reads 1e-3 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check(config: RunConfig, k: int, fields: dict[str, Domain]) -> None:
    """Validates every value by itself, together with the fields that have only one. Raises ConfigError."""
    if "k" in fields:
        raise ConfigError(f"--space: overrides: k: can't differ for one k, as it does for {k}")
    fixed = {f: d.values[0] for f, d in fields.items() if d.law == "choice" and len(d.values) == 1}
    for field, domain in fields.items():
        for value in domain.checked:
            if field == "seed" and not (type(value) is int and 0 <= value <= SEEDS):
                raise ConfigError(
                    f"--space: seed: {brief(value)} should be a whole number, at least 0 and at most {SEEDS}"
                )
            trial = section(config, k, fixed | {"k": k, field: value})
            if trial.warm_start and field in ("warm_start", "setting"):
                raise ConfigError("--space: warm_start: is an option of the sweep itself: --warm-start")
