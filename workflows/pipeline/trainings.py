"""Repeats a run with other seeds, so that its figures have a mean and a spread over trainings.

All seeds share the images, the features and the reference statistics; the teacher and the students are trained again for each.
"""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table

from workflows.config.schema import RunConfig
from workflows.pipeline.run import run_pipeline
from workflows.rendering.screen import Screen, show_table
from workflows.session.options import RunOptions
from workflows.storage.local import write_json
from workflows.storage.workspace import Workspace

Figure = dict[str, float]


def run_trainings(config: RunConfig, options: RunOptions, screen: Screen, *, trainings: int) -> dict[str, Any]:
    """Runs the pipeline with the seeds seed, seed + 1, ... Returns what `compared` makes of their tables, and writes it to
    reports/<recipe>/trainings.json in the workspace.
    """
    summaries = []
    for i in range(trainings):
        own = config.model_copy(update={"seed": config.seed + i})
        screen.line(f"[bold]training {i + 1} of {trainings}[/], seed {own.seed}")
        summaries.append(run_pipeline(own, options, screen))
    result = compared(summaries) | {"recipe": config.recipe, "seeds": [config.seed + i for i in range(trainings)]}
    workspace = Workspace(options.workspace)
    path = workspace.report(config.recipe) / "trainings.json"
    write_json(path, result)
    workspace.share_report(config.recipe)
    return result | {"report": str(path)}


def compared(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over trainings, in each of the features that report.

    floor_of   what the floor is the distance of: samples can hope to reach it
    spaces     by the ends of the measures' names ("" are the main features): what the features are, the floor, the teacher's best
               row of each training (any sampler, any number of steps), and for each k the student's distance, the teacher's at the
               same steps, and the ratio of the student's to the teacher's best
    trainings  the rows of each training's table
    """
    first = summaries[0]
    ends = [
        (space, end)
        for space in first["spaces"]
        for end in (space["suffix"], *(f"{space['suffix']}_{rows}" for rows in space["beside"]))
    ]
    return {
        "samples": first["samples"],
        "counts": first["counts"],
        "sampling_seeds": first["seeds"],
        "chosen_by": first["chosen_by"],
        "floor_of": first["floor_of"],
        "spaces": {end: _space(summaries, space, end) for space, end in ends},
        "trainings": [summary["rows"] for summary in summaries],
    }


def _space(summaries: list[dict[str, Any]], space: dict[str, Any], end: str) -> dict[str, Any]:
    measure = f"frechet{end}"
    teachers = [[row for row in summary["rows"] if row["who"] == "teacher"] for summary in summaries]
    best = [min(rows, key=lambda row: float(row[measure]["mean"])) for rows in teachers]
    lowest = [row[measure]["mean"] for row in best]
    students = {}
    for k in (student["k"] for student in summaries[0]["students"]):
        own = [_row(summary, "student", k)[measure]["mean"] for summary in summaries]
        same = [_row(summary, "teacher", k, summary["compared_by"])[measure]["mean"] for summary in summaries]
        ratios = [student / teacher for student, teacher in zip(own, lowest, strict=True)]
        students[str(k)] = {"student": _of(own), "teacher_same_steps": _of(same), "over_teachers_best": _of(ratios)}
    rows = end.removeprefix(space["suffix"]).removeprefix("_") or summaries[0]["reference_rows"]
    return {
        "kind": space["kind"],
        "title": space["title"],
        "rows": rows,
        "floor": summaries[0]["floors"][measure],
        "teachers_best": _of(lowest) | {"rows": [f"{row['sampler']}, {row['k']} steps" for row in best]},
        "students": students,
    }


def _row(summary: dict[str, Any], who: str, k: int, sampler: str | None = None) -> dict[str, Any]:
    """The plain row of k steps, of a teacher by the sampler that students are compared with."""
    row: dict[str, Any] = next(
        row
        for row in summary["rows"]
        if row["who"] == who and row["plain"] and row["k"] == k and sampler in (None, row["sampler"])
    )
    return row


def _of(values: list[float]) -> Figure:
    return {"mean": statistics.mean(values), "spread": statistics.pstdev(values)}


def show(result: dict[str, Any], screen: Screen) -> None:
    """Prints a table for each of the features."""
    n = len(result["trainings"])
    screen.line()
    for space in result["spaces"].values():
        title = f"Frechet distance to the images of {space['rows']}, features of {space['kind']}"
        table = Table(header_style="bold", title=title, title_justify="left")
        for header in ("steps", "student", "teacher,\nsame steps", "student /\nteacher's best"):
            table.add_column(header, justify="right", no_wrap=True)
        for k, own in space["students"].items():
            names = ("student", "teacher_same_steps", "over_teachers_best")
            table.add_row(k, *(_shown(own[name]) for name in names))
        show_table(screen.console, table)
        best = space["teachers_best"]
        screen.line(f"The teacher's best row: {_shown(best)} ({'; '.join(dict.fromkeys(best['rows']))}).")
        screen.line(f"{result['floor_of'][0].upper()}{result['floor_of'][1:]}: {space['floor']:.3f}.")
    screen.line(
        f"Mean ± standard deviation of {n} trainings, each of a teacher and its students; {result['counts']}. These features chose "
        f"nothing: weights were kept by those of {result['chosen_by']}."
    )
    screen.line(f"All figures: [bold]{result['report']}[/]")


def _shown(figure: Figure) -> str:
    return f"{figure['mean']:.3f} ± {figure['spread']:.3f}"
