"""sweep: many distillations of one teacher by Ray Tune, over any field of the distill section, several at once.

Whatever ends a sweep, the same command goes on: trials that ended are in the workspace (sweep_ledger), others go on from their
checkpoints (sweep_trial). Tune's own records serve no purpose here, and are thrown away.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from workflows.cluster.session import run_together
from workflows.errors import UserError
from workflows.session.context import Context, Done
from workflows.stages.teacher import data_of
from workflows.storage.store import fetch
from workflows.sweep.ledger import Ledger
from workflows.sweep.options import SweepOptions
from workflows.sweep.space import Point, Space, section, shares
from workflows.sweep.table import described
from workflows.sweep.trial import Shared, Trial, run_trial

if TYPE_CHECKING:
    from workflows.sweep.search import Search, Source

RETRIES = 3
"""Further tries of a trial that an error ended."""


def sweep(
    context: Context, prepared: Done, taught: Done, space: Space, options: SweepOptions, at_once: int | None
) -> Ledger:
    """Runs the trials that are left, `at_once` together; by default as many as fit. One that diverges is a row like others; one
    that an error ended is none, and `ledger.error` tells of it. Raises ConfigError for values that can't be together.
    """
    from workflows.sweep.search import Search

    ledger = Ledger(context, prepared, taught, space, options)
    at_once = at_once or _fit_at_once(context.resources, options)
    sources, total = sources_of(ledger)
    _introduce(ledger, total, at_once)
    search = Search(sources, offer=ledger.offer, may_begin=ledger.may_begin, broken=ledger.broke)
    with context.screen.bars() as screen, _guarded(ledger, total):
        bar = screen.bar("sweep", total, unit="trials")

        def progress() -> None:
            leader = min(ledger.best().values(), key=lambda row: float(row["frechet"]), default=None)
            bar.update(ledger.completed, f"best so far: {described(leader, space.fields)}" if leader else "")

        ledger.progress, scheduler = progress, _scheduler(ledger)
        if search.begin():
            shared = _share(context, prepared, taught, options)
            _tune(ledger, search, scheduler, shared, total=total, at_once=at_once)
        ledger.abandon(KeyboardInterrupt())
    if ledger.running:
        context.screen.line(
            f"  sweep: --hours {options.hours:g} are over: {_kept(ledger, total)}; the same command goes on"
        )
    return ledger


def _fit_at_once(resources: dict[str, float], options: SweepOptions) -> int:
    slots = [resources.get(name, 0) / each for name, each in (("CPU", options.cpus), ("GPU", options.gpus)) if each]
    return max(1, int(min(slots, default=1)))


def points_of(ledger: Ledger) -> dict[int, list[Point]]:
    """The points of a grid, or of random draws. Raises ConfigError for a combination of values that can't be."""
    config, space, options = ledger.context.config, ledger.space, ledger.options
    if options.search == "grid":
        points = {k: space.grid(k) for k in space.ks}
    else:
        points = {k: space.drawn(k, n, config.seed) for k, n in shares(space.ks, options.trials).items()}
    for k, own in points.items():
        for point in own:
            section(config, k, point)
    return points


def sources_of(ledger: Ledger) -> tuple[dict[int, Source], int]:
    """The points of each k, as they are to be tried, and how many they are in all."""
    from workflows.sweep.search import Listed, Tpe

    space, options, seed = ledger.space, ledger.options, ledger.context.config.seed
    if options.search != "tpe":
        listed = points_of(ledger)
        return {k: Listed(points) for k, points in listed.items()}, sum(map(len, listed.values()))
    sources, total = dict[int, "Source"](), 0
    for k, n in shares(space.ks, options.trials).items():
        if len(space.grid(k)) == 1:  # nothing to search
            sources[k], n = Listed(space.grid(k)), 1
        else:
            sources[k] = Tpe(k, space.of_k[k], n, seed=(1000 * seed + k) % 2**32, begun=ledger.begun(k))
        total += n
    return sources, total


def _introduce(ledger: Ledger, total: int, at_once: int) -> None:
    """What is to come, and what was there before."""
    options, ks = ledger.options, ledger.space.ks
    known = ledger.begun() if options.search == "tpe" else [p for own in points_of(ledger).values() for p in own]
    done = sum(ledger.is_done(point) for point in known)
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
    from ray.tune.execution import class_cache

    from workflows.training.worker import root_cause

    # Tune would give trials the driver's keys in their environment, and Ray writes that to its logs: nodes have keys of their own.
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    options, ended = ledger.options, threading.Event()

    class End(tune.Stopper):
        asked = False  # of the class: Tune copies its stoppers

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
                time_budget_s=options.hours * 3600 if options.hours else None,
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
        found: list[Any] = []

        def fit() -> None:
            try:
                found.append(tuner.fit())
            finally:
                ended.set()

        try:
            run_together([fit], at_once=1, tick=ledger.context.tick, done=lambda _: None)
        except BaseException:  # Ray must not be shut down below a thread that uses it
            End.asked = True
            ended.wait(30)
            raise
    if errors := found[0].errors:
        trials = f"{len(errors)} trials" if len(errors) > 1 else "a trial"
        ledger.error = UserError(f"{trials} failed: {root_cause(errors[0])}", hint="the same command tries again")
        ledger.context.tick()


def _scheduler(ledger: Ledger) -> Any:
    """The scheduler, which is told of trials that ended before as they are met."""
    from workflows.sweep.asha import Asha

    if ledger.options.scheduler == "none":
        return None
    asha = Asha(ledger.stopped)
    ledger.found = lambda row: asha.remember(row["point"]["k"], row["name"], ledger.curve(row))
    return asha


def _share(context: Context, prepared: Done, taught: Done, options: SweepOptions) -> Shared:
    """Images and teacher go into Ray's store here, once. Raises UserError for more images than memory is meant for."""
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
    images = read_all(data_of(prepared))
    trained, reference = images.rows(config.data.trained), images.rows(config.data.reference)
    teacher = load_model(fetch(taught.at("model"))).denoiser
    return Shared(
        config=config.model_dump(),
        prepared=prepared,
        taught=taught,
        data=ray.put((trained.images, trained.labels, reference.labels)),
        teacher=ray.put(Shelf.of(teacher)),
        mailbox=context.monitor.actor,
        cpus=options.cpus,
        use_gpu=options.gpus > 0,
    )


def _kept(ledger: Ledger, total: int) -> str:
    going = f", {len(ledger.running)} go on from their last checkpoints" if ledger.running else ""
    return f"{len(ledger.rows)} of {total} trials are kept{going}"


@contextmanager
def _guarded(ledger: Ledger, total: int) -> Iterator[None]:
    """An error or Ctrl-C leaves every trial's metrics and its end in the tracking store, and says what is kept."""
    try:
        yield
    except BaseException as error:
        ledger.abandon(error)
        ledger.context.screen.line(f"  sweep: {_kept(ledger, total)}")
        raise
