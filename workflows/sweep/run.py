"""Runs a sweep: many distillations of one teacher on Ray Tune, over any field of the distill section, several at once.

The same command resumes an interrupted sweep. Trials that ended are in the workspace (ledger.py), others resume from their
checkpoints (trial.py). Tune's own records are not needed, and are thrown away.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from workflows.cluster.session import run_together
from workflows.config.assembly import method_of, schedule_of
from workflows.config.places import with_absolute_places
from workflows.config.schema import RunConfig
from workflows.dataset.reference import check_inputs
from workflows.errors import UserError
from workflows.pipeline.run import stages_of
from workflows.rendering.screen import Screen
from workflows.session.context import Context, Done
from workflows.session.opening import open_context
from workflows.session.options import RunOptions
from workflows.stages.teacher import data_uri
from workflows.storage.store import fetch
from workflows.sweep.ledger import Ledger
from workflows.sweep.options import SweepOptions, check_room, check_sweep
from workflows.sweep.space import Point, Space, section, shares
from workflows.sweep.table import described
from workflows.sweep.trial import Shared, Trial, run_trial

if TYPE_CHECKING:
    from workflows.sweep.search import Search, Source

RETRIES = 3
"""Retries of a trial that an error ended."""


def sweep(
    context: Context, prepared: Done, trained: Done, space: Space, options: SweepOptions, at_once: int | None
) -> Ledger:
    """Runs the trials that are left, `at_once` in parallel, by default as many as fit. A trial that diverges is a row like others.
    One that an error ended is not, and sets `ledger.crash`. Raises ConfigError for an invalid combination of values.
    """
    from workflows.sweep.search import Search

    ledger = Ledger(context, prepared, trained, space, options)
    at_once = at_once or _fit_at_once(context.resources, options)
    sources, total, known = sources_of(ledger)
    _introduce(ledger, total, at_once, sum(map(ledger.is_done, known)))
    search = Search(sources, offer=ledger.offer, may_begin=ledger.may_begin, crashed=ledger.crashed)
    with context.screen.bars() as screen:
        bar = screen.bar("sweep", total, unit="trials")

        def progress() -> None:
            leader = min(ledger.best().values(), key=lambda row: float(row["frechet"]), default=None)
            bar.update(ledger.completed, f"best so far: {described(leader, space.fields)}" if leader else "")

        ledger.progress, scheduler = progress, _scheduler(ledger)
        try:
            if search.begin():
                shared = _share(context, prepared, trained, options)
                _tune(ledger, search, scheduler, shared, total=total, at_once=at_once)
        except BaseException as error:
            ledger.abandon(error)
            screen.line(f"  sweep: {_kept(ledger, total)}")
            raise
        ledger.abandon(KeyboardInterrupt())
    if ledger.running:
        context.screen.line(
            f"  sweep: --hours {options.hours:g} are over: {_kept(ledger, total)}; the same command continues"
        )
    return ledger


def _fit_at_once(resources: dict[str, float], options: SweepOptions) -> int:
    slots = [resources.get(name, 0) / each for name, each in (("CPU", options.cpus), ("GPU", options.gpus)) if each]
    return max(1, int(min(slots, default=1)))


def points_of(ledger: Ledger) -> dict[int, list[Point]]:
    """The points of a grid or of random draws, by k. Raises ConfigError for an invalid combination of values."""
    config, space, options = ledger.context.config, ledger.space, ledger.options
    if options.search == "grid":
        points = {k: space.grid(k) for k in space.ks}
    else:
        points = {k: space.drawn(k, n, config.seed) for k, n in shares(space.ks, options.trials).items()}
    for k, own in points.items():
        for point in own:
            section(config, k, point)
    return points


def sources_of(ledger: Ledger) -> tuple[dict[int, Source], int, list[Point]]:
    """The source of points for each k, in the order to try them; the number of points in all; and those known in advance."""
    from workflows.sweep.search import Listed, Tpe

    space, options, seed = ledger.space, ledger.options, ledger.context.config.seed
    if options.search != "tpe":
        listed = points_of(ledger)
        known = [point for points in listed.values() for point in points]
        return {k: Listed(points) for k, points in listed.items()}, len(known), known
    sources, total = dict[int, "Source"](), 0
    for k, n in shares(space.ks, options.trials).items():
        if len(space.grid(k)) == 1:  # nothing to search
            sources[k], n = Listed(space.grid(k)), 1
        else:
            sources[k] = Tpe(k, space.of_k[k], n, seed=(1000 * seed + k) % 2**32, begun=ledger.begun(k))
        total += n
    return sources, total, ledger.begun()


def _introduce(ledger: Ledger, total: int, at_once: int, done: int) -> None:
    """Tells the user what is to run, and how many trials are `done`."""
    options, ks = ledger.options, ledger.space.ks
    words = [
        f"{total} trials over k = {', '.join(map(str, ks))}",
        str(options.search),
        *([options.scheduler] if options.scheduler != "none" else []),
        f"{at_once} at once",
        *(["each k from the best of 2k"] if options.warm_start else []),
    ]
    kept = f"; {done} ended before, and are kept" if done else ""
    ledger.context.screen.line(f"  sweep: {', '.join(words)}{kept}")


def _tune(ledger: Ledger, search: Search, scheduler: Any, shared: Shared, *, total: int, at_once: int) -> None:
    from ray import tune

    from workflows.private.ray import keep_credentials_from_trials
    from workflows.training.worker import root_cause

    keep_credentials_from_trials()  # nodes have their own keys
    options, ended = ledger.options, threading.Event()

    class End(tune.Stopper):
        asked = False  # a class attribute, since Tune copies its stoppers

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return End.asked

    def trial(config: dict[str, Any]) -> None:
        run_trial(Trial(**config["trial"]), shared)

    def named(trial: Any) -> str:
        return str(trial.config["name"])

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": options.cpus, "gpu": options.gpus}),
            tune_config=tune.TuneConfig(
                metric="score",
                mode="min",
                num_samples=total,
                search_alg=search,
                scheduler=scheduler,
                max_concurrent_trials=at_once,
                time_budget_s=options.hours and options.hours * 3600,
                reuse_actors=True,
                trial_name_creator=named,
                trial_dirname_creator=named,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                stop=End(),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
            ),
        )
        results: list[Any] = []

        def fit() -> None:
            try:
                results.append(tuner.fit())
            finally:
                ended.set()

        try:
            run_together([fit], at_once=1, tick=ledger.context.tick, done=lambda _: None)
        except BaseException:  # Ray must not be shut down while a thread uses it
            End.asked = True
            ended.wait(30)
            raise
    if errors := results[0].errors:
        trials = f"{len(errors)} trials" if len(errors) > 1 else "a trial"
        ledger.crash = UserError(f"{trials} failed: {root_cause(errors[0])}", hint="the same command tries again")
        ledger.context.tick()


def _scheduler(ledger: Ledger) -> Any:
    """The scheduler. A trial that ended in an earlier run is added to it when the search comes to it."""
    from workflows.sweep.asha import Asha

    if ledger.options.scheduler == "none":
        return None
    asha = Asha(ledger.stopped)
    ledger.reused = lambda row: asha.remember(row["point"]["k"], row["name"], ledger.curve(row))
    return asha


def _share(context: Context, prepared: Done, trained: Done, options: SweepOptions) -> Shared:
    """Puts images and teacher into Ray's object store, once. Raises UserError for images larger than data.memory_gib."""
    import ray

    from mmdistill_core.artifact import load_model
    from workflows.dataset.shards import read_all
    from workflows.sweep.shelf import Shelf

    config = context.config
    if (size := prepared.result["bytes"] / 2**30) > config.data.memory_gib:
        raise UserError(
            f"sweep: holds the images in memory, {size:.1f} GiB, more than data.memory_gib={config.data.memory_gib:g}",
            hint="prepare fewer of them (--limit), or raise data.memory_gib",
        )
    needs = method_of(config.distill, schedule_of(config)).needs
    images = read_all(data_uri(prepared), columns=[name for name in needs if name != "x"])
    rows, reference = images.rows(config.data.trained), images.rows(config.data.reference)
    teacher = load_model(fetch(trained.at("model"))).denoiser
    return Shared(
        config=config.model_dump(),
        prepared=prepared,
        trained=trained,
        data=ray.put((rows.images, rows.labels, reference.labels, rows.columns)),
        teacher=ray.put(Shelf.of(teacher)),
        mailbox=context.monitor.actor,
        cpus=options.cpus,
        use_gpu=options.gpus > 0,
        reporting=options.reporting,
    )


