"""The `lineage` command: data -> teacher -> students -> evaluations -> exports, and the history of the aliases.

Everything is read from the registry. `lineage_of` returns it as plain JSON; the tree in the terminal and the drawing in the report
(drawing.py) are made from that.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from workflows.errors import UserError
from workflows.registry.versions import Registry, Version, exports

MEASURED = ("frechet", "frechet_spread", "precision", "recall", "teacher_frechet")
COUNTED = ("samples", "seeds", "reference_count")


def open_registry(workspace: str | Path, tracking_uri: str | None) -> Registry:
    """The registry of a tracking store, opened to read: no store, experiment or workspace is created.

    The store is `tracking_uri`, MLFLOW_TRACKING_URI, or the store of the workspace. Raises UserError if there is none.
    """
    from workflows.storage.workspace import Workspace
    from workflows.tracking.tracker import Tracker

    if uri := tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return Registry(Tracker(uri, read_only=True))
    space = Workspace(workspace, read_only=True)
    if not space.remote and not (space.root / "mlflow.db").exists():
        raise UserError(
            f"{workspace}: nothing is registered in this workspace",
            hint="name the store with --tracking-uri, or another --workspace, or run `mmdistill run` first",
        )
    return Registry(Tracker(space.default_tracking_uri, read_only=True))


def lineage(registry: Registry, model: str) -> dict[str, Any]:
    """The lineage of the versions that `model` names (Registry.resolve). A teacher comes with all its students in the registry."""
    versions = registry.resolve(model)
    students = [s for v in versions for s in registry.versions(teacher_name=v.name, teacher_version=v.version)]
    return lineage_of(registry, list({v.uri: v for v in [*versions, *students]}.values()))


def lineage_of(registry: Registry, versions: list[Version]) -> dict[str, Any]:
    """The lineage of these versions:

    {"tracking", "data": [{"fingerprint", "source", "count", "shape", "teachers": [{..., "students": [...]}]}],
     "moves": [{"model", "alias", "version", "before", "when", "who", "why", "by", "done"}], "notes": [...]}

    A teacher that was deleted from the registry has "registered": False.
    """
    names = sorted({v.name for v in versions})
    aliases = {name: registry.aliases(name) for name in names}
    data: dict[str, dict[str, Any]] = {}
    teachers: dict[str, dict[str, Any]] = {}
    for teacher in (v for v in versions if "teacher_name" not in v.tags):
        _teacher(data, teachers, teacher, aliases[teacher.name])
    for student in (v for v in versions if "teacher_name" in v.tags):
        name, number = student.tags["teacher_name"], student.tags.get("teacher_version", "?")
        uri = f"models:/{name}/{number}"
        if uri not in teachers:
            found = registry.version(name, number)
            gone = Version(name, number, {k: t for k, t in student.tags.items() if k.startswith("data_")})
            its_aliases = registry.aliases(name) if found else {}
            _teacher(data, teachers, found or gone, its_aliases)["registered"] = found is not None
        teachers[uri]["students"].append(_described(student, aliases[student.name]))
    moves = [{"model": name} | asdict(move) for name in names for move in registry.moves(name)]
    shown = {v.uri for v in versions}
    whole = {name for name in names if all(v.uri in shown for v in registry.versions(name))}
    return {
        "tracking": registry.uri,
        "data": list(data.values()),
        "moves": [m for m in moves if m["model"] in whole or f"models:/{m['model']}/{m['version']}" in shown],
        "notes": [note for name in names for note in _unrecorded(name, aliases[name], moves)],
    }


def _teacher(
    data: dict[str, Any], teachers: dict[str, Any], version: Version, aliases: dict[str, str]
) -> dict[str, Any]:
    """Adds the node of a teacher below the node of its data set, and returns it."""
    tags = version.tags
    fingerprint = tags.get("data_fingerprint", "unknown")
    about = {name: tags.get(f"data_{name}") for name in ("source", "count", "shape")}
    images = data.setdefault(fingerprint, {"fingerprint": fingerprint, **about, "teachers": []})
    images.update({name: value for name, value in about.items() if images[name] is None})
    node: dict[str, Any] = {**_described(version, aliases), "registered": True, "students": []}
    images["teachers"].append(node)
    teachers[version.uri] = node
    return node


def _described(version: Version, aliases: dict[str, str]) -> dict[str, Any]:
    tags, start = version.tags, None
    if "start_name" in tags:
        start = f"models:/{tags['start_name']}/{tags.get('start_version', '?')}"
    evaluation: dict[str, Any] = {name: float(tags[name]) for name in MEASURED if name in tags}
    evaluation |= {name: int(tags[name]) for name in COUNTED if name in tags}
    evaluation |= {name: tags[name] for name in ("features", "reference") if name in tags}
    if evaluation:
        evaluation["run"] = tags.get("evaluation_run")
    return {
        "uri": version.uri,
        "name": version.name,
        "version": version.version,
        "k": int(tags["k"]) if "k" in tags else None,
        "method": tags.get("method"),
        "recipe": tags.get("recipe"),
        "weights": tags.get("identity"),
        "git_commit": tags.get("git_commit"),
        "created": version.created,
        "run": version.run_id,
        "start": start,
        "aliases": sorted(alias for alias, number in aliases.items() if number == version.version),
        "evaluation": evaluation or None,
        "exports": [asdict(e) for e in exports(version)],
    }


def _unrecorded(name: str, aliases: dict[str, str], moves: list[dict[str, Any]]) -> list[str]:
    """Notes on aliases that are not where their last recorded move put them. A move that is not known to have completed may have
    left its alias in either place.
    """
    ends: dict[str, list[str | None]] = {}
    for m in (m for m in moves if m["model"] == name):
        ends[m["alias"]] = [*([] if m["done"] else ends.get(m["alias"], [m["before"]])), m["version"]]
    strayed = [(alias, aliases.get(alias), at[-1]) for alias, at in ends.items() if aliases.get(alias) not in at]
    notes = [
        f"{name}@{alias} is version {version}, and its last recorded move was to version {last}: moved by other means"
        for alias, version, last in strayed
        if version is not None
    ]
    notes += [f"{name}@{alias} was removed, or its version deleted" for alias, version, _ in strayed if version is None]
    return notes + [f"{name}@{alias}: no move is recorded" for alias in aliases if alias not in ends]


def measured(node: dict[str, Any]) -> list[str]:
    """The evaluation of a version as lines of text: its metrics, their ratio to the teacher's, how they were measured."""
    e = node["evaluation"]
    if not e or "frechet" not in e:
        return []
    spread = f" ± {e['frechet_spread']:.3g}" if e.get("frechet_spread") else ""
    figures = f"distance {e['frechet']:.4g}{spread}"
    if "recall" in e:
        figures += f", recall {e['recall']:.3g}"
    lines = [f"{figures} in {node['k']} step{'s' * (node['k'] != 1)}"]
    if e.get("teacher_frechet"):
        ratio = e["frechet"] / e["teacher_frechet"]
        lines.append(f"{ratio:.3g} of the teacher's {e['teacher_frechet']:.4g} at the same steps")
    images = f" ({e['reference_count']:,} images)" if "reference_count" in e else ""
    seeds = f", {e['seeds']} seed{'s' * (e['seeds'] > 1)}" if "seeds" in e else ""
    return [*lines, f"{e.get('samples', 0):,} samples{seeds}, reference {e.get('reference', '?')}{images}"]


