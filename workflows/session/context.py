"""Context: what every stage is given, and how a stage is tracked, resumed and reused."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape

from workflows.cluster.session import Monitor, Workers, task_options
from workflows.cluster.stopping import Stopping
from workflows.config.schema import RunConfig, digest
from workflows.errors import UserError, training_failed
from workflows.rendering.screen import Bar, Screen, clock, short
from workflows.storage import jsonl as lines
from workflows.storage.integrity import damage, files_of
from workflows.storage.uri import is_remote, join
from workflows.storage.workspace import RESULT, RUNS, StageFolder, Workspace, git_commit, write_json
from workflows.tracking.tracker import Tracker, now, own_id
from workflows.training.events import AT, CAUSES, DOWN, EVENTS, FAILED, FATAL, Events
from workflows.training.job import Every

METRICS, FIGURES, CLOCK = "metrics.jsonl", "figures.jsonl", "clock.json"
EVERY_ROW = {"n_images", "step"}
"""One of these is in every row of a training, and of prepare's classifier."""


@dataclass
class Done:
    """A finished stage: where its outputs are, here and for others, what it returned, its tracking run, and whether it was there
    before.
    """

    name: str
    folder: Path
    uri: str
    result: dict[str, Any]
    run_id: str
    seconds: float
    reused: bool

    @property
    def identity(self) -> str:
        """The hash of what the stage made: the part of later stages' keys that comes from it."""
        return str(self.result["identity"])

    def at(self, name: str) -> str:
        """Where workers find this file or folder of it."""
        return join(self.uri, name)


@dataclass(frozen=True)
class Placement:
    """Workers of each training, and how many students are trained at once."""

    teacher_workers: Workers
    student_workers: Workers
    at_once: int
    use_gpu: bool

    @property
    def device(self) -> str:
        """Where those tasks of a stage compute that are no trainings, for `device_of_task`; `task` is what Ray is to give each."""
        return "cuda" if self.use_gpu else "cpu"

    @property
    def task(self) -> dict[str, Any]:
        return task_options(use_gpu=self.use_gpu)


@dataclass
class Context:
    config: RunConfig
    workspace: Workspace
    screen: Screen
    tracker: Tracker
    parent_run: str
    pipeline: str
    resources: dict[str, float]
    placement: Placement
    force: frozenset[str]
    monitor: Monitor
    stopping: Stopping
    listeners: dict[str, Callable[[dict[str, float]], None]] = field(default_factory=dict)
    every: Every = field(default_factory=Every)
    tracking_wait: float = 120.0
    """Seconds that a stage which needs the tracking store's answer waits for it."""

    def settle(self) -> None:
        """For a stage that needs the tracking store's answer: all that was logged is delivered. Raises UserError if it does not
        answer within `tracking_wait` seconds.
        """
        if not settle(self.tracker, self.screen, self.tracking_wait):
            raise self.tracker.unreachable()

    def tick(self) -> None:
        """Takes in what the workers sent. Raises UserError when the workspace is no longer this run's."""
        self.workspace.check_held()
        rows, notes = self.monitor.drain()
        for text in notes:
            self.screen.line(f"[yellow]![/] {escape(text)}")
        errors = []
        for topic, row in rows:
            try:
                if topic in self.listeners:
                    self.listeners[topic](row)
            except UserError as error:  # of one training; what others sent is taken in first
                errors.append(error)
        if errors:
            raise errors[0]


