"""Runs a stage: tracks it, resumes it after an interruption, and reuses a finished one with the same key."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.markup import escape

from workflows.config.values import digest
from workflows.errors import UserError, training_failed
from workflows.rendering.screen import Bar, clock, short
from workflows.session.context import Context, Done
from workflows.session.metrics import CLOCK, FIGURES, METRICS, TimedRow, read_timed_metrics
from workflows.storage import jsonl
from workflows.storage.code import git_commit
from workflows.storage.integrity import damage, files_of
from workflows.storage.local import read_json, write_json
from workflows.storage.uri import is_remote
from workflows.storage.workspace import RESULT, RUNS, StageFolder
from workflows.tracking.tracker import now, own_id
from workflows.training.events import AT, CAUSES, DOWN, EVENTS, FAILED, FATAL, Events

EVERY_ROW = {"n_images", "step"}
"""Every row of a training, and every row of the classifier that `prepare` trains, has one of these metrics."""


class StageRun:
    """A stage in progress: its folder, its tracking run, its metrics. Metrics go to disk first, then to the tracking store, one row
    for each step. A row has the time of its measurement, so a row that is sent twice is stored once.
    """

    def __init__(self, context: Context, folder: StageFolder, params: dict[str, Any], began: bool) -> None:
        """`began`: whether an earlier run began the stage."""
        self.context, self.folder, self.path = context, folder, folder.path
        clocked = read_json(self.path / CLOCK) or {"seconds": 0.0}
        self._since, self._seconds_before = time.monotonic(), clocked["seconds"]
        self._began = clocked.get("began") or now()
        self._without_workers_since: float | None = None
        self.run_id = self._open_run(params)
        rows = read_timed_metrics(self.path)
        self._steps = {step for step, _, _ in rows}
        self.events = Events(self.path / EVENTS)
        for step, _, moment in rows:
            self.events.reached(step, moment)
        # If the stage was begun on another machine, its rows are in the tracking store but not here.
        names = {next(iter(row)) for _, row, _ in rows} | (EVERY_ROW if began else set())
        self._tracked = context.tracker.steps(self.run_id, *sorted(names))
        self.events.reached(max(self._tracked, default=0), now())
        self._send(rows)
        self.flush()
        if not began:
            folder.keep(CLOCK)

    def _open_run(self, params: dict[str, Any]) -> str:
        """The id of the stage's run in this tracking store: the earlier run, resumed, or a new one."""
        tracker, runs = self.context.tracker, (read_json(self.path / RUNS) or {})
        run_id = runs.get(tracker.uri)
        if run_id is not None and tracker.resume_run(run_id):
            run_id = tracker.resolve(run_id)
        else:
            tags = {
                "mmdistill.stage": self.folder.name,
                "mmdistill.key": self.folder.key,
                "git_commit": git_commit(),
            }
            own = own_id()
            # The id is written before the run starts. If killed in between, a retry finds it, and no run is without a stage.
            write_json(self.path / RUNS, runs | {tracker.uri: own})
            run_id = tracker.start_run(self.folder.name, parent=self.context.parent_run, tags=tags, own=own)
            write_json(self.path / RUNS, runs | {tracker.uri: run_id})
            self.folder.keep(RUNS)
        tracker.log_params(run_id, params)
        return str(run_id)

    def begin(self) -> None:
        """Starts the clock: time in a queue does not count."""
        self._since = self._without_workers_since = time.monotonic()

    @property
    def seconds_without_workers(self) -> float:
        """Seconds that a training has been without workers; 0 while it has some."""
        return time.monotonic() - self._without_workers_since if self._without_workers_since is not None else 0.0

    @property
    def seconds(self) -> float:
        """Seconds spent on this stage, earlier interrupted runs included."""
        return float(self._seconds_before + time.monotonic() - self._since)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Logs a step, unless it was logged before, here or on another machine: a resumed training replays some steps. The entry
        "time" says when the metrics were measured.
        """
        if step in self._steps:
            return
        self._steps.add(step)
        moment = int(metrics.get("time") or now())
        row = {name: value for name, value in metrics.items() if name != "time"}
        jsonl.append(self.path / METRICS, {"step": step, "time": moment} | row)
        self.events.reached(step, moment)
        self._send([(step, row, moment)])
        if time.monotonic() - self._flushed > 3:
            self.flush()

    def record_event(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Records an event of the training, and uploads it if another machine needs it. Returns the row as recorded, or None for
        DOWN and for a failure that repeats the last event.
        """
        if row["event"] in (DOWN, *FAILED):
            self._without_workers_since = self._without_workers_since or time.monotonic()
        elif row["event"] == "begun":
            self._without_workers_since = None
        if row["event"] == DOWN or self.events.repeated(row):
            return None
        row = self.events.take(row)
        if row["event"] not in (AT, "checkpoint"):
            with suppress(UserError):  # the store may be what was lost; the next event uploads this one too
                self.folder.keep(EVENTS)
        return row

    def log_at(self, step: int, metrics: dict[str, float]) -> None:
        """Logs metrics whose step is no progress in time, such as a number of sampling steps, in any order. They are dated at the
        stage's beginning, so if an interrupted stage measures them again, the tracking store keeps them once.
        """
        jsonl.append(self.path / FIGURES, {"step": step} | metrics)
        self._send_figures(step, metrics)

    def send_figures_again(self) -> None:
        """Sends what `log_at` logged to a tracking store that lacks it."""
        for row in jsonl.read(self.path / FIGURES):
            self._send_figures(int(row.pop("step")), row)

    def _send_figures(self, step: int, metrics: dict[str, float]) -> None:
        self.context.tracker.log_metrics(self.run_id, [(step, metrics)], times=[self._began])

    def _send(self, rows: list[TimedRow]) -> None:
        if rows := [row for row in rows if row[0] not in self._tracked]:
            times = [moment for _, _, moment in rows]
            self.context.tracker.log_metrics(self.run_id, [(step, row) for step, row, _ in rows], times=times)

    def flush(self) -> None:
        """Writes the time spent. The metrics are on disk already."""
        self._flushed = time.monotonic()
        write_json(self.path / CLOCK, {"seconds": self.seconds, "began": self._began})

    def finish(self, result: dict[str, Any], status: str = "FINISHED") -> Done:
        self.flush()
        self.context.workspace.check_held()
        seconds = self.seconds
        # The run ends before the folder is finished. A finished stage is not run again, so a kill in between must repeat both.
        self.context.tracker.end_run(self.run_id, status)
        self.folder.finish(result | {"seconds": seconds, "files": files_of(self.path, skip=_is_unhashed)})
        summary = escape(result.get("summary", ""))
        self.context.screen.line(f"[green]✓[/] [bold]{self.folder.name}[/]  {clock(seconds)}  [dim]{summary}[/]")
        return Done(self.folder.name, self.path, self.folder.uri, result, self.run_id, seconds, reused=False)

    def abandon(self, error: BaseException) -> None:
        """Ends the stage unfinished: writes the time spent, and marks the run as killed or failed. Raises nothing, as `error` is
        being raised.
        """
        with suppress(Exception):
            self.flush()
        with suppress(Exception):
            self.context.tracker.end_run(self.run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")


def open_stage(
    context: Context,
    name: str,
    *,
    depends: dict[str, Any],
    params: dict[str, Any],
    missing: Callable[[dict[str, Any]], str | None] | None = None,
) -> Done | StageRun:
    """The finished stage with these dependencies, or a new run of it.

    `depends` makes the key. `params` are shown as the parameters of the tracking run. `missing` takes the result of a finished
    stage and names an output outside the folder that is gone, or returns None. If an output is gone, the stage is run again.

    Raises UserError if files of the stage have changed.
    """
    folder = context.workspace.stage(name, digest(depends))
    context.workspace.refer(context.pipeline, folder)
    if name in context.force or name.partition("-")[0] in context.force:
        context.workspace.discard(folder)
    result = folder.result
    if result is not None and missing and (why := missing(result)):
        context.screen.line(f"[yellow]![/] {name}: {escape(why)}: the stage runs again")
        context.workspace.discard(folder)
        result = None
    if result is None:
        began = (folder.path / RUNS).exists()
        write_json(folder.path / "depends.json", depends)
        folder.keep("depends.json")
        return StageRun(context, folder, params, began)
    check_files(folder, result)
    run_id = (read_json(folder.path / RUNS) or {}).get(context.tracker.uri)
    if run_id is not None and context.tracker.has(run_id) and not _lost(context, folder, run_id):
        run_id = context.tracker.resolve(run_id)
    else:
        run_id = _republish(context, folder, params, result)
    context.screen.line(f"[green]✓[/] [bold]{name}[/]  reused  [dim]{escape(result.get('summary', ''))}[/]")
    return Done(name, folder.path, folder.uri, result, run_id, float(result["seconds"]), reused=True)


def run_stage(
    context: Context,
    name: str,
    *,
    depends: dict[str, Any],
    params: dict[str, Any],
    body: Callable[[StageRun], dict[str, Any]],
    missing: Callable[[dict[str, Any]], str | None] | None = None,
) -> Done:
    """Calls `open_stage`, and `body` if the stage must run. `body` returns plain JSON with "identity", the hash of the outputs."""
    opened = open_stage(context, name, depends=depends, params=params, missing=missing)
    if isinstance(opened, Done):
        return opened
    try:
        return opened.finish(body(opened))
    except BaseException as error:
        opened.abandon(error)
        raise


def _is_unhashed(name: str) -> bool:
    """Whether a file has no hash in the stage's result. Records may be written after the stage is finished, and shards have their
    hashes in the manifest.
    """
    return name in (RESULT, RUNS, CLOCK, METRICS, EVENTS, "depends.json") or name.startswith("data/shards/")


def check_files(folder: StageFolder, result: dict[str, Any]) -> None:
    """Raises UserError if files of a finished stage have changed. If the stage is in a store, a damaged working copy is fetched
    again first. Stages of earlier versions have no hashes, and pass.
    """
    files = result.get("files", {})
    why = damage(folder.path, files)
    if why and is_remote(folder.uri):
        folder.fetch_again()
        why = damage(folder.path, files)
    if why:
        raise UserError(
            f"{folder.name}: {why}",
            hint=f"restore it, or make it again: --force {folder.name}, or remove {folder.uri}",
        )


def _lost(context: Context, folder: StageFolder, run_id: str) -> bool:
    """Whether the tracking store lacks rows of a finished stage, because they were queued on a machine that is gone. This can't
    happen with a workspace in a local folder, which holds the outbox too.
    """
    if not is_remote(folder.uri) or context.tracker.away:
        return False
    rows = read_timed_metrics(folder.path)
    tracked = context.tracker.steps(run_id, *sorted({next(iter(row)) for _, row, _ in rows}))
    return not context.tracker.away and any(step not in tracked for step, _, _ in rows)


def _republish(context: Context, folder: StageFolder, params: dict[str, Any], result: dict[str, Any]) -> str:
    """Logs the missing metrics and the files of a finished stage to a tracking store that lacks them. Returns the run's id."""
    run = StageRun(context, folder, params, began=True)
    run.send_figures_again()
    for name in result.get("artifacts", []):
        path = folder.path / name
        context.tracker.log_artifact(run.run_id, path, name if path.is_dir() else None)
    context.tracker.end_run(run.run_id)
    return run.run_id


def training_listener(run: StageRun, bar: Bar) -> Callable[[dict[str, float]], None]:
    """Returns a function that takes the rows of a training, logs them as metrics or events, and updates `bar`."""
    latest, resumed_at, distance = 0, 0, ""

    def listen_to_event(row: dict[str, Any]) -> None:
        nonlocal resumed_at
        event = run.record_event(row)
        if event and (text := _event_text(event)):
            run.context.screen.line(f"  {run.folder.name}: {text}")
        if event and "cause" in event:
            resumed_at = event["n_images"]
            bar.update(resumed_at, "resumed from its checkpoint")
        if row["event"] in FAILED and FATAL.search(row["why"]):
            raise training_failed(run.folder.path.name, row["why"])

    def listen(row: dict[str, Any]) -> None:
        nonlocal latest, distance
        if "event" in row:
            listen_to_event(row)
            return
        run.log(int(row["n_images"]), row)
        if row["time"] <= latest or row["n_images"] <= resumed_at:
            return  # a row from before the checkpoint that the training resumed from
        latest = row["time"]
        if "score" in row:
            distance = f"distance {row['score']:.3g} (best {row['best/score']:.3g})"
        losses = [f"{key.split('/')[1]} {value:.3g}" for key, value in row.items() if key.startswith("loss/")]
        texts = [f"{short(row['images_per_second'])} img/s", distance, *losses]
        bar.update(row["n_images"], "  ".join(filter(None, texts)))

    return listen


def _event_text(event: dict[str, Any]) -> str:
    """An event in words, or "" if it does not concern the user."""
    if event["event"] in FAILED:
        return f"{CAUSES[event['event']]}: {escape(event['why'])}"
    if "cause" not in event:
        return ""
    workers = f"{event['workers']} worker{'s' * (event['workers'] > 1)}"
    again = f", {short(event['again'])} images again" if event["again"] else ""
    away = f", {event['away']:.0f} s without training" if event["cause"] not in ("stopped", "driver") else ""
    return f"continues from {short(event['n_images'])} images with {workers} ({CAUSES[event['cause']]}{again}{away})"
