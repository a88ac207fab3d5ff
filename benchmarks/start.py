"""bench start: how long a user waits until training begins, in a smoke run of the recipe as a command in a new workspace."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.engine import spread
from workflows.config.schema import RunConfig
from workflows.errors import UserError, in_a_line
from workflows.session.metrics import METRICS
from workflows.storage import jsonl

TARGETS = {"to_the_first_update": 15.0, "to_a_further_training": 4.0, "cpu_seconds": 50.0}


def bench_start(config: RunConfig, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` runs, in seconds: from the command to the teacher's first update, and to the end; the longest wait of
    a further training, from the last update before it to its first; CPU seconds of all processes, Ray's included, in all and up to
    the first update.
    """
    runs = [_smoke(config.recipe) for _ in range(repeats)]
    return {name: spread([run[name] for run in runs]) for name in runs[0]} | {"targets": TARGETS, "runs": repeats}


def _smoke(recipe: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        began = time.time()
        words = ["run", "--recipe", recipe, "--smoke", "--workspace", scratch]
        process = subprocess.Popen(
            [sys.executable, "-m", "workflows", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        meter = Meter(process.pid)
        shown, _ = process.communicate()
        ended = time.time()
        meter.stop()
        if process.returncode:
            raise UserError(f"bench: mmdistill {' '.join(words)} failed: {in_a_line(shown[-300:])}")
        updates = {
            path.name: [row["time"] / 1000 for row in jsonl.read(path / METRICS)]
            for path in (Path(scratch) / "stages").iterdir()
            if path.name.startswith(("teacher", "distill"))
        }
    first = min(times[0] for times in updates.values())
    further = [
        times[0] - max(moment for others in updates.values() for moment in others if moment < times[0])
        for times in updates.values()
        if times[0] > first
    ]
    return {
        "to_the_first_update": first - began,
        "to_a_further_training": max(further),
        "to_the_end": ended - began,
        "cpu_seconds": meter.seconds(),
        "cpu_to_the_first_update": meter.seconds(until=first),
    }


class Meter:
    """CPU seconds of a process and all its descendants, from Linux's /proc. It is read every 50 ms, so a process that lives for
    less is missed.
    """

    def __init__(self, pid: int) -> None:
        self._known = {pid}
        self._ticks: dict[int, int] = {}
        self._course: list[tuple[float, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def seconds(self, until: float | None = None) -> float:
        """All CPU seconds, or those up to a moment."""
        course = [spent for moment, spent in self._course if until is None or moment <= until]
        return course[-1] if course else 0.0

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self._look()
        self._look()

    def _look(self) -> None:
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            found[int(folder.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
        before = 0
        while len(self._known) > before:  # until there is no further child of a known one
            before = len(self._known)
            self._known |= {pid for pid, (parent, _) in found.items() if parent in self._known}
        self._ticks |= {pid: ticks for pid, (_, ticks) in found.items() if pid in self._known}
        self._course.append((time.time(), sum(self._ticks.values()) / os.sysconf("SC_CLK_TCK")))
