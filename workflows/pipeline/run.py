"""The pipeline: the order of the stages, and what each hands to the next.

prepare -> teacher -> distill (each k) -> evaluate -> register -> report
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from workflows.cluster.addresses import check_environment
from workflows.cluster.session import Monitor, Workers, present, ray_session, require
from workflows.cluster.stopping import listening
from workflows.config.schema import ConfigError, RunConfig, digest
from workflows.dataset.reference import check_inputs, check_reference
from workflows.errors import UserError, seconds_of
from workflows.rendering.screen import Screen
from workflows.session.context import Context, Done, Placement, settle
from workflows.storage.uri import join, shown
from workflows.storage.workspace import Workspace, git_commit, write_json
from workflows.tracking.tracker import Tracker, address_of, origin
from workflows.training.crew import resized_every
from workflows.training.job import Every

if TYPE_CHECKING:
    from workflows.sweep.options import SweepOptions
    from workflows.sweep.space import Space

STAGES = ("prepare", "teacher", "distill", "evaluate", "register", "report")
WAIT, A_WHILE = 120.0, 10.0
"""Seconds that the end of a run waits for a tracking store that is away; and that a run which failed waits for the delivery."""


@dataclass(frozen=True)
class RunOptions:
    """How to run, as against what to run: none of it is part of a stage's key."""

    workspace: str | Path
    tracking_uri: str | None = None
    workers: str | int | None = None
    checkpoint_every: str | None = None
    at_once: int | None = None
    gpu: bool | None = None
    force: tuple[str, ...] = ()
    until: str = "report"
    tracking_wait: float | None = None


def check_options(config: RunConfig, options: RunOptions) -> None:
    """Raises ConfigError for a stage or a number of workers that can't be, before anything starts."""
    each = tuple(f"distill-k{k}" for k in config.distill.k)
    for name in options.force:
        if name not in STAGES + each:
            raise ConfigError(f"--force: {name!r} is not a stage; stages: {', '.join(STAGES + each)}")
    if options.until not in STAGES:
        raise ConfigError(f"--until: {options.until!r} is not a stage; stages: {', '.join(STAGES)}")
    every_of(options)
    if (workers := workers_of(options)) is not None:
        sections = {f"distill.batch (k = {k})": config.distill.for_k(k) for k in config.distill.k}
        least = {name: (own.batch, 2 if own.update == "instant" else 1) for name, own in sections.items()}
        for name, (batch, images) in {"teacher.batch": (config.teacher.batch, 1), **least}.items():
            if batch < workers.most * images:
                raise ConfigError(
                    f"--workers: {workers.most} is more than {name} {batch} has images for, {images} each"
                )


def run_pipeline(config: RunConfig, options: RunOptions, screen: Screen) -> dict[str, Any]:
    """Runs the stages up to `options.until`, reusing what is done; returns the summary, which is also beside the report.

    Raises UserError or ConfigError for what the user can mend.
    """
    check_options(config, options)
    check_inputs(config)
    began, done = time.monotonic(), []
    with open_context(config, options, screen) as context:
        for name, finished in _stages(context):
            done += finished
            if name == options.until:
                break
        summary = _summary(context, done, time.monotonic() - began)
        if options.until == STAGES[-1]:
            folder = context.workspace.report(config.recipe)
            shutil.copyfile(done[-1].folder / "report.html", folder / "report.html")
            summary["report"] = join(context.workspace.uri, "reports", config.recipe, "report.html")
            summary["report_here"] = str(folder / "report.html")
            write_json(folder / "summary.json", summary)
            context.workspace.share_report(config.recipe)
            for name in ("report.html", "summary.json"):
                context.tracker.log_artifact(context.parent_run, folder / name)
    return summary


