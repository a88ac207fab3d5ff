"""register: adds the teacher and the students to the model registry as versions, and moves the aliases of the best students.

Lineage and metrics are tags of the versions, so `mmdistill lineage` and `promote` need no workspace.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
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
from workflows.storage.local import write_json

CODE = (
    "workflows/stages/register.py",
    "workflows/registry/promote.py",
    "workflows/registry/versions.py",
    "workflows/registry/pyfunc_model.py",
)


def register(context: Context, prepared: Done, trained: Done, students: dict[int, Done], measured: Done) -> Done:
    depends = {
        "teacher": trained.identity,
        "students": {k: s.identity for k, s in students.items()},
        "evaluate": measured.identity,
        "gate": context.config.gate.model_dump(),
        "tracking": context.tracker.uri,
        "code": code_version(*CODE),
    }
    return run_stage(
        context,
        "register",
        depends=depends,
        params={"tracking": context.tracker.uri},
        body=lambda run: _register(run, prepared, trained, students, measured),
        missing=lambda result: _missing(context, result, trained, students),
    )


def _missing(context: Context, result: dict[str, Any], trained: Done, students: dict[int, Done]) -> str | None:
    """The first version of `result` that the registry no longer has, in words, or None. A store that was set up anew has none of
    them. If the store is away, returns None.
    """
    registry = Registry(context.tracker)
    models = [(result["teacher"], trained)] + [(result["students"].get(str(k)), done) for k, done in students.items()]
    for uri, done in models:
        name, _, number = str(uri).removeprefix("models:/").rpartition("/")
        try:
            version = registry.version(name, number)
        except UserError:
            return None
        if version is None or version.tags.get("identity") != done.identity:
            return f"the registry of {context.tracker.uri} has no {name} v{number} of this run"
    return None


def _register(
    run: StageRun, prepared: Done, trained: Done, students: dict[int, Done], measured: Done
) -> dict[str, Any]:
    context, config = run.context, run.context.config
    context.settle()  # the registry must answer, and must know the runs that the models come from
    registry, results = Registry(context.tracker), Results.of(measured.result)
    student_name = f"mmdistill-{config.recipe}-student"
    common, starts = _common_tags(run, prepared, measured), starts_of(config)
    with context.screen.bars() as screen:
        bar = screen.bar("register", 1 + len(students), unit="models")
        row = results.longest
        no_gate = Gate(teacher_ratio=None, recall=0)  # the recipe's gate is for students
        tags = common | {"role": "teacher", "k": str(row["k"]), "method": method_in(trained)} | _figures(row)
        teacher = _version(registry, f"mmdistill-{config.recipe}-teacher", trained, tags, no_gate)
        bar.update(1)
        versions: dict[int, Version] = {}
        for k, student in students.items():
            tags = common | {
                "role": "student",
                "k": str(k),
                "method": config.distill.method,
                "teacher_name": teacher.name,
                "teacher_version": teacher.version,
                "teacher_frechet": f"{results.teachers[k]['frechet']['mean']:.6g}",
            }
            tags |= _figures(results.students[k])
            versions[k] = _version(registry, student_name, student, tags, config.gate.for_k(k))
            bar.update(1 + len(versions))
        for k, version in versions.items():
            if (start := starts.get(k)) in versions:
                registry.set_tags(version, {"start_name": student_name, "start_version": versions[start].version})
    moved = {}
    for k, version in versions.items():
        outcome = promote(registry, version, _alias(k), who=user(), why=f"run {run.run_id}", better=True)
        moved[str(k)] = outcome.text.removeprefix(f"{_alias(k)}: ")
        if outcome.refused:
            context.screen.line(f"[yellow]![/] {escape(outcome.text)}")
    return {
        "identity": digest([teacher.uri, {k: v.uri for k, v in versions.items()}], 16),
        "teacher": teacher.uri,
        "students": {str(k): v.uri for k, v in versions.items()},
        "champions": {str(k): f"models:/{student_name}@{_alias(k)}" for k in versions},
        "moved": moved,
        "summary": f"{teacher.title}, {student_name} v" + ", v".join(v.version for v in versions.values()),
    }


def method_in(trained: Done) -> str:
    """The method by which a teacher was trained, or "unknown" if its model.json does not say."""
    return str(trained.model_description["provenance"].get("training", {}).get("method", "unknown"))


def starts_of(config: RunConfig) -> dict[int, int]:
    """k -> the k of the student that the k-step student starts from."""
    rounds = {r.name: r for r in rounds_of(config.distill, schedule_of(config))}
    return {
        k: rounds[start].ks[0] for r in rounds.values() for k in r.ks for start in r.starts.values() if rounds[start].ks
    }


def _common_tags(run: StageRun, prepared: Done, measured: Done) -> dict[str, str]:
    """The tags that all versions of this run share: the data, and how the models were measured."""
    config, result = run.context.config, measured.result
    return {
        "recipe": config.recipe,
        "data_fingerprint": prepared.result["fingerprint"],
        "data_source": config.data.source,
        "data_count": str(prepared.result["count"]),
        "data_shape": "x".join(map(str, prepared.result["shape"])),
        # Without the gate: if only the gate changes, it is written to the existing version.
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
    """The version of this model with this measurement: the one that an interrupted run registered, or a new one."""
    tags = tags | {"identity": source.identity, "gate": gate_tag(gate)}
    version = registry.find_version(name, {tag: tags[tag] for tag in ("identity", "config_hash", "evaluation", "k")})
    if version is None:
        run_id = registry.tracker.resolve(source.run_id)
        with _sampled_in(int(tags["k"]), source) as folder:
            return registry.register(run_id=run_id, name=name, folder=folder, tags=tags)
    registry.set_tags(version, {"gate": tags["gate"]})
    return replace(version, tags=version.tags | {"gate": tags["gate"]})


@contextmanager
def _sampled_in(k: int, source: Done) -> Iterator[Path]:
    """The model folder, with k as its default number of steps. A student of several k is a version for each."""
    folder, description = source.folder / "model", source.model_description
    if str(k) not in description.get("samplers", {}) or description["k"] == k:
        yield folder
        return
    with TemporaryDirectory() as scratch:
        own = Path(scratch) / folder.name
        shutil.copytree(folder, own)
        write_json(own / "model.json", description | {"k": k})
        yield own


def _alias(k: int) -> str:
    return f"k{k}-champion"