class StageRun:
    """A stage in progress: its folder, its tracking run, its metrics (on disk first, then tracked, each step once).

    Each row has the time of its measurement, which goes with it to the tracking store: sent again, it is there once.
    """

    def __init__(self, context: Context, folder: StageFolder, config: dict[str, Any], began: bool) -> None:
        self.context, self.folder, self.path = context, folder, folder.path
        self._since = time.monotonic()
        clocked = _read(self.path / CLOCK, {"seconds": 0.0})
        self._spent, self._began = clocked["seconds"], clocked.get("began") or now()
        self._waits: float | None = None
        self.run_id = self._run(config)
        rows = read_timed_metrics(self.path)
        self._steps = {step for step, _, _ in rows}
        self.events = Events(self.path / EVENTS)
        for step, _, moment in rows:
            self.events.reached(step, moment)
        # Begun on another machine, its rows are in the tracking store and not here.
        names = {next(iter(row)) for _, row, _ in rows} | (EVERY_ROW if began else set())
        self._tracked = context.tracker.steps(self.run_id, *sorted(names))
        self.events.reached(max(self._tracked, default=0), now())
        self._send(rows)
        self.flush()
        if not began:
            folder.keep(CLOCK)

    def _run(self, config: dict[str, Any]) -> str:
        """The stage's run in this tracking store: the one it had, or a new one."""
        tracker, runs = self.context.tracker, _read(self.path / RUNS, {})
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
            # First: who is killed now leaves no run without a stage.
            write_json(self.path / RUNS, runs | {tracker.uri: own})
            run_id = tracker.start_run(self.folder.name, parent=self.context.parent_run, tags=tags, own=own)
            write_json(self.path / RUNS, runs | {tracker.uri: run_id})
            self.folder.keep(RUNS)
        tracker.log_params(run_id, config)
        return str(run_id)

    def begin(self) -> None:
        """The work begins now: time in a queue does not count."""
        self._since = self._waits = time.monotonic()

    def waits_for_workers(self) -> float:
        """Seconds since a training began, or lost workers, without any since."""
        return time.monotonic() - self._waits if self._waits is not None else 0.0

    @property
    def seconds(self) -> float:
        """Spent on this stage, earlier interrupted runs included."""
        return float(self._spent + time.monotonic() - self._since)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A step that was logged before, here or on another machine, is not again: a resumed training replays some. "time" among
        the metrics is none of them, but when they were measured.
        """
        if step in self._steps:
            return
        self._steps.add(step)
        moment = int(metrics.get("time") or now())
        row = {name: value for name, value in metrics.items() if name != "time"}
        lines.append(self.path / METRICS, {"step": step, "time": moment} | row)
        self.events.reached(step, moment)
        self._send([(step, row, moment)])
        if time.monotonic() - self._flushed > 3:
            self.flush()

    def happened(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Keeps an event of the training, where another machine finds it too if it matters; gives it as it was kept, None if it is
        none or tells of nothing new.
        """
        if row["event"] in (DOWN, *FAILED):
            self._waits = self._waits or time.monotonic()
        elif row["event"] == "begun":
            self._waits = None
        if row["event"] == DOWN or self.events.repeated(row):
            return None
        row = self.events.take(row)
        if row["event"] not in (AT, "checkpoint"):
            with suppress(UserError):  # the store may be what was lost; the next event takes this one with it
                self.folder.keep(EVENTS)
        return row

    def log_at(self, step: int, metrics: dict[str, float]) -> None:
        """For metrics whose step is not a time (a number of sampling steps): logged whatever their order, as of the stage's
        beginning, so that an interrupted stage that measures them anew leaves them there once.
        """
        lines.append(self.path / FIGURES, {"step": step} | metrics)
        self._log_at(step, metrics)

    def log_figures(self) -> None:
        """What `log_at` was given, to a store that lacks it."""
        for row in lines.read(self.path / FIGURES):
            self._log_at(int(row.pop("step")), row)

    def _log_at(self, step: int, metrics: dict[str, float]) -> None:
        self.context.tracker.log_metrics(self.run_id, [(step, metrics)], times=[self._began])

    def _send(self, rows: list[TimedRow]) -> None:
        if rows := [row for row in rows if row[0] not in self._tracked]:
            times = [moment for _, _, moment in rows]
            self.context.tracker.log_metrics(self.run_id, [(step, row) for step, row, _ in rows], times=times)

    def flush(self) -> None:
        """Notes the time spent; what was logged is in the outbox."""
        self._flushed = time.monotonic()
        write_json(self.path / CLOCK, {"seconds": self.seconds, "began": self._began})

    def finish(self, result: dict[str, Any], status: str = "FINISHED") -> Done:
        self.flush()
        self.context.workspace.check_held()
        seconds = self.seconds
        # First: a stage that is done is not looked at again, and who is killed in between does both again.
        self.context.tracker.end_run(self.run_id, status)
        self.folder.finish(result | {"seconds": seconds, "files": files_of(self.path, skip=_recorded)})
        summary = result.get("summary", "")
        self.context.screen.line(
            f"[green]✓[/] [bold]{self.folder.name}[/]  {clock(seconds)}  [dim]{escape(summary)}[/]"
        )
        return Done(self.folder.name, self.path, self.folder.uri, result, self.run_id, seconds, reused=False)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """An error inside leaves the run's metrics and its end in the tracking store, and goes on up."""
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise

    def abandon(self, error: BaseException) -> None:
        """The stage ends unfinished: what was measured is logged, the run marked."""
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        _quietly(self.flush)
        _quietly(lambda: self.context.tracker.end_run(self.run_id, status))