def run_sweep(
    config: RunConfig,
    options: RunOptions,
    screen: Screen,
    *,
    space: Space,
    how: SweepOptions | None = None,
    out: Path | None = None,
    name: str = "sweep",
) -> list[dict[str, Any]]:
    """The teacher, made or reused, and a sweep over students of it; returns the means over seeds, best first for each k. The report
    is in reports/<recipe>-<name>; `out` gets the rows.
    """
    from workflows.sweep.best import register_best
    from workflows.sweep.options import SweepOptions, check_room, check_sweep, warmed
    from workflows.sweep.report import rows_of, write_report
    from workflows.sweep.run import sweep
    from workflows.sweep.table import show, summarise

    how = check_sweep(space, how or SweepOptions())
    config = warmed(config, how.warm_start)
    check_inputs(config)
    apart = (space.described, how.search, how.scheduler, how.warm_start)
    with open_context(config, options, screen, kind=name, apart=apart) as context:
        check_room(how, context.resources)
        stages = _stages(context)
        (_, [prepared]), (_, [taught]) = next(stages), next(stages)
        ledger = sweep(context, prepared, taught, space, how, options.at_once)
        made = register_best(ledger, prepared, taught) if how.register and ledger.best() else None
        where = write_report(ledger, prepared, taught, made, name) if ledger.rows else ""
        if where and out:
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(context.workspace.report(f"{config.recipe}-{name}") / "trials.json", out)
        show(rows_of(ledger), screen)
        screen.line(f"Report: [bold]{escape(where)}[/]" if where else "No trial has ended yet.")
        if ledger.error:
            raise ledger.error
    return summarise(rows_of(ledger))


@contextmanager
def open_context(
    config: RunConfig, options: RunOptions, screen: Screen, *, kind: str = "pipeline", apart: tuple[Any, ...] = ()
) -> Iterator[Context]:
    """The workspace locked, the tracking store open with a parent run of this `kind`, and Ray up, for the length of the block.
    `apart`: what beside the configuration makes it another run.
    """
    check_environment()
    wait = wait_of(options)
    resized_every()
    workspace = Workspace(options.workspace)
    with ExitStack() as stack:
        stack.enter_context(workspace.explained())
        stack.enter_context(workspace.lock())
        uri = address_of(options.tracking_uri, workspace.default_tracking_uri)
        told = f"  tracking {shown(uri)}{origin(uri)}" if origin(uri) else ""
        screen.line(
            f"[bold]mmdistill[/]  recipe [bold]{config.recipe}[/]  [dim]workspace {escape(shown(workspace.uri) + told)}[/]"
        )
        opened = stack.enter_context(_tracked(config, options, screen, workspace, uri, kind, apart))
        with screen.status("starting Ray and opening the tracking store"):
            resources = stack.enter_context(ray_session(say=lambda text: screen.line(f"  [dim]{escape(text)}[/]")))
            monitor = Monitor()
            queued, tracker, parent, pipeline = opened()
        if queued:
            screen.line(f"  tracking: delivering {queued} entries that an earlier run had queued")
            settle(tracker, screen, wait)
        stopping = stack.enter_context(listening())  # after Ray, which has a handler of its own
        placement = place(config, options, resources, present())
        _say_room(options, placement, resources, screen)
        fewest = max(placement.teacher_workers.fewest, placement.student_workers.fewest)
        require(resources, cpus=fewest, gpus=fewest if placement.use_gpu else 0)
        yield Context(
            config=config,
            workspace=workspace,
            screen=screen,
            tracker=tracker,
            parent_run=parent,
            pipeline=pipeline,
            resources=resources,
            force=frozenset(options.force),
            monitor=monitor,
            stopping=stopping,
            placement=placement,
            every=every_of(options),
            tracking_wait=wait,
        )


Opened = tuple[int, Tracker, str, str]
"""How much an earlier run had queued, the tracking store, the parent run, and the name by which the workspace knows it."""