def tree(graph: dict[str, Any]) -> Tree:
    """The result of `lineage_of` as a tree for the terminal."""
    root = Tree(f"[dim]registry {escape(graph['tracking'])}[/]")
    for data in graph["data"]:
        count = f"  {int(data['count']):,} images" if data["count"] else ""
        source = f"  {escape(data['source'])}" if data["source"] else ""
        images = root.add(f"[bold]data {data['fingerprint']}[/]{source}{count}")
        for teacher in data["teachers"]:
            node = images.add(_label("teacher", teacher))
            if not teacher["registered"]:
                node.add("[yellow]no longer in the registry[/]")
            _details(node, teacher)
            for student in teacher["students"]:
                _details(node.add(_label("student", student)), student)
    if graph["moves"]:
        history = root.add("[bold]aliases[/]")
        for m in graph["moves"]:
            state = "" if m["done"] else "  [yellow]not known to have completed[/]"
            forced = "[yellow]forced[/]" if m["by"] == "forced" else m["by"]
            arrow = f"{m['before'] or 'none'} → {m['version']}"
            text = f"{m['when']}  {escape(m['model'])}@{m['alias']}  {arrow}  {escape(m['who'])}, {forced}"
            history.add(f"{text}  [dim]{escape(m['why'])}[/]{state}")
    for note in graph["notes"]:
        root.add(f"[yellow]{escape(note)}[/]")
    return root


def _label(role: str, node: dict[str, Any]) -> str:
    aliases = "".join(f"  [green]@{alias}[/]" for alias in node["aliases"])
    start = f"  from {escape(node['start'])}" if node["start"] else ""
    steps = f"  k = {node['k']}" if role == "student" and node["k"] else ""
    return f"{role} [bold]{escape(node['name'])} v{node['version']}[/]{steps}{aliases}{start}"


def _details(branch: Tree, node: dict[str, Any]) -> None:
    lines = measured(node)
    if lines:
        evaluation = branch.add(f"evaluation [dim]run {node['evaluation']['run'] or '?'}[/]")
        for line in lines:
            evaluation.add(line)
    for e in node["exports"]:
        text = f"export [bold]{escape(e['format'])}[/]  {escape(e['where'])}  sha256 {e['sha256'][:16]}"
        branch.add(f"{text}  [dim]{e['when']}, {escape(e['who'])}[/]")
