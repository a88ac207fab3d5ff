"""Tracks the trials of a sweep: which are running, which ended and how, and what their workers report.

A trial is a stage, whose key covers everything that its result depends on. It is also a run in the tracking store, below the
sweep's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.markup import escape

from workflows.config.assembly import rounds_of
from workflows.config.values import digest
from workflows.errors import ConfigError, UserError
from workflows.session.context import Context, Done
from workflows.session.metrics import read_metrics
from workflows.session.stage import StageRun, open_stage
from workflows.stages import distill, evaluate
from workflows.storage.code import code_version
from workflows.storage.integrity import model_identity
from workflows.storage.store import exists
from workflows.storage.uri import join
from workflows.storage.workspace import RESULT
from workflows.sweep.options import SweepOptions
from workflows.sweep.space import Point, Space, section
from workflows.sweep.table import described
from workflows.sweep.trial import WORST, Trial, seed_of

CODE = (*evaluate.CODE, "workflows/sweep/space.py", "workflows/sweep/shelf.py", "workflows/sweep/trial.py")
ENDED = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""The outcome of a trial, and MLflow's status for it."""
Row = dict[str, Any]
"""A trial that ended: point, name, outcome, run_id, seconds, images, score (its best in training). A finished one also has
forwards, kept_at and the measures, a failed one has why.
"""


@dataclass
class Open:
    """A running trial. `share` is the part of its `images` that it has seen."""

    trial: Trial
    run: StageRun
    images: int
    share: float = 0.0