@contextmanager
def _tracked(
    config: RunConfig,
    options: RunOptions,
    screen: Screen,
    workspace: Workspace,
    uri: str,
    kind: str,
    apart: tuple[Any, ...],
) -> Iterator[Callable[[], Opened]]:
    """The tracking store is opened while the block starts Ray, which takes as long; the block calls what it is given to wait for
    the store. At the block's end the run is marked by how that ended, and waits for the delivery.
    """
    with ExitStack() as stack, ThreadPoolExecutor(1, thread_name_prefix="tracking") as thread:

        def begin() -> Opened:
            tracker = stack.enter_context(open_tracker(workspace, uri, screen))
            queued = tracker.pending
            pipeline = f"{config.recipe}-{digest([config.model_dump(mode='json'), tracker.uri, kind, *apart])}"
            return queued, tracker, _parent_run(config, workspace, tracker, kind, pipeline), pipeline

        opening = thread.submit(begin)
        try:
            yield opening.result
        except BaseException as error:
            if opening.exception() is None:  # waits for it
                _, tracker, parent, _ = opening.result()
                _ended_by(error, tracker, parent, screen, options)
            raise
        _, tracker, parent, _ = opening.result()
        try:
            tracker.end_run(parent)
            settle(tracker, screen, wait_of(options))
        finally:
            say_what_is_queued(tracker, screen, options.workspace)


@contextmanager
def open_tracker(workspace: Workspace, uri: str, screen: Screen) -> Iterator[Tracker]:
    """The tracking store with the workspace's outbox for it; the workspace has to be locked."""

    def say(text: str) -> None:
        screen.line(f"[yellow]![/] {escape(text)}")

    tracker = Tracker(uri, artifacts=workspace.default_artifacts, outbox=workspace.outbox, say=say)
    try:
        yield tracker
    finally:
        tracker.close()


def _ended_by(error: BaseException, tracker: Tracker, run_id: str, screen: Screen, options: RunOptions) -> None:
    """A store that stays away must not hide the error, nor hold it up for long."""
    with suppress(UserError):
        tracker.end_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
    with suppress(UserError):
        settle(tracker, screen, 0 if tracker.away else min(wait_of(options), A_WHILE))
    say_what_is_queued(tracker, screen, options.workspace)


def wait_of(options: RunOptions) -> float:
    """Seconds to wait for the tracking store: the option, MMDISTILL_TRACKING_WAIT, or 120."""
    if options.tracking_wait is not None:
        return options.tracking_wait
    return seconds_of("MMDISTILL_TRACKING_WAIT", WAIT)


def say_what_is_queued(tracker: Tracker, screen: Screen, workspace: str | Path) -> None:
    if tracker.pending:
        where = f" --workspace {quote(str(workspace))}" if str(workspace) != ".mmdistill" else ""
        screen.line(
            f"[yellow]![/] tracking: {tracker.pending} entries for {escape(tracker.uri)} are queued in the workspace; "
            f"its next run delivers them, or: mmdistill deliver{escape(where)} --tracking-uri {escape(quote(tracker.uri))}"
        )


def _stages(context: Context) -> Iterator[tuple[str, list[Done]]]:
    from workflows.stages.distill import distill
    from workflows.stages.evaluate import evaluate
    from workflows.stages.prepare import prepare
    from workflows.stages.register import register
    from workflows.stages.report import report
    from workflows.stages.teacher import teacher

    prepared = prepare(context)
    check_reference(context.config, str(prepared.folder / "statistics"), prepared.result)
    yield "prepare", [prepared]
    taught = teacher(context, prepared)
    yield "teacher", [taught]
    students = distill(context, prepared, taught)
    yield "distill", list(students.values())
    measured = evaluate(context, prepared, taught, students)
    yield "evaluate", [measured]
    registered = register(context, prepared, taught, students, measured)
    yield "register", [registered]
    yield "report", [report(context, prepared, taught, students, measured, registered)]


def workers_of(options: RunOptions) -> Workers | None:
    """Raises ConfigError."""
    try:
        return None if options.workers is None else Workers.of(options.workers)
    except ValueError:
        raise ConfigError(f"--workers: {options.workers!r} should be a number, or fewest:most such as 2:8") from None


def every_of(options: RunOptions) -> Every:
    """Raises ConfigError."""
    try:
        return Every() if options.checkpoint_every is None else Every.of(options.checkpoint_every)
    except ValueError:
        raise ConfigError(
            f"--checkpoint-every: {options.checkpoint_every!r} should be images, such as 64000, or minutes, such as 10m"
        ) from None


