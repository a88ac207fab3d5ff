"""register: the teacher and the students become versions in the model registry, with their lineage; aliases mark the best."""

from __future__ import annotations

from typing import Any

from workflows.config import digest
from workflows.context import Context, Done, StageRun, run_stage
from workflows.runtime.tracking import Registered
from workflows.runtime.workspace import code_version, git_commit

CODE = ("workflows/stages/register.py", "workflows/runtime/tracking.py", "workflows/runtime/pyfunc_model.py")


def register(context: Context, prepared: Done, taught: Done, students: dict[int, Done], measured: Done) -> Done:
    depends = {
        "teacher": taught.identity,
        "students": {k: s.identity for k, s in students.items()},
        "evaluate": measured.identity,
        "tracking": context.tracker.uri,
        "code": code_version(*CODE),
    }
    shown = {"tracking": context.tracker.uri}
    return run_stage(
        context,
        "register",
        depends=depends,
        config=shown,
        body=lambda run: _body(run, prepared, taught, students, measured),
    )


def _body(run: StageRun, prepared: Done, taught: Done, students: dict[int, Done], measured: Done) -> dict[str, Any]:
    context, recipe = run.context, run.context.config.recipe
    context.settle()  # the registry has to answer, and to know the runs that the models come from
    teacher_name, student_name = f"mmdistill-{recipe}-teacher", f"mmdistill-{recipe}-student"
    rows = {(row["who"], row["sampler"], row["k"]): row for row in measured.result["rows"]}
    common = {
        "recipe": recipe,
        "data_fingerprint": prepared.result["fingerprint"],
        "config_hash": digest(context.config.model_dump(mode="json")),
        "git_commit": git_commit(),
        "samples": str(measured.result["samples"]),
        "reference": digest(measured.result["reference"]["fingerprint"]),
    }
    with context.screen.bars() as screen:
        bar = screen.bar("register", 1 + len(students), unit="models")
        most = max(k for who, sampler, k in rows if who == "teacher" and sampler == "ancestral")
        teacher_row = rows["teacher", "ancestral", most]
        tags = common | {
            "k": str(most),
            "method": "denoising",
            "frechet": f"{teacher_row['frechet']['mean']:.6g}",
        }
        teacher = _version(run, teacher_name, taught, tags)
        bar.update(1)
        versions = {}
        for i, (k, student) in enumerate(students.items()):
            row = rows["student", "ancestral", k]
            tags = common | {
                "k": str(k),
                "method": context.config.distill.for_k(k).method,
                "frechet": f"{row['frechet']['mean']:.6g}",
                "frechet_spread": f"{row['frechet']['spread']:.6g}",
                "recall": f"{row['recall']['mean']:.6g}",
                "teacher_name": teacher.name,
                "teacher_version": teacher.version,
            }
            versions[k] = _version(run, student_name, student, tags)
            bar.update(2 + i)
    moved = {k: _champion(context, student_name, k, version) for k, version in versions.items()}
    first = f"{teacher.name} v{teacher.version}"
    return {
        "identity": digest([teacher.uri, {k: v.uri for k, v in versions.items()}], 16),
        "teacher": teacher.uri,
        "students": {str(k): v.uri for k, v in versions.items()},
        "champions": {str(k): f"models:/{student_name}@{_alias(k)}" for k in versions},
        "moved": {str(k): reason for k, reason in moved.items()},
        "summary": f"{first}, {student_name} v" + ", v".join(v.version for v in versions.values()),
    }


def _version(run: StageRun, name: str, source: Done, tags: dict[str, str]) -> Registered:
    """The version of this very model: found if an interrupted run had registered it, else new."""
    tracker, own = run.context.tracker, {"identity": source.identity}
    found = tracker.find_version(name, own | {"config_hash": tags["config_hash"]})
    run_id = tracker.resolve(source.run_id)
    return found or tracker.register(run_id=run_id, name=name, folder=source.folder / "model", tags=tags | own)


def _alias(k: int) -> str:
    return f"k{k}-champion"


def _champion(context: Context, name: str, k: int, new: Registered) -> str:
    """Moves the alias only if the new version's distance is lower, with as many samples, data and reference the same."""
    tracker = context.tracker
    holder = tracker.alias(name, _alias(k))
    if holder == new.version:
        return "is the champion"
    if holder is not None:
        old, own = tracker.version_tags(name, holder), tracker.version_tags(name, new.version)
        comparable = all(old.get(tag) == own.get(tag) for tag in ("data_fingerprint", "samples", "reference"))
        if comparable and not float(own["frechet"]) < float(old["frechet"]):
            return f"stays with version {holder}: {old['frechet']} against {own['frechet']}"
        if not comparable:
            context.screen.line(
                f"[yellow]![/] {_alias(k)}: version {holder} was measured on other data, counts or features; not compared"
            )
            return f"stays with version {holder}: measured on other data or counts"
    tracker.set_alias(name, _alias(k), new.version)
    return f"moved to version {new.version}"