def open_stage(
    context: Context,
    name: str,
    *,
    depends: dict[str, Any],
    config: dict[str, Any],
    lacks: Callable[[dict[str, Any]], str | None] = lambda result: None,
) -> Done | StageRun:
    """The stage as it was finished before with these dependencies, or a run of it to be done now.

    `depends` makes the key; `config` is what is shown as the run's parameters. `lacks` says of its result what is no longer there
    of what it had made outside of its folder: then it is done again. Raises UserError for files of it that are not as they were.
    """
    folder = context.workspace.stage(name, digest(depends))
    context.workspace.refer(context.pipeline, folder)
    if name in context.force or name.rsplit("-", 1)[0] in context.force:
        context.workspace.discard(folder)
    result = folder.result
    if result is not None and (missing := lacks(result)):
        context.screen.line(f"[yellow]![/] {name}: {escape(missing)}: it is done again")
        context.workspace.discard(folder)
        result = None
    if result is None:
        began = (folder.path / RUNS).exists()
        write_json(folder.path / "depends.json", depends)
        folder.keep("depends.json")
        return StageRun(context, folder, config, began)
    check_files(folder, result)
    known = _read(folder.path / RUNS, {}).get(context.tracker.uri)
    if known is not None and context.tracker.has(known) and not _lost(context, folder, known):
        run_id = context.tracker.resolve(known)
    else:
        run_id = _republish(context, folder, config, result)
    context.screen.line(f"[green]✓[/] [bold]{name}[/]  reused  [dim]{escape(result.get('summary', ''))}[/]")
    return Done(name, folder.path, folder.uri, result, run_id, float(result["seconds"]), reused=True)


def run_stage(
    context: Context,
    name: str,
    *,
    depends: dict[str, Any],
    config: dict[str, Any],
    body: Callable[[StageRun], Any],
    lacks: Callable[[dict[str, Any]], str | None] = lambda result: None,
) -> Done:
    """`open_stage`, and `body` if it is to be done. `body` returns plain JSON with "identity", the hash of what was made."""
    opened = open_stage(context, name, depends=depends, config=config, lacks=lacks)
    if isinstance(opened, Done):
        return opened
    with opened.guarded():
        return opened.finish(body(opened))


def _recorded(name: str) -> bool:
    """Of a stage's files, those that tell of it and may be written when it is done, and its shards, which have hashes of their
    own in their manifest.
    """
    return name in (RESULT, RUNS, CLOCK, METRICS, EVENTS, "depends.json") or name.startswith("data/shards/")


def check_files(folder: StageFolder, result: dict[str, Any]) -> None:
    """Raises UserError for a finished stage whose files are not as it had made them. Stages of before this was recorded have no
    hashes. A working copy of what is in a store is fetched anew first.
    """
    files = result.get("files", {})
    why = damage(folder.path, files)
    if why and is_remote(folder.uri):
        folder.fetch_again()
        why = damage(folder.path, files)
    if why:
        raise UserError(
            f"{folder.name}: {why}",
            hint=f"put it back, or make it anew: --force {folder.name}, or remove {folder.uri}",
        )


def _lost(context: Context, folder: StageFolder, run_id: str) -> bool:
    """Whether the tracking store lacks rows of a finished stage: they waited for it on a machine that is gone. Of a workspace in a
    folder none can: the outbox lies there too.
    """
    if not is_remote(folder.uri) or context.tracker.away:
        return False
    rows = read_timed_metrics(folder.path)
    tracked = context.tracker.steps(run_id, *sorted({next(iter(row)) for _, row, _ in rows}))
    return not context.tracker.away and any(step not in tracked for step, _, _ in rows)


