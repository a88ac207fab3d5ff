"""The `deliver` command: sends what runs of this workspace logged while their tracking store was unreachable."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from workflows.rendering.screen import Screen
from workflows.session.context import settle
from workflows.session.opening import open_tracker, say_what_is_queued
from workflows.session.options import RunOptions, wait_of
from workflows.storage.workspace import Workspace
from workflows.tracking.outbox import REFUSED, queued
from workflows.tracking.tracker import address_of, outbox_of


def deliver(workspace: str | Path, tracking_uri: str | None, screen: Screen, *, wait: float | None = None) -> bool:
    """Delivers the entries that are queued for the store, and lists other stores with queued entries.

    Waits at most `wait` seconds (default: MMDISTILL_TRACKING_WAIT, or 120). Returns True if nothing is left for this store and
    nothing was refused. Raises UserError if the store does not answer or refuses access, or if a run holds the workspace.
    """
    seconds, space = wait_of(RunOptions(workspace, tracking_wait=wait)), Workspace(workspace)
    with space.lock():
        uri = address_of(tracking_uri, space.default_tracking_uri)
        folder = outbox_of(space.outbox, uri)
        left, refused = queued(folder), 0
        if left:
            with open_tracker(space, uri, screen) as tracker:
                settle(tracker, screen, seconds)
                say_what_is_queued(tracker, screen, workspace)
                before, left, refused = left, tracker.pending, tracker.refused
                done = before - left - refused
                if done > 0:
                    screen.line(f"tracking: {done} entries were delivered to {escape(tracker.uri)}")
                if refused:
                    screen.line(
                        f"tracking: {refused} entries were refused, and are kept in {escape(str(folder / REFUSED))}"
                    )
        else:
            screen.line("tracking: nothing is queued for this store")
        for other in sorted(space.outbox.glob("*/store")):
            if other.parent != folder and (number := queued(other.parent)):
                store = other.read_text()
                screen.line(f"tracking: {number} entries are queued for {escape(store)}: give it with --tracking-uri")
    return left == refused == 0
