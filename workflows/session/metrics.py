"""Reads a stage's metrics from disk: one JSON object per line."""

from __future__ import annotations

from pathlib import Path

from workflows.storage import jsonl

METRICS, FIGURES, CLOCK = "metrics.jsonl", "figures.jsonl", "clock.json"


TimedRow = tuple[int, dict[str, float], int]
"""A step, its metrics, and when they were measured, in ms since 1970."""


def read_metrics(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of a stage, sorted by step. A line that a kill cut short is skipped."""
    return [(step, row) for step, row, _ in read_timed_metrics(folder)]


def read_timed_metrics(folder: Path) -> list[TimedRow]:
    """As `read_metrics`, with times. Rows of earlier versions have none and get the file's."""
    rows = []
    path = folder / METRICS
    for row in jsonl.read(path):
        moment = row.pop("time", None) or int(path.stat().st_mtime * 1000)
        rows.append((int(row.pop("step")), row, moment))
    return sorted(rows, key=lambda row: row[0])