def _republish(context: Context, folder: StageFolder, config: dict[str, Any], result: dict[str, Any]) -> str:
    """A stage that this tracking store does not know, or not whole: what it lacks of the metrics is logged to it, and the files."""
    run = StageRun(context, folder, config, began=True)
    run.log_figures()
    for name in result.get("artifacts", []):
        path = folder.path / name
        context.tracker.log_artifact(run.run_id, path, name if path.is_dir() else None)
    context.tracker.end_run(run.run_id)
    return run.run_id


def training_listener(run: StageRun, bar: Bar) -> Callable[[dict[str, float]], None]:
    """Takes a training's rows: to the metrics or the events, and to its bar."""
    distance: list[str] = []
    latest = 0

    def listen(row: dict[str, Any]) -> None:
        if "event" in row:
            kept = run.happened(row)
            if kept and (text := _told(kept)):
                run.context.screen.line(f"  {run.folder.name}: {text}")
            if kept and "cause" in kept:
                bar.update(kept["n_images"], "resumed from its checkpoint")
            if row["event"] in FAILED and FATAL.search(row["why"]):
                raise training_failed(run.folder.path.name, row["why"])
            return
        nonlocal latest
        n, before, latest = row["n_images"], latest, max(latest, row["time"])
        run.log(int(n), row)
        if row["time"] <= before:
            return  # said again, from the checkpoint
        if "score" in row:
            distance[:] = [f"distance {row['score']:.3g} (best {row['best/score']:.3g})"]
        losses = [f"{key.split('/')[1]} {value:.3g}" for key, value in row.items() if key.startswith("loss/")]
        bar.update(n, "  ".join([f"{short(row['images_per_second'])} img/s", *distance, *losses]))

    return listen


def _told(row: dict[str, Any]) -> str:
    """An event in words, if the user is to hear of it."""
    if row["event"] in FAILED:
        return f"{CAUSES[row['event']]}: {escape(row['why'])}"
    if "cause" not in row:
        return ""
    workers = f"{row['workers']} worker{'s' * (row['workers'] > 1)}"
    again = f", {short(row['again'])} images again" if row["again"] else ""
    away = f", {row['away']:.0f} s without training" if row["cause"] not in ("stopped", "driver") else ""
    return f"goes on from {short(row['n_images'])} images with {workers} ({CAUSES[row['cause']]}{again}{away})"


def settle(tracker: Tracker, screen: Screen, seconds: float) -> bool:
    """Waits until all that was logged is delivered, for so many seconds at most, with progress if it takes long: whether it is."""
    if seconds <= 0 or tracker.settle(min(1.0, seconds)):
        return tracker.pending == 0
    end, most = time.monotonic() + seconds - 1, tracker.pending
    with screen.bars():
        bar = screen.bar("tracking", most, unit="entries")
        while (left := end - time.monotonic()) > 0 and not tracker.settle(min(0.5, left)):
            state = "the store does not answer" if tracker.away else "delivering"
            bar.update(most - tracker.pending, f"{state}, waiting {left:.0f} s more")
    return tracker.pending == 0


TimedRow = tuple[int, dict[str, float], int]
"""A step, its metrics, and when they were measured, in ms since 1970."""


def read_metrics(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of a stage by step; a line that a kill cut short is left out."""
    return [(step, row) for step, row, _ in read_timed_metrics(folder)]


def read_timed_metrics(folder: Path) -> list[TimedRow]:
    """As `read_metrics`; rows from before times were kept have their file's."""
    rows = []
    path = folder / METRICS
    for row in lines.read(path):
        moment = row.pop("time", None) or int(path.stat().st_mtime * 1000)
        rows.append((int(row.pop("step")), row, moment))
    return sorted(rows, key=lambda row: row[0])


def identity_of(*paths: Path) -> str:
    """A hash of files' contents."""
    content = hashlib.sha256()
    for path in paths:
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:16]


def _read(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return default
    return value if isinstance(value, dict) else default


def _quietly(call: Callable[[], Any]) -> None:
    """While an error is on its way up, a second one must not hide it."""
    try:
        call()
    except Exception:
        return
