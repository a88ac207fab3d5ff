"""The report's figures: matplotlib to inline SVG."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmdistill_core.defaults import LEVEL_EDGES

if TYPE_CHECKING:
    from mmdistill_core.methods.base import Curve

LEVELS = (
    f"logsnr < {LEVEL_EDGES[0]:g}",
    *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(LEVEL_EDGES)),
    f"logsnr > {LEVEL_EDGES[-1]:g}",
)
"""The legend of the curves by noise level."""
STUDENT, TEACHER, FLOOR, INK = "#d1495b", "#2b6f9e", "#8a8f98", "#22262b"
History = list[tuple[int, dict[str, float]]]
"""The metrics of a training: (images seen, metrics)."""


def blank(columns: int, *, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, one row of `columns` panels, in the style of the reports."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(
        {
            "font.family": "sans-serif",
            "font.size": 10.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#b8bdc4",
            "axes.labelcolor": INK,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.grid": True,
            "grid.color": "#e8eaed",
            "legend.frameon": False,
            "svg.fonttype": "path",
            "svg.hashsalt": "mmdistill",
        }
    )
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained", **options)


def svg(figure: Any) -> str:
    """The figure as an SVG element. Closes the figure."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def steps_axis(axis: Any, values: list[int]) -> None:
    """Makes the horizontal axis logarithmic, with a tick at each value."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [str(v) for v in values])
    axis.minorticks_off()


def _level(axis: Any, y: float, text: str, color: str, **line: Any) -> None:
    """Draws a horizontal line on a log scale, with its name below the right end, and makes room for the name."""
    axis.axhline(y, color=color, **line)
    at: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (0, -4), "textcoords": "offset points"}
    axis.annotate(text, (0.98, y), ha="right", va="top", color=color, fontsize=8.5, **at)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, y * (low / high) ** 0.08), high)


def _styles(table: dict[str, Any]) -> dict[tuple[str, str | None], dict[str, str]]:
    """(who, sampler) -> the style of a line: the teacher with each of its samplers, and the students with any."""
    samplers = dict.fromkeys(r["sampler"] for r in table["rows"] if r["who"] == "teacher" and r["plain"])
    looks = itertools.cycle(
        [(TEACHER, "-", "o"), ("#7fb2d1", "--", "s"), ("#9a86c9", ":", "^"), ("#6f9e2b", "-.", "v")]
    )
    styles: dict[tuple[str, str | None], dict[str, str]] = {
        ("teacher", sampler): {"color": colour, "linestyle": line, "marker": marker}
        for sampler, (colour, line, marker) in zip(samplers, looks)  # noqa: B905
    }
    return styles | {("student", None): {"color": STUDENT, "linestyle": "-", "marker": "D"}}


def distance_against_steps(table: dict[str, Any]) -> str:
    """A log-log plot of the teacher with each sampler, the students and the floor: a panel for each of the features that report."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    titles = {f"frechet{space['suffix']}": space["kind"] for space in table["spaces"]}
    figure, axes = blank(len(titles), width=10.4, height=4.3)
    for axis, (measure, title) in zip(axes[0], titles.items(), strict=True):
        for (who, sampler), style in _styles(table).items():
            rows = sorted(
                (r for r in table["rows"] if r["plain"] and r["who"] == who and sampler in (None, r["sampler"])),
                key=lambda r: int(r["k"]),
            )
            axis.errorbar(
                [r["nfe"] for r in rows],
                [r[measure]["mean"] for r in rows],
                yerr=[r[measure]["spread"] for r in rows],
                markersize=6,
                linewidth=2,
                capsize=2.5,
                label=who if sampler is None else f"{who}, {sampler}",
                zorder=4 if who == "student" else 3,
                **style,
            )
        axis.set_yscale("log")
        _level(axis, table["floor"][measure], table["floor_of"], FLOOR, linewidth=1, linestyle=(0, (2, 3)))
        steps_axis(axis, sorted({r["nfe"] for r in table["rows"]}))
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("network evaluations per sample")
        axis.set_title(f"in features of {title}" if title != "pixels" else "in pixels")
    axes[0, 0].set_ylabel("Frechet distance")
    axes[0, 0].legend(loc="upper right")
    return svg(figure)


def _panels(histories: dict[str, History], draw: Callable[[Any, str, History], None], height: float) -> str:
    """A figure with a panel for each training. `draw(axis, title, history)` draws one."""
    figure, axes = blank(len(histories), width=10.4, height=height, sharey=True)
    for axis, (title, history) in zip(axes[0], histories.items(), strict=True):
        axis.set_yscale("log")
        draw(axis, title, history)
        axis.set_title(title)
        axis.set_xlabel("images seen, thousands")
    return svg(figure)


