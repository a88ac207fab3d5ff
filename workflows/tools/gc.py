"""The `gc` command: lists what a workspace no longer needs, with sizes and reasons, and removes it after confirmation.

It keeps everything that a registered version or a pipeline configuration refers to. It keeps trainings that can be resumed, unless
they are older than the days to keep. It does nothing while a run holds the workspace's lock.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.markup import escape

from workflows.errors import UserError
from workflows.registry.versions import Registry
from workflows.rendering.screen import Screen, show_table
from workflows.storage.store import cache_folder, listing
from workflows.storage.uri import join, shown
from workflows.storage.workspace import RESULT, StageFolder, Workspace, changed, size_of

YOUNG = 3600
"""Seconds for which unfinished files are kept. Workers outlive a killed driver and its lock for a moment, and may still write."""
DAY = 86_400
COPIES = 7.0
"""Days after which an unused local copy of remote files is removed, by default. It is fetched again when needed. The minimum is one
day, because a run of another workspace may be reading it.
"""


@dataclass(frozen=True)
class Item:
    """Something to remove. `path` is relative to the workspace's root. `forget` is called after the path is removed."""

    what: str
    why: str
    bytes: int
    path: Path | None
    forget: Callable[[], None] | None = None


@dataclass
class Plan:
    """`items` to remove, in this order. `kept` explains what stays although a user might expect it here."""

    items: list[Item] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def add(self, space: Workspace, path: Path, why: str) -> None:
        name = path.relative_to(space.root)
        self.items.append(Item(str(name), why, size_of(path), name))

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


def run_gc(
    workspace: str | Path,
    tracking_uri: str | None,
    screen: Screen,
    *,
    agree: Callable[[str], bool],
    keep_days: float | None = None,
) -> Plan:
    """Shows the plan, and removes its items if `agree` answers the question with True. Returns the plan.

    Raises UserError if `workspace` is not a workspace, or while a run holds it.
    """
    existing = Workspace(workspace, read_only=True)
    if not (listing(join(existing.uri, "pipelines")) if existing.remote else (existing.root / "stages").is_dir()):
        raise UserError(f"{workspace}: not a workspace", hint="name one with --workspace or MMDISTILL_HOME")
    space = Workspace(workspace, minimum_free=0)  # gc has to work on a full disk
    with space.lock():
        with screen.status("looking"), space.tree() as tree:
            plan = make_plan(tree, tracking_uri, keep_days, own_store=space.default_tracking_uri)
            _tracking(space, keep_days or 0, plan)
            _copies(COPIES if keep_days is None else max(1.0, keep_days), plan)
        show(plan, screen)
        if plan.items and agree(f"Remove these {len(plan.items)} items ({_size(plan.bytes)})?"):
            for item in plan.items:
                space.check_held()
                if item.path:
                    space.remove(space.root / item.path)
                if item.forget:
                    item.forget()
            screen.line(f"removed {len(plan.items)}, {_size(plan.bytes)}")
        else:
            screen.line("nothing was removed" if plan.items else "nothing to remove")
    return plan


def make_plan(
    space: Workspace, tracking_uri: str | None, keep_days: float | None, *, own_store: str | None = None
) -> Plan:
    """The stages, checkpoints and half-written files of a local workspace that can be removed. `own_store`: the address of its own
    tracking store, if it is the copy of a remote workspace.
    """
    plan, stages = Plan(), space.stages()
    trainings = {p.name: p for p in sorted((space.root / "ray").iterdir()) if p.is_dir() and p.name[0] != "."}
    oldest = None if keep_days is None else time.time() - keep_days * DAY

    def abandoned(stage: StageFolder) -> bool:
        return oldest is not None and max(changed(stage.path), changed(trainings[stage.path.name])) <= oldest

    resumable = [
        s for s in stages if s.result is None and _checkpoints(trainings.get(s.path.name)) and not abandoned(s)
    ]
    plan.kept += [
        f"{s.path.name}: a training that can be resumed, {_size(size_of(trainings[s.path.name]))}" for s in resumable
    ]
    wanted = _referenced(
        space, stages, resumable, tracking_uri, keep_days, plan, own_store or space.default_tracking_uri
    )
    given_up = [] if keep_days is None else [s for s in stages if s.result is None and s not in wanted]
    _trainings(space, stages, trainings, given_up, plan)
    for stage in (s for s in stages if s not in wanted):
        end = "unfinished; " if stage.result is None else ""
        plan.add(space, stage.path, f"{end}no pipeline and no registered version refers to it")
    doomed = {space.root / item.path for item in plan.items if item.path}
    for path in sorted(space.root.rglob(".*.partial")):
        busy = space.root / "ray" in path.parents and changed(path) > time.time() - YOUNG
        if not doomed & {path, *path.parents} and not busy:
            plan.add(space, path, "left half written by a run that was killed")
    if oldest is not None:
        plan.items = [item for item in plan.items if item.path and changed(space.root / item.path) <= oldest]
    return plan


def _trainings(
    space: Workspace, stages: list[StageFolder], trainings: dict[str, Path], given_up: list[StageFolder], plan: Plan
) -> None:
    """Adds checkpoints that no training will resume from. `given_up`: unfinished stages that were not resumed in time."""
    by_name = {stage.path.name: stage for stage in stages}
    for name, path in trainings.items():
        stage = by_name.get(name)
        if stage is None:
            plan.add(space, path, "checkpoints of a stage that no longer exists")
        elif stage.result is not None:
            plan.add(space, path, "checkpoints of a training that ended; its model is kept")
        elif stage in given_up:
            plan.add(space, path, "checkpoints of a training that was not resumed within --keep-days")


