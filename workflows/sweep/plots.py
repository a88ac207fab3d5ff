"""The figures of a sweep's report: matplotlib to inline SVG, in the style of rendering/plots.py."""

from __future__ import annotations

import json
import math
from typing import Any

from workflows.rendering.plots import FLOOR, INK, STUDENT, blank, steps_axis, svg
from workflows.sweep.table import front, short_value

COLOURS = ("#d1495b", "#e28413", "#3f8f5f", "#2b6f9e", "#7a5aa6", "#8a8f98")
"""One for each k, in turn."""
COLUMNS = 4


def pareto(rows: list[dict[str, Any]]) -> str:
    """A log-log plot of every trial at its k, and the Pareto front."""
    figure, axes = blank(1, width=10.4, height=4.6)
    axis, ks = axes[0, 0], {row["point"]["k"] for row in rows}
    for outcome, marker, label in (("finished", "o", "a trial"), ("stopped", "x", "stopped early")):
        points = [_at(row) for row in rows if row["outcome"] == outcome]
        look: dict[str, Any] = {"s": 34, "marker": marker, "color": FLOOR, "alpha": 0.65, "zorder": 3}
        if points:
            axis.scatter(*zip(*points, strict=True), label=label, **look)
    points = [_at(row) for row in rows if row["outcome"] == "finished"]
    _front(axis, sorted(points[i] for i in front(points)))
    axis.set_yscale("log")
    _decimal(axis.yaxis)
    steps_axis(axis, sorted(ks))
    axis.set_xlabel("k, steps of a sample")
    axis.set_ylabel("Frechet distance")
    axis.legend(loc="upper right")
    return svg(figure)


def _front(axis: Any, on: list[tuple[int, float]]) -> None:
    if on:
        look: dict[str, Any] = {"color": STUDENT, "linewidth": 2, "marker": "D", "markersize": 7, "zorder": 5}
        axis.plot(*zip(*on, strict=True), label="Pareto front", **look)
    for point in on:
        axis.annotate(f"{point[1]:.3f}", point, xytext=(7, 5), textcoords="offset points", color=STUDENT)


def by_field(rows: list[dict[str, Any]], fields: list[str]) -> str:
    """The distance against each field that differs, with a colour for each k. Returns "" if there is none."""
    shown, names = [row for row in rows if row["outcome"] != "failed"], [f for f in fields if f != "k"]
    if not names or not shown:
        return ""
    ks = sorted({row["point"]["k"] for row in shown})
    out = []
    for first in range(0, len(names), COLUMNS):
        part = names[first : first + COLUMNS]
        figure, axes = blank(COLUMNS, width=10.4, height=2.9, sharey=True)
        for axis, field in zip(axes[0], part, strict=False):
            _field(axis, shown, field, ks)
        for axis in axes[0][len(part) :]:
            axis.set_visible(False)
        axes[0, 0].set_yscale("log")
        _decimal(axes[0, 0].yaxis)
        axes[0, 0].set_ylabel("Frechet distance")
        if first == 0:
            figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=len(ks))
        out.append(svg(figure))
    return "".join(out)


def _field(axis: Any, rows: list[dict[str, Any]], field: str, ks: list[int]) -> None:
    values = [row["point"].get(field) for row in rows]
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    names = sorted({json.dumps(v) for v in values})
    numeric = len(numbers) == len(values) and len(names) > 3
    for i, k in enumerate(ks):
        for outcome, marker, label in (("finished", "o", f"k = {k}"), ("stopped", "x", None)):
            own = [r for r in rows if r["point"]["k"] == k and r["outcome"] == outcome]
            values = [r["point"].get(field) for r in own]
            aside = (i - (len(ks) - 1) / 2) * 0.12
            x = values if numeric else [names.index(json.dumps(v)) + aside for v in values]
            colour = COLOURS[i % len(COLOURS)]
            axis.scatter(x, [_at(r)[1] for r in own], s=30, marker=marker, color=colour, label=label, zorder=3)
    if numeric and min(numbers) > 0 and max(numbers) / min(numbers) > 3:
        axis.set_xscale("log")
        _decimal(axis.xaxis)
    elif numeric:
        axis.locator_params(axis="x", nbins=4)
    else:
        axis.set_xticks(range(len(names)), [short_value(json.loads(name)) for name in names])
        axis.set_xlim(-0.6, len(names) - 0.4)
    axis.set_title(field, color=INK)


def _at(row: dict[str, Any]) -> tuple[int, float]:
    """Where a trial is drawn: (k, distance). A stopped trial has its best distance in training."""
    return int(row["point"]["k"]), float(row.get("frechet", row.get("score", math.nan)))


def _decimal(side: Any) -> None:
    """Sets the ticks of a logarithmic axis to 0.1, 0.2, 0.5, 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    side.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_formatter(NullFormatter())