def place(
    config: RunConfig, options: RunOptions, resources: dict[str, float], there: dict[str, float] | None = None
) -> Placement:
    """Workers of each training, and trainings at once, of `resources`, which the cluster has or may have. By default the teacher
    takes what is there now (`there`), and students share it, each with one worker: small networks gain more from company than from
    more workers. A cluster is made to grow by --workers alone.
    """
    now = resources if there is None else there
    use_gpu = resources.get("GPU", 0) >= 1 if options.gpu is None else options.gpu
    asked = workers_of(options)
    slots = slots_of(now if asked is None else resources, use_gpu)
    teacher = min(slots, config.teacher.batch)
    student = asked or Workers(1, 1)
    return Placement(
        teacher_workers=asked or Workers(teacher, teacher),
        student_workers=student,
        at_once=options.at_once or max(1, slots // student.most),
        use_gpu=use_gpu,
    )


def slots_of(resources: dict[str, float], use_gpu: bool) -> int:
    """Workers that there is room for, one at least."""
    return max(1, int(resources.get("GPU" if use_gpu else "CPU", 0)))


def _say_room(options: RunOptions, placement: Placement, resources: dict[str, float], screen: Screen) -> None:
    """Where the cluster may grow beyond what is used by default."""
    most, used = slots_of(resources, placement.use_gpu), placement.teacher_workers.most
    if options.workers is None and most > placement.at_once:
        kind = "GPUs" if placement.use_gpu else "CPUs"
        screen.line(
            f"  [dim]workers: {used}, for the {kind} that are there now; the cluster may have {most}: --workers {used}:{most}[/]"
        )


def _summary(context: Context, done: list[Done], seconds: float) -> dict[str, Any]:
    """summary.json: what ran, what was reused, and the figures as far as they go."""
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
    if any(one["times"] for one in stops):
        summary["interruptions"] = {name: sum(one[name] for one in stops) for name in ("times", "again", "away")}
    if "evaluate" in by_name:
        result = by_name["evaluate"].result
        registered = by_name["register"].result if "register" in by_name else {"students": {}}
        rows = {(r["who"], r["sampler"], r["k"]): r for r in result["rows"]}
        summary |= {
            "floor": result["floor"]["frechet"],
            "samples": result["samples"],
            "seeds": result["seeds"],
            "features": result["features"],
            "counts": result["counts"],
            "warnings": result["warnings"],
        }
        most = max(k for who, sampler, k in rows if (who, sampler) == ("teacher", "ancestral"))
        summary["teacher_longest"] = {"k": most, "frechet": rows["teacher", "ancestral", most]["frechet"]["mean"]}
        best = min((r for r in result["rows"] if r["who"] == "teacher"), key=lambda r: r["frechet"]["mean"])
        summary["teacher_best"] = {"sampler": best["sampler"], "k": best["k"], "frechet": best["frechet"]["mean"]}
        summary["students"] = [
            {
                "k": k,
                "frechet": rows["student", "ancestral", k]["frechet"]["mean"],
                "frechet_spread": rows["student", "ancestral", k]["frechet"]["spread"],
                "teacher_frechet_same_k": rows["teacher", "ancestral", k]["frechet"]["mean"],
                "model_uri": registered["students"].get(str(k)),
                "seconds": round(by_name[f"distill-k{k}"].seconds, 1),
                "nfe": rows["student", "ancestral", k]["nfe"],
            }
            for k in sorted(config.distill.k)
        ]
    return summary


def _parent_run(config: RunConfig, workspace: Workspace, tracker: Tracker, kind: str, pipeline: str) -> str:
    """The parent of the stages' runs: of this resolved configuration in this store, gone on with or new."""
    record = workspace.read_note(f"pipelines/{pipeline}.json") or {}
    if "run_id" in record and tracker.resume_run(run_id := str(record["run_id"])):
        return tracker.resolve(run_id)
    run_id = tracker.start_run(
        f"{config.recipe} {kind}", tags={"mmdistill.recipe": config.recipe, "git_commit": git_commit()}
    )
    workspace.write_note(f"pipelines/{pipeline}.json", (record or {"stages": {}}) | {"run_id": run_id})
    tracker.log_params(run_id, config.model_dump(mode="json"))
    tracker.log_text(run_id, config.yaml(), "config.yaml")
    return run_id