class Ledger:
    """`rows` and `done` hold the trials that ended, by name. `order` holds the names of all, in the order in which they began.
    A trial that diverges has failed, and has a row. A trial that an error ended has crashed: it has no row, `crash` is set, and the
    next run of the sweep tries it again. Tune's thread opens trials, and the driver's finishes them. `progress` is called after
    every change, `reused` with the row of a trial that ended in an earlier run.
    """

    def __init__(self, context: Context, prepared: Done, trained: Done, space: Space, options: SweepOptions) -> None:
        self.context, self.space, self.options = context, space, options
        self.rows: dict[str, Row] = {}
        self.done: dict[str, Done] = {}
        self.running: dict[str, Open] = {}
        self.order: list[str] = []
        self.closed = False
        self.crash: UserError | None = None
        self.progress: Callable[[], None] = lambda: None
        self.reused: Callable[[Row], None] = lambda row: None
        self._note = f"pipelines/{context.pipeline}.json"
        self._prepared, self._teacher = prepared, distill.Teacher.of(trained)
        self._common = self._depends(prepared, trained)

    # Keys and points

    def _depends(self, prepared: Done, trained: Done) -> dict[str, Any]:
        """What the result of every trial depends on, apart from its own point."""
        c, o = self.context.config, self.options
        return {
            "prepare": prepared.identity,
            "choosing": prepared.result["choosing"],
            "evaluate": c.evaluate.model_dump(),
            "reporting": prepared.result["reporting"] if o.reporting else None,
            "teacher": trained.identity,
            "code": code_version(*CODE, modules=evaluate.MODULES),
            # With a scheduler, whether a trial is stopped depends on the others.
            "others": [self.space.described, o.search, o.scheduler, o.warm_start] if o.scheduler != "none" else None,
        }

    def depends(self, point: Point, start: Done | None) -> dict[str, Any]:
        config, k = self.context.config, point["k"]
        own = section(config, k, point)
        rounds = rounds_of(own, self._teacher.schedule)
        return {
            **self._common,
            "k": k,
            "rounds": [distill.round_depends(config, own, one, self._prepared, self._teacher, {}) for one in rounds],
            "seed": seed_of(config, point),
            "start": start.identity if start else None,
        }

    def trial_of(self, point: Point, start: Done | None) -> Trial:
        key, uri = digest(self.depends(point, start)), self.context.workspace.uri
        name = f"trial-k{point['k']}-{digest(point, 8)}"
        return Trial(
            point=point,
            name=name,
            key=key,
            output=join(uri, "stages", f"{name}-{key}", "model"),
            storage=join(uri, "ray", f"{name}-{key}"),
            start=start.at("model") if start else None,
        )

    def begun(self, k: int | None = None) -> list[Point]:
        """The points, for k or for all, that a search suggested in an earlier run of this sweep, in their order."""
        points = (self.context.workspace.read_note(self._note) or {}).get("points", [])
        return [point for point in points if k in (None, point["k"])]

    def is_done(self, point: Point) -> bool:
        """Whether the trial ended in an earlier run. False with a warm start, before which its key is not known."""
        if self._after(point["k"]):
            return False
        trial = self.trial_of(point, None)
        return exists(join(self.context.workspace.uri, "stages", f"{trial.name}-{trial.key}", RESULT))

    # A warm start

    def _after(self, k: int) -> bool:
        """Whether students of k steps start from those of 2k steps."""
        return self.options.warm_start and 2 * k in self.space.ks

    def may_begin(self, k: int) -> bool:
        """Whether trials of k may begin: not while students of 2k steps, from which they start, are training."""
        return not (self._after(k) and any(o.trial.k == 2 * k for o in list(self.running.values())))

    def start_of(self, k: int) -> Done | None:
        """The best student of 2k steps if those of k start from it, else None. None too if none finished."""
        row = self.best().get(2 * k) if self._after(k) else None
        return self.done[row["name"]] if row else None

    def best(self) -> dict[int, Row]:
        """k -> the finished trial with the lowest distance."""
        best: dict[int, Row] = {}
        for row in list(self.rows.values()):
            k = row["point"]["k"]
            if row["outcome"] == "finished" and (k not in best or row["frechet"] < best[k]["frechet"]):
                best[k] = row
        return dict(sorted(best.items()))

    # Progress

    def offer(self, point: Point) -> dict[str, Any] | float | None:
        """Opens a trial, and returns its configuration for Tune. An invalid point gives None. An existing trial gives its distance,
        or None while it has none.
        """
        if self.closed:  # Tune's thread outlives Ctrl-C
            raise RuntimeError("the sweep has ended, and begins nothing more")
        start = self.start_of(point["k"])
        try:
            trial = self.trial_of(point, start)
        except ConfigError as error:  # of a point that TPE suggests: others were checked before the first trial
            self.context.screen.line(f"[yellow]![/] left out: {escape(str(error))}")
            return None
        if trial.name in self.order:
            return _distance(self.rows.get(trial.name))
        shown = point | ({"start": start.name} if start else {})
        opened = open_stage(self.context, trial.name, depends=self.depends(point, start), params=shown)
        self.order.append(trial.name)
        if self.options.search == "tpe":
            self._note_begun(point)
        if isinstance(opened, Done):
            self._remove_checkpoints(opened.folder.name)  # a killed run may have left them
            self._end(opened)
            self.reused(opened.result["row"])
            return _distance(opened.result["row"])
        self.running[trial.name] = Open(trial, opened, self.images_of(point))
        self.context.listeners[trial.name] = lambda row: self._listen(trial.name, row)
        return {"k": trial.k, "name": trial.name, "trial": vars(trial)}

    def _note_begun(self, point: Point) -> None:
        if point not in (points := self.begun()):
            record = self.context.workspace.read_note(self._note) or {}
            self.context.workspace.write_note(self._note, record | {"points": [*points, point]})

    def _listen(self, name: str, row: Row) -> None:
        opened = self.running.get(name)
        if opened is None:
            return
        if "crashed" in row:
            opened.run.abandon(RuntimeError())
            self._forget(name)
        elif "done" in row:
            self._finish(opened, row["done"])
        elif "resumed" in row:
            self.context.screen.line(f"  {name}: continues from {int(row['resumed']):,} images")
        else:
            opened.run.log(int(row["n_images"]), row)
            opened.share = min(1.0, row["n_images"] / opened.images)
        self.progress()

    def stopped(self, name: str) -> None:
        """The scheduler stopped the trial."""
        self._push(name, {"done": {"outcome": "stopped"}})

    def crashed(self, name: str) -> None:
        self._push(name, {"crashed": True})

    def _push(self, name: str, row: Row) -> None:
        """Called in Tune's thread. The row goes through the mailbox, behind all rows of the trial itself."""
        import ray

        ray.get(self.context.monitor.actor.push.remote(name, row))

    def _finish(self, opened: Open, end: Row) -> None:
        run, trial, tracker = opened.run, opened.trial, self.context.tracker
        history = read_metrics(run.path)
        scores, identity = [m["score"] for _, m in history if "score" in m], ""
        row: Row = {"point": trial.point, "name": trial.name, "run_id": run.run_id, "seconds": run.seconds}
        row |= {"images": history[-1][0] if history else 0} | ({"score": min(scores)} if scores else {}) | end
        if row["outcome"] == "finished":
            run.folder.collect("model")
            run.log_at(row["images"], {name: row[name] for name in (*evaluate.MEASURES, "seconds") if name in row})
            identity = model_identity(run.path / "model")
        tracker.set_tags(run.run_id, {"mmdistill.outcome": row["outcome"]})
        result = {"identity": identity, "summary": described(row, self.space.fields), "row": row}
        done = run.finish(result, ENDED[row["outcome"]])
        self._remove_checkpoints(run.path.name)
        self._end(done)

    def _remove_checkpoints(self, name: str) -> None:
        self.context.workspace.remove(self.context.workspace.root / "ray" / name)

    def _end(self, done: Done) -> None:
        self.rows[done.name], self.done[done.name] = done.result["row"], done
        self._forget(done.name)

    def _forget(self, name: str) -> None:
        self.running.pop(name, None)
        self.context.listeners.pop(name, None)

    def abandon(self, error: BaseException) -> None:
        """Leaves the running trials unfinished, for another run of the sweep to resume."""
        self.closed = True
        for name, opened in list(self.running.items()):
            if opened.run.folder.result is None:
                opened.run.abandon(error)
            self.context.listeners.pop(name, None)

    def images_of(self, point: Point) -> int:
        """The images of all rounds that lead to the student."""
        own = section(self.context.config, point["k"], point)
        return own.images * len(rounds_of(own, self._teacher.schedule))

    def curve(self, row: Row) -> list[tuple[float, float]]:
        """(per cent of its images, distance) pairs from the training of a trial that ended."""
        images = self.images_of(row["point"])
        return [(100 * n / images, m["score"]) for n, m in read_metrics(self.done[row["name"]].folder) if "score" in m]

    @property
    def completed(self) -> float:
        """The number of trials that ended, plus the shares of the running ones."""
        return len(self.rows) + sum(opened.share for opened in list(self.running.values()))


def _distance(row: Row | None) -> float | None:
    if row is None:
        return None
    return WORST if row["outcome"] == "failed" else float(row["frechet" if "frechet" in row else "score"])
