"""register: the teacher and the students become versions in the model registry, with their lineage; aliases mark the best.

All that `mmdistill lineage` and `promote` ask for is put there as tags, so that they need no workspace.
"""

from __future__ import annotations

import json
from typing import Any

from rich.markup import escape

from workflows.config.assembly import rounds_of, schedule_of
from workflows.config.schema import Gate, RunConfig
from workflows.config.values import digest
from workflows.errors import UserError
from workflows.registry.promote import gate_tag, promote, user
from workflows.registry.versions import Registry, Version
from workflows.session.context import Context, Done
from workflows.session.results import Results
from workflows.session.stage import StageRun, run_stage
from workflows.storage.code import code_version, git_commit

CODE = (
    "workflows/stages/register.py",
    "workflows/registry/promote.py",
    "workflows/registry/versions.py",
    "workflows/registry/pyfunc_model.py",
)


def register(context: Context, prepared: Done, taught: Done, students: dict[int, Done], measured: Done) -> Done:
    depends = {
        "teacher": taught.identity,
        "students": {k: s.identity for k, s in students.items()},
        "evaluate": measured.identity,
        "gate": context.config.gate.model_dump(),
        "tracking": context.tracker.uri,
        "code": code_version(*CODE),
    }
    shown = {"tracking": context.tracker.uri}
    made = {0: taught.identity} | {k: student.identity for k, student in students.items()}
    return run_stage(
        context,
        "register",
        depends=depends,
        config=shown,
        body=lambda run: _body(run, prepared, taught, students, measured),
        lacks=lambda result: _lacks(context, result, made),
    )


def _lacks(context: Context, result: dict[str, Any], made: dict[int, str]) -> str | None:
    """Which of the versions that were registered this store's registry no longer has, as where it was made anew: `made` are the
    identities of the teacher (0) and of the students by k. A store that is away is not asked.
    """
    registry = Registry(context.tracker)
    for k, identity in made.items():
        uri = str(result["students"].get(str(k)) if k else result["teacher"])
        name, _, number = uri.removeprefix("models:/").rpartition("/")
        try:
            version = registry.version(name, number)
        except UserError:
            return None
        if version is None or version.tags.get("identity") != identity:
            return f"the registry of {context.tracker.uri} has no {name} v{number} of this run"
    return None


def _body(run: StageRun, prepared: Done, taught: Done, students: dict[int, Done], measured: Done) -> dict[str, Any]:
    context, config, recipe = run.context, run.context.config, run.context.config.recipe
    context.settle()  # the registry has to answer, and to know the runs that the models come from
    registry = Registry(context.tracker)
    teacher_name, student_name = f"mmdistill-{recipe}-teacher", f"mmdistill-{recipe}-student"
    results = Results.of(measured.result)
    common, starts = _common(run, prepared, measured), starts_of(config)
    with context.screen.bars() as screen:
        bar = screen.bar("register", 1 + len(students), unit="models")
        row = results.longest
        none = Gate(teacher_ratio=None, recall=0)  # the recipe's gate is for students
        tags = common | {"role": "teacher", "k": str(row["k"]), "method": method_in(taught)} | _figures(row)
        teacher = _version(registry, teacher_name, taught, tags, none)
        bar.update(1)
        versions: dict[int, Version] = {}
        for i, (k, student) in enumerate(students.items()):
            tags = common | {
                "role": "student",
                "k": str(k),
                "method": config.distill.method,
                "teacher_name": teacher.name,
                "teacher_version": teacher.version,
                "teacher_frechet": f"{results.teacher(k)['frechet']['mean']:.6g}",
            }
            tags |= _figures(results.student(k))
            versions[k] = _version(registry, student_name, student, tags, config.gate.for_k(k))
            bar.update(2 + i)
        for k, version in versions.items():
            if (start := starts.get(k)) in versions:
                registry.set_tags(version, {"start_name": student_name, "start_version": versions[start].version})
    moved = {}
    for k, version in versions.items():
        outcome = promote(registry, version, _alias(k), who=user(), why=f"run {run.run_id}", better=True)
        moved[k] = outcome.text.removeprefix(f"{_alias(k)}: ")
        if outcome.refused:
            context.screen.line(f"[yellow]![/] {escape(outcome.text)}")
    first = f"{teacher.name} v{teacher.version}"
    return {
        "identity": digest([teacher.uri, {k: v.uri for k, v in versions.items()}], 16),
        "teacher": teacher.uri,
        "students": {str(k): v.uri for k, v in versions.items()},
        "champions": {str(k): f"models:/{student_name}@{_alias(k)}" for k in versions},
        "moved": {str(k): reason for k, reason in moved.items()},
        "summary": f"{first}, {student_name} v" + ", v".join(v.version for v in versions.values()),
    }


def method_in(taught: Done) -> str:
    """By which a teacher was trained, as far as it says."""
    provenance = json.loads((taught.folder / "model" / "model.json").read_text())["provenance"]
    return str(provenance.get("training", {}).get("method", "unknown"))


def starts_of(config: RunConfig) -> dict[int, int]:
    """k -> the k whose student that of k starts from."""
    rounds = {one.name: one for one in rounds_of(config.distill, schedule_of(config))}
    return {
        k: rounds[start].ks[0]
        for one in rounds.values()
        for k in one.ks
        for start in one.starts.values()
        if rounds[start].ks
    }


def _common(run: StageRun, prepared: Done, measured: Done) -> dict[str, str]:
    """What all versions of this run have in common: the data, and how they were measured."""
    config, result = run.context.config, measured.result
    return {
        "recipe": config.recipe,
        "data_fingerprint": prepared.result["fingerprint"],
        "data_source": config.data.source,
        "data_count": str(prepared.result["count"]),
        "data_shape": "x".join(map(str, prepared.result["shape"])),
        # A gate that is changed alone makes no new version: it is written to the one that is there.
        "config_hash": digest(config.model_dump(mode="json", exclude={"gate"})),
        "git_commit": git_commit(),
        "evaluation": measured.identity,
        "evaluation_run": run.context.tracker.resolve(measured.run_id),
        "features": result["features"],
        "samples": str(result["samples"]),
        "seeds": str(result["seeds"]),
        "reference": digest(result["reference"]["fingerprint"]),
        "reference_count": str(result["reference_count"]),
    }


def _figures(row: dict[str, Any]) -> dict[str, str]:
    values = {"frechet": row["frechet"]["mean"], "frechet_spread": row["frechet"]["spread"]}
    values |= {name: row[name]["mean"] for name in ("precision", "recall") if name in row}
    return {name: f"{value:.6g}" for name, value in values.items()}


def _version(registry: Registry, name: str, source: Done, tags: dict[str, str], gate: Gate) -> Version:
    """The version of this very model and measurement: found if an interrupted run had registered it, else new."""
    own = {"identity": source.identity}
    asked = own | {tag: tags[tag] for tag in ("config_hash", "evaluation")}
    found = registry.find_version(name, asked)
    tags = tags | own | {"gate": gate_tag(gate)}
    if found is None:
        return registry.register(
            run_id=registry.tracker.resolve(source.run_id), name=name, folder=source.folder / "model", tags=tags
        )
    registry.set_tags(found, {"gate": tags["gate"]})
    return Version(found.name, found.version, found.tags | {"gate": tags["gate"]}, found.run_id)


def _alias(k: int) -> str:
    return f"k{k}-champion"
