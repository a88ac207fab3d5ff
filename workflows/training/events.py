"""The events of a training, apart from its metrics: one line each in `events.jsonl` of its stage.

Each has "event", "time" in ms since 1970 and, if known, "n_images", the images trained on by then:

begun       workers. When it resumes: cause (CAUSES); reached, the images at the last update before; again, how many of them are
            trained on once more; away, seconds from that update to this event
checkpoint  stalled, seconds that training waited for it; written, seconds until it was complete
lost        workers went away; why, as Ray or another worker reported it. `reached` and `away` of the next "begun" tell when
failed      like lost, for a worker that raised an error
stopped     on request, with a checkpoint
"""

from __future__ import annotations

import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from workflows.storage import jsonl

EVENTS = "events.jsonl"
AT = "at"
"""Not an event: the images trained on, sent every half second. After a loss, it tells how far the training was."""
DOWN = "down"
"""Not an event either: the training has no workers until it begins again."""
CAUSES = {
    "lost": "workers were lost",
    "failed": "a worker failed",
    "stopped": "the run was stopped",
    "driver": "the run was killed",
    "resized": "the number of workers changed",
}


LOST, FAILURE = "lost", "failed"
FAILED = (LOST, FAILURE)
FATAL = re.compile(r"No space left on device|was not finite in")
"""Errors of a worker that no retry fixes."""


def event(name: str, **more: Any) -> dict[str, Any]:
    return {"event": name, "time": int(time.time() * 1000)} | more


class Events:
    """The events of one training, recorded by the driver."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list(jsonl.read(path))
        self._images, self._moment = 0, 0
        self._heard = False  # whether this process heard it begin; if not, another driver ran it
        for row in self.rows:
            self._follow(row)

    def reached(self, n_images: float, moment: int) -> None:
        """Notes that training reached `n_images` at this time. Metrics that are repeated from a checkpoint change nothing."""
        if n_images > self._images:
            self._images, self._moment = int(n_images), moment

    def take(self, row: dict[str, Any]) -> dict[str, Any]:
        """Records an event, and returns it as recorded."""
        if row["event"] == AT:
            self.reached(row["n_images"], row["time"])
            return row
        if row["event"] == "begun" and any(before["event"] == "begun" for before in self.rows):
            row = row | {
                "cause": self._cause(),
                "reached": self._images,
                "again": max(0, self._images - row["n_images"]),
                "away": round((row["time"] - self._moment) / 1000, 1),
            }
        self._heard = self._heard or row["event"] == "begun"
        jsonl.append(self.path, row)
        self.rows.append(row)
        self._follow(row)
        return row

    def repeated(self, row: dict[str, Any]) -> bool:
        """Whether a failure repeats the last event. Ray Train reports one at every check until workers begin again."""
        last = self.rows[-1] if self.rows else {}
        return row["event"] in FAILED and (row["event"], row["why"]) == (last.get("event"), last.get("why"))

    def _follow(self, row: dict[str, Any]) -> None:
        if row["event"] == "begun":
            self._images, self._moment = row["n_images"], row["time"]
        elif "n_images" in row:
            self.reached(row["n_images"], row["time"])

    def _cause(self) -> str:
        for row in reversed(self.rows):
            if row["event"] in CAUSES:
                return str(row["event"])
            if row["event"] == "begun":
                break
        return "resized" if self._heard else "driver"


def interruptions(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarises a training's events: how often it resumed; images trained again, in all and at most; seconds without training,
    except while it was stopped or had no driver; the most images between two checkpoints, which bounds what an interruption costs.
    """
    again = [row for row in rows if "cause" in row]
    there = sorted({0, *(row["n_images"] for row in rows if row["event"] == "checkpoint")})
    return {
        "times": len(again),
        "again": sum(row["again"] for row in again),
        "most_again": max((row["again"] for row in again), default=0),
        "away": round(sum(row["away"] for row in again if row["cause"] not in ("stopped", "driver")), 1),
        "between_checkpoints": max((b - a for a, b in pairwise(there)), default=0),
    }
