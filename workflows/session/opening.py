"""Opens a run: locks the workspace, opens the tracking store, starts Ray, and closes all of it at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import Any

from rich.markup import escape

from workflows.cluster.addresses import check_environment
from workflows.cluster.session import present, ray_session, require
from workflows.cluster.stopping import listening
from workflows.config.schema import RunConfig
from workflows.config.values import digest
from workflows.errors import UserError
from workflows.rendering.screen import Screen
from workflows.session.context import Context, settle
from workflows.session.options import A_WHILE, RunOptions, every_of, wait_of
from workflows.session.placement import place, suggest_workers
from workflows.storage.code import git_commit
from workflows.storage.uri import shown
from workflows.storage.workspace import Workspace
from workflows.tracking.tracker import Tracker, address_of, origin
from workflows.training.crew import resized_every
from workflows.training.mailbox import Monitor


@contextmanager
def open_context(
    config: RunConfig, options: RunOptions, screen: Screen, *, kind: str = "pipeline", extra_key: tuple[Any, ...] = ()
) -> Iterator[Context]:
    """For the length of the block, locks the workspace, opens the tracking store with a parent run of this `kind`, and starts Ray.
    `extra_key`: what identifies the run, besides its configuration. Raises ConfigError and UserError.
    """
    check_environment()
    wait = wait_of(options)
    resized_every()  # raises for an invalid value
    workspace = Workspace(options.workspace)
    with ExitStack() as stack:
        stack.enter_context(workspace.explained())
        stack.enter_context(workspace.lock())
        uri = address_of(options.tracking_uri, workspace.default_tracking_uri)
        places = f"workspace {shown(workspace.uri)}" + (f"  tracking {shown(uri)}{origin(uri)}" if origin(uri) else "")
        screen.line(f"[bold]mmdistill[/]  recipe [bold]{config.recipe}[/]  [dim]{escape(places)}[/]")

        def open_store(closing: ExitStack) -> Opened:
            tracker = closing.enter_context(open_tracker(workspace, uri, screen))
            queued = tracker.pending
            pipeline = f"{config.recipe}-{digest([config.model_dump(mode='json'), tracker.uri, kind, *extra_key])}"
            return queued, tracker, _parent_run(config, workspace, tracker, kind, pipeline), pipeline

        opening = stack.enter_context(_tracked(open_store, options, screen))
        with screen.status("starting Ray and opening the tracking store"):
            resources = stack.enter_context(ray_session(say=lambda text: screen.line(f"  [dim]{escape(text)}[/]")))
            monitor = Monitor()
            queued, tracker, parent, pipeline = opening.result()
        if queued:
            screen.line(f"  tracking: delivering {queued} entries that an earlier run had queued")
            settle(tracker, screen, wait)
        stopping = stack.enter_context(listening())  # after Ray, which installs its own handler
        placement = place(config, options, resources, present())
        suggest_workers(options, placement, resources, screen)
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
"""(entries that an earlier run had queued, the tracking store, the parent run's id, its name in the workspace)."""


@contextmanager
def _tracked(
    open_store: Callable[[ExitStack], Opened], options: RunOptions, screen: Screen
) -> Iterator[Future[Opened]]:
    """Opens the tracking store in a thread while the block starts Ray, which takes as long. Yields the future. After the
    block, sets the parent run's status, delivers what is queued, and closes the store.
    """
    with ExitStack() as closing, ThreadPoolExecutor(1, thread_name_prefix="tracking") as thread:
        opening = thread.submit(open_store, closing)
        try:
            yield opening
        except BaseException as error:
            if opening.exception() is None:  # waits for it
                _end_failed(error, opening.result(), options, screen)
            raise
        _, tracker, parent, _ = opening.result()
        try:
            tracker.end_run(parent)
            settle(tracker, screen, wait_of(options))
        finally:
            say_what_is_queued(tracker, screen, options.workspace)


def _end_failed(error: BaseException, opened: Opened, options: RunOptions, screen: Screen) -> None:
    """Ends a run that failed. A store that does not answer must neither hide the error nor delay it for long."""
    _, tracker, parent, _ = opened
    with suppress(UserError):
        tracker.end_run(parent, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
    with suppress(UserError):
        settle(tracker, screen, 0 if tracker.away else min(wait_of(options), A_WHILE))
    say_what_is_queued(tracker, screen, options.workspace)


@contextmanager
def open_tracker(workspace: Workspace, uri: str, screen: Screen) -> Iterator[Tracker]:
    """The tracking store with its outbox in the workspace. The workspace must be locked."""

    def say(text: str) -> None:
        screen.line(f"[yellow]![/] {escape(text)}")

    tracker = Tracker(uri, artifacts=workspace.default_artifacts, outbox=workspace.outbox, say=say)
    try:
        yield tracker
    finally:
        tracker.close()


def say_what_is_queued(tracker: Tracker, screen: Screen, workspace: str | Path) -> None:
    """Tells the user how to deliver what the tracking store does not have yet, if anything is queued."""
    if tracker.pending:
        where = f" --workspace {quote(str(workspace))}" if str(workspace) != ".mmdistill" else ""
        screen.line(
            f"[yellow]![/] tracking: {tracker.pending} entries for {escape(tracker.uri)} are queued in the workspace; "
            f"its next run delivers them, or: mmdistill deliver{escape(where)} --tracking-uri {escape(quote(tracker.uri))}"
        )


def _parent_run(config: RunConfig, workspace: Workspace, tracker: Tracker, kind: str, pipeline: str) -> str:
    """The id of the stages' parent run in this store: the earlier run of this configuration, resumed, or a new one."""
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