def curve_in_training(histories: dict[str, History], curve: Curve) -> str:
    """A panel for each training that logged the curve, or for each of `histories` if none did: its mean, and its 8 noise levels."""
    import matplotlib as mpl

    levels = mpl.colormaps["viridis"]
    with_curve = {title: history for title, history in histories.items() if any(curve.metric in m for _, m in history)}
    first, last = next(iter(with_curve), ""), next(reversed(with_curve), "")

    def draw(axis: Any, title: str, history: History) -> None:
        for level, name in enumerate(LEVELS) if curve.by_level else ():
            metric = f"{curve.metric}/level{level}"
            points = [(n / 1e3, m[metric]) for n, m in history if metric in m]
            if points:
                color = levels(level / (len(LEVELS) - 0.5))
                axis.plot(*zip(*points, strict=True), color=color, linewidth=1, alpha=0.8, label=name)
        mean = [(n / 1e3, m[curve.metric]) for n, m in history if curve.metric in m]
        if mean:
            axis.plot(*zip(*mean, strict=True), color=INK, linewidth=2, label="mean")
            if curve.signed and (largest := max(abs(v) for _, v in mean)):
                axis.set_yscale("symlog", linthresh=largest / 1e3)
            elif max(v for _, v in mean) <= 0:
                axis.set_yscale("linear")  # a log scale has no place for zeros
        if title == first:
            axis.set_ylabel(curve.label)
        if title == last and axis.lines:
            axis.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1, 1))

    return _panels(with_curve or histories, draw, 3.2)


def distance_in_training(histories: dict[str, History]) -> str:
    """A panel for each training: the distance of the student as training continues, and a ring at its lowest point."""

    def draw(axis: Any, title: str, history: History) -> None:
        points = [(n / 1e3, m["score"]) for n, m in history if "score" in m]
        if points:
            axis.plot(*zip(*points, strict=True), color=STUDENT, linewidth=2, marker="D", markersize=4)
            best = min(points, key=lambda p: p[1])
            axis.plot(*best, marker="o", markersize=11, markerfacecolor="none", markeredgecolor=INK)
        if title == next(iter(histories)):
            axis.set_ylabel("Frechet distance")

    return _panels(histories, draw, 2.8)


@dataclass(frozen=True)
class Timeline:
    """The course of a training in time: `points` are (images, ms since 1970) of its metrics, and `events` those of events.py."""

    points: list[tuple[int, int]]
    events: list[dict[str, Any]]

    def stretches(self) -> Iterator[tuple[dict[str, Any], list[tuple[int, int]], dict[str, Any] | None]]:
        """For each "begun" event: the event, the points from there on, and the next "begun" event, if there is one."""
        begun = [row for row in self.events if row["event"] == "begun"]
        for row, after in zip(begun, [*begun[1:], None], strict=True):
            end = after["time"] if after else math.inf
            path = [(row["n_images"], row["time"])]
            path += [(n, time) for n, time in sorted(self.points) if n > row["n_images"] and row["time"] < time < end]
            if after and after["reached"] > path[-1][0]:
                path.append((after["reached"], int(after["time"] - 1000 * after["away"])))
            yield row, path, after


def timeline(timelines: dict[str, Timeline]) -> str:
    """A panel for each training: images seen against time, with the checkpoints, the losses and the number of workers."""
    figure, axes = blank(len(timelines), width=10.4, height=3.6)
    for axis, (name, course) in zip(axes[0], timelines.items(), strict=True):
        since = course.events[0]["time"]

        def draw(path: list[tuple[int, int]], since: int = since, axis: Any = axis, **style: Any) -> None:
            axis.plot([(t - since) / 60e3 for _, t in path], [n / 1e3 for n, _ in path], **style)

        for row, path, after in course.stretches():
            draw(path, color=TEACHER, linewidth=2, zorder=3)
            axis.annotate(
                f"{row['workers']} worker{'s' * (row['workers'] > 1)}",
                ((row["time"] - since) / 60e3, row["n_images"] / 1e3),
                xytext=(4, -4),
                textcoords="offset points",
                va="top",
                fontsize=9,
            )
            if after:
                gap = [path[-1], (after["n_images"], after["time"])]
                draw(gap, color=STUDENT, linestyle=(0, (2, 2)), linewidth=1.4, zorder=2)
                draw(gap[:1], color=STUDENT, marker="x", markersize=9, markeredgewidth=2.2, zorder=5)
        checkpoints = [(row["n_images"], row["time"]) for row in course.events if row["event"] == "checkpoint"]
        draw(
            checkpoints, color=TEACHER, linestyle="none", marker="o", markersize=4.5, markerfacecolor="white", zorder=4
        )
        axis.set_title(name)
        axis.set_xlabel("minutes since it began")
        axis.margins(y=0.12)  # room for the numbers of workers
    axes[0, 0].set_ylabel("images seen, thousands")
    return svg(figure)
