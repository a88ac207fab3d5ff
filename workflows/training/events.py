"""What becomes of a training beside its metrics, a line each in `events.jsonl` of its stage.

Each has "event", "time" in ms since 1970, and, where they are known, "n_images", those trained on by then:

begun       workers. Begun again: cause (CAUSES); reached, the images of the last update before; again, those of them that are
            trained on once more; away, seconds from that update to this line
checkpoint  stalled, seconds for which training waited; written, seconds until it was complete
lost        workers that went away; why, in the words of who noticed. `reached` and `away` of the next line tell when
failed      as lost, of a worker that raised an error
stopped     as it was asked to, with a checkpoint
"""

from __future__ import annotations

import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from workflows.storage import jsonl as lines

EVENTS = "events.jsonl"
AT = "at"
"""Not an event: how far a training is, every half second, so that it is known how far it was when it was lost."""
DOWN = "down"
"""Not an event either: there are no workers from now on until it begins again, for whatever reason."""
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
"""Errors of a worker that no other try mends."""


def event(name: str, **more: Any) -> dict[str, Any]:
    return {"event": name, "time": int(time.time() * 1000)} | more


class Events:
    """Of one training, as the driver hears of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list(lines.read(path))
        self._images, self._moment = 0, 0
        self._heard = False  # by this process; what it did not hear the end of was ended with another
        for row in self.rows:
            self._follow(row)

    def reached(self, n_images: float, moment: int) -> None:
        """Training was there at this time. What is said again, as metrics are after a checkpoint was loaded, changes nothing."""
        if n_images > self._images:
            self._images, self._moment = int(n_images), moment

    def take(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keeps an event; gives it as it was kept."""
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
        lines.append(self.path, row)
        self.rows.append(row)
        self._follow(row)
        return row

    def repeated(self, row: dict[str, Any]) -> bool:
        """Whether it says again, of workers that did not begin since, what the last event said: as often as Ray Train looks."""
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
    """Of a training's events: how many times it went on; images trained again; seconds without training, those aside for which it
    was stopped or had no driver; and the most images between two checkpoints, which bounds what one interruption may cost.
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
