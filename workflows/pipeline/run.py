"""Runs the pipeline: the order of the stages, and what each passes to the next.

prepare -> teacher -> distill (each round) -> evaluate -> register -> report
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

from workflows.config.assembly import rounds_of, schedule_of
from workflows.config.places import with_absolute_places
from workflows.config.schema import RunConfig
from workflows.dataset.reference import check_inputs, check_reference
from workflows.errors import ConfigError
from workflows.rendering.screen import Screen
from workflows.session.context import Context, Done
from workflows.session.opening import open_context
from workflows.session.options import RunOptions, every_of, workers_of
from workflows.session.results import Results
from workflows.storage.local import write_json

AS_MEASURED = ("samples", "seeds", "features", "chosen_by", "compared_by", "spaces", "rows", "counts", "warnings")
"""What the summary takes from the evaluation as it is."""
STAGES = ("prepare", "teacher", "distill", "evaluate", "register", "report")


def check_options(config: RunConfig, options: RunOptions) -> None:
    """Raises ConfigError for an unknown stage or an impossible number of workers, before anything starts."""
    rounds = rounds_of(config.distill, schedule_of(config))
    stages = (*STAGES, *(f"distill-{r.name}" for r in rounds))
    for name in options.force:
        if name not in stages:
            raise ConfigError(f"--force: {name!r} is not a stage; stages: {', '.join(stages)}")
    if options.until not in STAGES:
        raise ConfigError(f"--until: {options.until!r} is not a stage; stages: {', '.join(STAGES)}")
    every_of(options)
    if (workers := workers_of(options)) is not None:
        # name of a setting -> (its value, the fewest images that a worker can take)
        batches = {"teacher.batch": (config.teacher.batch, 1)}
        for r in rounds:
            batches[f"distill.batch ({r.name})"] = config.distill.for_round(r).batch, r.method.halves
        for name, (batch, images) in batches.items():
            if batch < workers.most * images:
                raise ConfigError(
                    f"--workers: {workers.most} workers need {name} of at least {workers.most * images}; it is {batch}"
                )


def run_pipeline(config: RunConfig, options: RunOptions, screen: Screen) -> dict[str, Any]:
    """Runs the stages up to `options.until`, reusing finished ones. Returns the summary, which is also written beside the report.

    Raises UserError or ConfigError for what the user can fix.
    """
    check_options(config, options)
    config = with_absolute_places(config)
    check_inputs(config)
    began, done = time.monotonic(), []
    with open_context(config, options, screen) as context:
        for name, finished in stages_of(context):
            done += finished
            if name == options.until:
                break
        summary = _summary(context, done, time.monotonic() - began)
        if options.until == STAGES[-1]:
            folder = context.workspace.report(config.recipe)
            for name in done[-1].result["artifacts"]:
                shutil.copyfile(done[-1].folder / name, folder / name)
            summary["report"] = context.workspace.report_uri(config.recipe)
            summary["report_here"] = str(folder / "report.html")
            write_json(folder / "summary.json", summary)
            context.workspace.share_report(config.recipe)
            for name in (*done[-1].result["artifacts"], "summary.json"):
                context.tracker.log_artifact(context.parent_run, folder / name)
    return summary


def stages_of(context: Context) -> Iterator[tuple[str, list[Done]]]:
    """Runs one stage after the other. Yields the name and what was finished: a `Done` per round for distill, else one."""
    from workflows.stages.distill import distill
    from workflows.stages.evaluate import evaluate
    from workflows.stages.prepare import prepare
    from workflows.stages.register import register
    from workflows.stages.report import report
    from workflows.stages.teacher import teacher

    prepared = prepare(context)
    check_reference(context.config, str(prepared.folder), prepared.result)
    yield "prepare", [prepared]
    trained = teacher(context, prepared)
    yield "teacher", [trained]
    distilled = distill(context, prepared, trained)
    students = distilled.students
    yield "distill", list(distilled.rounds.values())
    measured = evaluate(context, prepared, trained, students)
    yield "evaluate", [measured]
    registered = register(context, prepared, trained, students, measured)
    yield "register", [registered]
    yield "report", [report(context, prepared, trained, distilled, measured, registered)]


def _summary(context: Context, done: list[Done], seconds: float) -> dict[str, Any]:
    """summary.json: what ran, what was reused, and the figures that exist so far."""
    config, resolve = context.config, context.tracker.resolve
    by_name = {d.name: d for d in done}
    summary: dict[str, Any] = {
        "recipe": config.recipe,
        "tracking": context.tracker.uri,
        "seconds": round(seconds, 1),
        "stages": [
            {"name": d.name, "run_id": resolve(d.run_id), "seconds": round(d.seconds, 1), "reused": d.reused}
            for d in done
        ],
    }
    stops = [d.result["interruptions"] for d in done if "interruptions" in d.result]
    if any(stop["times"] for stop in stops):
        summary["interruptions"] = {name: sum(stop[name] for stop in stops) for name in ("times", "again", "away")}
    if "evaluate" not in by_name:
        return summary
    result = by_name["evaluate"].result
    uris = by_name["register"].result["students"] if "register" in by_name else {}
    results = Results.of(result)
    longest, best = results.longest, results.best_of_teacher
    rounds = {k: r.name for r in rounds_of(config.distill, schedule_of(config)) for k in r.ks}
    return summary | {
        "floor": result["floor"]["frechet"],
        "floors": result["floor"],
        "floor_of": result["floor_of"],
        "reference_rows": result["reference"]["fingerprint"]["rows"],
        **{name: result[name] for name in AS_MEASURED},
        "teacher_longest": {"k": longest["k"], "frechet": longest["frechet"]["mean"]},
        "teacher_best": {"sampler": best["sampler"], "k": best["k"], "frechet": best["frechet"]["mean"]},
        "students": [
            {
                "k": k,
                "frechet": results.students[k]["frechet"]["mean"],
                "frechet_spread": results.students[k]["frechet"]["spread"],
                "teacher_frechet_same_k": results.teachers[k]["frechet"]["mean"],
                "model_uri": uris.get(str(k)),
                "seconds": round(by_name[f"distill-{rounds[k]}"].seconds, 1),
                "nfe": results.students[k]["nfe"],
            }
            for k in sorted(config.distill.k)
        ],
    }
