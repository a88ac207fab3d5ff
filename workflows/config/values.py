"""Settings as nested plain values: merging them, and parsing them from YAML."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

from workflows.errors import brief, in_a_line

DEEPEST = 20
"""Most levels of nesting. No setting needs as many, and thousands would exceed Python's recursion limit."""


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def without(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`values` without the fields that `given` names, section by section."""
    out = {}
    for name, value in values.items():
        if name not in given:
            out[name] = value
        elif isinstance(value, dict) and isinstance(given[name], dict):
            out[name] = without(value, given[name])
    return out


def nested(field: str, value: Any) -> dict[str, Any]:
    """("a.b", 1) -> {"a": {"b": 1}}. Parts that are whole numbers become int keys."""
    for part in reversed(field.split(".")):
        value = {int(part) if part.isascii() and part.isdigit() else part: value}
    assert isinstance(value, dict)
    return value


_TAG = "tag:yaml.org,2002:"
_OLD = re.compile(r"[-+]?0[0-9_]+|.*:.*")
"""Numbers that surprise in YAML 1.1, and are kept as text: 010, which is 8 there, and 1:30, which is 90."""


class _Loader(yaml.SafeLoader):
    """Loads plain values only. It refuses a duplicate key, where YAML would silently drop the first. Dates stay text: no setting is
    a date, and a folder's name may look like one.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, looks) for tag, looks in known if tag != f"{_TAG}timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in (f"{_TAG}int", f"{_TAG}float") and isinstance(node.value, str) and _OLD.fullmatch(node.value):
            return node.value
        try:
            return super().construct_object(node, deep)
        except (LookupError, AttributeError):  # the value doesn't match its tag, as in !!bool maybe
            problem = f"{brief(node.value)} is no {node.tag.removeprefix(_TAG)}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{brief(key)} stands twice", key_node.start_mark)
            seen.add(key if isinstance(key, Hashable) else id(key))
        return super().construct_mapping(node, deep)


def parsed(text: str | bytes) -> Any:
    """The values of a YAML text. Raises ValueError with a one-line message, such as "not YAML: ..."."""
    try:
        values = yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        raise ValueError(f"not text in UTF-8: {in_a_line(str(error))}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible number or date
        marked = isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None
        why = f"line {error.problem_mark.line + 1}: {error.problem}" if marked else str(error)  # type: ignore[union-attr]
        raise ValueError(f"not YAML: {in_a_line(why)}") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from None
    level = [values]
    for _ in range(DEEPEST):  # each value once, however many aliases refer to it
        level = list({id(inner): inner for value in level for inner in _inside(value)}.values())
    if level:
        raise ValueError(f"nested deeper than {DEEPEST} levels")
    return values


def _inside(value: Any) -> list[Any]:
    """The values in a mapping or a list, none in anything else."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def digest(value: Any, length: int = 12) -> str:
    """The first `length` hex digits of the SHA-256 of `value` as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
