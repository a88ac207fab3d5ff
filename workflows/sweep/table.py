"""The table of a sweep: trials that differ only in the seed become one row, and the Pareto front is marked."""

from __future__ import annotations

import json
import statistics
from typing import Any

from workflows.rendering.screen import Screen, show_table
from workflows.stages.evaluate import MEASURES

REPORTED = "_reported"
"""In the names of measures in the features that report, which only sweeps with SweepOptions.reporting have: frechet_reported."""
SHOWN = {"frechet": "distance", "recall": "recall"}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and standard deviations of the finished trials. Those that differ only in the seed become one row. Sorted by k, then by
    distance.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in rows if "frechet" in row):
        point = {field: v for field, v in row["point"].items() if field != "seed"}
        groups.setdefault(json.dumps(point, sort_keys=True), []).append(row)
    out = []
    for text, members in groups.items():
        line: dict[str, Any] = {"point": json.loads(text), "seeds": len(members)}
        for name in (n for n in members[0] if n in (*MEASURES, "seconds") or REPORTED in n):
            values = [m[name] for m in members]
            line[name] = {"mean": statistics.mean(values), "spread": statistics.pstdev(values)}
        out.append(line)
    return sorted(out, key=lambda line: (line["point"]["k"], line["frechet"]["mean"]))


def front(points: list[tuple[int, float]]) -> set[int]:
    """Indices of the (k, distance) points on the Pareto front: nearer to the data than all others with as many steps or fewer."""
    on, least = set(), float("inf")
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < least:
            least = points[i][1]
            on.add(i)
    return on


def varied(points: list[dict[str, Any]]) -> list[str]:
    """The fields in which the points differ, k first."""
    names = dict.fromkeys(field for point in points for field in point)
    return ["k", *(f for f in names if f != "k" and len({json.dumps(point.get(f)) for point in points}) > 1)]


def short_value(value: Any) -> str:
    """A field's value for a line or a cell. A setting is shown by its name."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value.get("choice", value) if isinstance(value, dict) else value)


def described(row: dict[str, Any], fields: tuple[str, ...]) -> str:
    """A line about a trial that ended, with these fields of its point."""
    point = "  ".join(f"{field} {short_value(row['point'].get(field))}" for field in ("k", *fields))
    if row["outcome"] == "failed":
        return f"{point}  failed: {row['why']}"
    if row["outcome"] == "stopped":
        return f"{point}  stopped at {row['images']:,} images, distance {row['score']:.3f}"
    return f"{point}  distance {row['frechet']:.3f}"


def show(rows: list[dict[str, Any]], screen: Screen) -> None:
    """Prints the table. All settings are in one column, the only one that wraps on a narrow screen."""
    from rich.table import Table

    lines = summarise(rows)
    if lines:
        (_, *fields), table = varied([line["point"] for line in lines]), Table(header_style="bold")
        shown = {name: title for name, title in SHOWN.items() if name in lines[0]}
        seeds = {"seeds": [str(line["seeds"]) for line in lines]} if any(line["seeds"] > 1 for line in lines) else {}
        table.add_column("front", justify="center", no_wrap=True)
        table.add_column("k", justify="right", no_wrap=True)
        table.add_column("settings")
        for name in (*shown.values(), "seconds", *seeds):
            table.add_column(name, justify="right", no_wrap=True)
        on = front([(line["point"]["k"], line["frechet"]["mean"]) for line in lines])
        for i, line in enumerate(lines):
            spread = {n: f" ± {line[n]['spread']:.3f}" if line["seeds"] > 1 else "" for n in shown}
            cells = [f"{line[n]['mean']:.3f}{spread[n]}" for n in shown]
            settings = "  ".join(f"{f}={short_value(line['point'].get(f))}" for f in fields)
            mark = "[green]●[/]" if i in on else ""
            cells += [f"{line['seconds']['mean']:.0f}", *(column[i] for column in seeds.values())]
            table.add_row(mark, str(line["point"]["k"]), settings, *cells)
        show_table(screen.console, table)
        screen.line("[green]●[/] the Pareto front: nearer to the data than all with as many steps or fewer")
    for outcome, words in (("stopped", "stopped early, for a distance that lagged"), ("failed", "failed")):
        if n := sum(row.get("outcome") == outcome for row in rows):
            screen.line(f"of {len(rows)} trials {n} {words}")
