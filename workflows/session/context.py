"""`Context`, which every stage is given, and `Done`, which a finished stage returns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape

from workflows.cluster.stopping import Stopping
from workflows.config.schema import RunConfig
from workflows.errors import UserError
from workflows.rendering.screen import Screen
from workflows.session.placement import Placement
from workflows.storage.uri import join
from workflows.storage.workspace import Workspace
from workflows.tracking.tracker import Tracker
from workflows.training.job import Every
from workflows.training.mailbox import Monitor


@dataclass
class Done:
    """A finished stage. Its outputs are in `folder` on this machine, and at `uri` for other machines. `reused`: an earlier run had
    finished it.
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
        """The hash of the stage's outputs, which enters the keys of later stages."""
        return str(self.result["identity"])

    @property
    def model_description(self) -> dict[str, Any]:
        """The content of the model.json of the stage's model."""
        return dict(json.loads((self.folder / "model" / "model.json").read_text()))

    def at(self, name: str) -> str:
        """The URI at which workers find a file or folder of the stage."""
        return join(self.uri, name)


@dataclass
class Context:
    """What a run gives its stages. `resources` are those that the cluster has or may get. `force` names the stages to run again.
    `listeners` take the rows that workers send, by the name of the training.
    """

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
    """Seconds that a stage waits for an answer that it needs from the tracking store."""

    def settle(self) -> None:
        """Waits until everything logged is delivered, for a stage that needs the tracking store's answer. Raises UserError if that
        takes more than `tracking_wait` seconds.
        """
        if not settle(self.tracker, self.screen, self.tracking_wait):
            raise self.tracker.unreachable()

    def tick(self) -> None:
        """Passes what the workers sent to the listeners and the screen. Raises UserError if another run has taken the workspace, or
        if a listener raised one.
        """
        self.workspace.check_held()
        rows, notes = self.monitor.drain()
        for text in notes:
            self.screen.line(f"[yellow]![/] {escape(text)}")
        errors = []
        for topic, row in rows:
            try:
                if topic in self.listeners:
                    self.listeners[topic](row)
            except UserError as error:  # from one training: handle the rows of the others first
                errors.append(error)
        if errors:
            raise errors[0]


def settle(tracker: Tracker, screen: Screen, seconds: float) -> bool:
    """Waits up to `seconds` until everything logged is delivered, with a progress bar after the first second. Returns whether it is
    delivered.
    """
    if seconds <= 0 or tracker.settle(min(1.0, seconds)):
        return tracker.pending == 0
    end, total = time.monotonic() + seconds - 1, tracker.pending
    with screen.bars():
        bar = screen.bar("tracking", total, unit="entries")
        while (left := end - time.monotonic()) > 0 and not tracker.settle(min(0.5, left)):
            state = "the store does not answer" if tracker.away else "delivering"
            bar.update(total - tracker.pending, f"{state}, waiting {left:.0f} s more")
    return tracker.pending == 0