def _checkpoints(training: Path | None) -> list[Path]:
    # A trial's lie one folder deeper than those of a training.
    return [p for p in sorted(training.rglob("checkpoint-*")) if p.is_dir()] if training else []


def _referenced(
    space: Workspace,
    stages: list[StageFolder],
    resumable: list[StageFolder],
    tracking_uri: str | None,
    keep_days: float | None,
    plan: Plan,
    own_store: str,
) -> list[StageFolder]:
    """The stages to keep: those that a pipeline names, resumable trainings, the stages behind registered versions, and the inputs
    of all of these.
    """
    since = 0.0 if keep_days is None else time.time() - keep_days * DAY
    records = {name: record for name, record in space.pipelines().items() if record["used"] >= since}
    if old := [name for name, record in records.items() if "stages" not in record]:
        plan.kept.append(
            f"all stages: {len(old)} configuration{'s' * (len(old) > 1)} ran before the workspace recorded their stages, "
            f"or the record is damaged ({', '.join(old[:3])}{', ...' * (len(old) > 3)}); "
            "run them again, or exclude them with --keep-days"
        )
        return stages
    current = {f"{name}-{key}" for record in records.values() for name, key in record["stages"].items()}
    kept = [stage for stage in stages if stage.path.name in current or stage in resumable]
    runs = {stage.path.name: stage.read("runs.json") for stage in stages}
    stores = {uri: uri for ids in runs.values() for uri in ids}
    if tracking_uri:
        stores[shown(tracking_uri)] = tracking_uri  # runs.json has it without the password, which a request may need
    needed = set()
    for name, uri in sorted(stores.items()):
        tracked = {folder: str(ids[name]) for folder, ids in runs.items() if name in ids}
        own = uri == own_store  # gc removes deleted runs from it, so some may be missing
        try:
            needed |= _registered(uri, set() if own else set(tracked.values()))
        except UserError:
            plan.kept.append(
                f"stages tracked in {shown(name)}, which does not answer here: they may be registered there"
            )
            kept += [stage for stage in stages if stage.path.name in tracked and stage not in kept]
    while True:  # keep the inputs of kept stages too: one folder for each identity
        needed |= {identity for stage in kept for identity in _made_from(stage)}
        have = {str((stage.result or {}).get("identity")) for stage in kept}
        made = [s for s in stages if s.result and str(s.result.get("identity")) in needed - have]
        settings = "\n".join(json.dumps(stage.read("depends.json")) for stage in kept)
        named = [s for s in stages if s not in kept and s.path.name in settings]
        if not made and not named:
            return kept
        # A stage may also name a folder: a data set to read, or statistics to compare with.
        kept += named or [max(made, key=lambda s: (s.path / RESULT).stat().st_mtime)]


def _registered(uri: str, runs: set[str]) -> set[str]:
    """The identities of the stages behind the versions that are registered in a store.

    Raises UserError if the store does not answer. Also raises it for an SQLite file without one of `runs`: then the stages were
    tracked in a file of the same name on another machine.
    """
    from workflows.tracking.tracker import Tracker

    tracker = Tracker(uri, read_only=True)
    if uri.startswith("sqlite") and any(not tracker.knows(run) for run in runs):
        raise UserError(f"{shown(uri)}: is the store of another machine")
    return {v.tags[tag] for v in Registry(tracker).versions() for tag in ("identity", "evaluation") if tag in v.tags}


def _made_from(stage: StageFolder) -> set[str]:
    """The identities of a stage's inputs."""
    depends = stage.read("depends.json")
    values = [depends.get(name) for name in ("prepare", "teacher", "start", "evaluate", "register")]
    values += [v for name in ("students", "starts") for v in (depends.get(name) or {}).values()]
    return {v for v in values if isinstance(v, str)}


def _tracking(space: Workspace, keep_days: float, plan: Plan) -> None:
    """Adds deleted runs and unregistered models of the workspace's own store. Other stores are left to their owners."""
    from workflows.registry.leftovers import forget, leftovers
    from workflows.tracking.tracker import Tracker

    if not (space.root / "mlflow.db").exists():
        return
    registry = Registry(Tracker(space.default_tracking_uri, artifacts=space.default_artifacts))
    why = {"run": "a run that was deleted", "model": "a model without a registered version"}
    for found in leftovers(registry, older_than_days=keep_days):
        here = found.folder if found.folder and space.root in found.folder.parents and found.folder.exists() else None
        size, path = (size_of(here), here.relative_to(space.root)) if here else (0, None)
        plan.items.append(
            Item(f"{found.kind} {found.id}", why[found.kind], size, path, partial(forget, registry, found))
        )


def _copies(days: float, plan: Plan) -> None:
    """Adds this machine's copies of remote files, of any workspace, that were not used for `days` days."""
    folder = cache_folder() / "copies"
    old = [path for path in sorted(folder.glob("*")) if path.lstat().st_mtime <= time.time() - days * DAY]

    def remove() -> None:
        for path in old:
            shutil.rmtree(path, ignore_errors=True)

    if old:
        several = "ies" if len(old) > 1 else "y"
        what = f"{len(old)} cop{several} of remote files in {folder}"
        plan.items.append(Item(what, f"not used for {days:g} days", sum(map(size_of, old)), None, remove))


def show(plan: Plan, screen: Screen) -> None:
    """Prints the items as a table, and what is kept with its reasons."""
    from rich.table import Table

    if plan.items:
        table = Table(header_style="bold")
        for name in ("to be removed", "size", "why"):
            table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
        for item in plan.items:
            table.add_row(escape(item.what), _size(item.bytes), escape(item.why))
        show_table(screen.console, table)
    for text in plan.kept:
        screen.line(f"[dim]kept[/]  {escape(text)}")


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"