def _kept(ledger: Ledger, total: int) -> str:
    going = f", {len(ledger.running)} continue from their last checkpoints" if ledger.running else ""
    return f"{len(ledger.rows)} of {total} trials are kept{going}"


def run_sweep(
    config: RunConfig,
    options: RunOptions,
    screen: Screen,
    *,
    space: Space,
    how: SweepOptions,
    out: Path | None = None,
    name: str = "sweep",
) -> list[dict[str, Any]]:
    """Trains or reuses the teacher, and sweeps over students of it. Returns the means over seeds, best first for each k. The report
    is in reports/<recipe>-<name>, and `out` gets a copy of its trials.json. Raises ConfigError and UserError.
    """
    from workflows.sweep.best import register_best
    from workflows.sweep.report import rows_of, write_report
    from workflows.sweep.table import show, summarise

    how = check_sweep(space, how)
    distill = config.distill.model_copy(update={"warm_start": how.warm_start})
    config = with_absolute_places(config.model_copy(update={"distill": distill}))
    check_inputs(config)
    extra_key = (space.described, how.search, how.scheduler, how.warm_start)
    with open_context(config, options, screen, kind=name, extra_key=extra_key) as context:
        check_room(how, context.resources)
        stages = stages_of(context)
        (_, [prepared]), (_, [trained]) = next(stages), next(stages)
        ledger = sweep(context, prepared, trained, space, how, options.at_once)
        made = register_best(ledger, prepared, trained) if how.register and ledger.best() else None
        where = write_report(ledger, prepared, trained, made, name) if ledger.rows else ""
        if where and out:
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(context.workspace.report(f"{config.recipe}-{name}") / "trials.json", out)
        show(rows_of(ledger), screen)
        screen.line(f"Report: [bold]{escape(where)}[/]" if where else "No trial has ended yet.")
        if ledger.crash:
            raise ledger.crash
    return summarise(rows_of(ledger))
