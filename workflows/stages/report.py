"""report: writes a self-contained HTML file with the table, the plots, the samples, the costs and the lineage."""

from __future__ import annotations

import base64
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from workflows.config.assembly import rounds_of, schedule_of
from workflows.config.values import digest
from workflows.rendering import TEMPLATES
from workflows.rendering.screen import Screen, clock, short, show_table
from workflows.session.context import Context, Done
from workflows.session.metrics import read_metrics, read_timed_metrics
from workflows.session.results import Results
from workflows.session.stage import StageRun, run_stage
from workflows.stages.distill import Distilled
from workflows.storage import jsonl
from workflows.storage.code import code_version
from workflows.storage.integrity import identity_of
from workflows.storage.uri import shown
from workflows.training.events import CAUSES, EVENTS, interruptions

if TYPE_CHECKING:
    from mmdistill_core.methods.base import Round
    from workflows.rendering import plots

CODE = (
    "workflows/stages/report.py",
    "workflows/rendering/templates/report.html",
    "workflows/rendering/templates/style.css",
    "workflows/rendering/plots.py",
    "workflows/rendering/grids.py",
    "workflows/registry/lineage.py",
    "workflows/registry/drawing.py",
    "workflows/training/events.py",
)
TITLES = {"frechet": "Frechet", "kid": "kernel distance", "inception_score": "Inception score"}
"""The headers of the table for measures that are not shown by their name."""


def report(
    context: Context,
    prepared: Done,
    trained: Done,
    distilled: Distilled,
    measured: Done,
    registered: Done,
) -> Done:
    depends = {
        "evaluate": measured.identity,
        "register": registered.identity,
        "config": digest(context.config.model_dump(mode="json")),
        "code": code_version(*CODE),
    }
    return run_stage(
        context,
        "report",
        depends=depends,
        params={"recipe": context.config.recipe},
        body=lambda run: _write(run, prepared, trained, distilled, measured, registered),
    )


def _write(
    run: StageRun, prepared: Done, trained: Done, distilled: Distilled, measured: Done, registered: Done
) -> dict[str, Any]:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from workflows.registry.drawing import draw
    from workflows.registry.lineage import lineage_of
    from workflows.registry.versions import Registry
    from workflows.rendering import plots
    from workflows.rendering.grids import lines

    config, tracker, table = run.context.config, run.context.tracker, measured.result
    results, ks, trainings = Results.of(table), sorted(distilled.students), [trained, *distilled.rounds.values()]
    rounds = [r for r in rounds_of(config.distill, schedule_of(config)) if r.name in distilled.rounds]
    rounds.sort(key=lambda r: (r.ks or (0,), r.name))
    histories = {_title(r): read_metrics(distilled.rounds[r.name].folder) for r in rounds}
    curves = {curve.metric: curve for r in rounds for curve in r.method.curves}.values()
    timelines = {done.name: _timeline(done) for done in trainings if done.result["interruptions"]["times"]}
    registry, uris = Registry(tracker), [registered.result["teacher"], *registered.result["students"].values()]
    grids = {file.stem: file for file in (measured.folder / "grids").glob("*.png")}
    picture = run.path / "samples.png"
    shown = {_who(results.longest): grids[results.longest["name"]]}
    shown |= {_who(results.students[k]): grids[results.students[k]["name"]] for k in reversed(ks)}
    lines(shown, of=2, width=prepared.result["shape"][-1]).save(picture)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"short": short, "clock": clock}
    html = environment.get_template("report.html").render(
        recipe=config.recipe,
        method=config.distill.method.rpartition(":")[2].replace("_", " "),
        headline=headline(results, ks),
        most=results.longest["k"],
        table=table,
        tables=_tables(table),
        ks=ks,
        shown={k: (results.teachers[k]["name"], results.students[k]["name"]) for k in ks},
        longest=results.longest["name"],
        distance_plot=plots.distance_against_steps(table),
        curve_plots=[(plots.curve_in_training(histories, curve), curve) for curve in curves],
        progress_plot=plots.distance_in_training(histories),
        picture=_data_uri(picture),
        grids={name: _data_uri(file) for name, file in grids.items()},
        costs=_costs(prepared, trainings, measured),
        causes=CAUSES,
        interrupted={name: (one.events, interruptions(one.events)) for name, one in timelines.items()},
        timeline=plots.timeline(timelines) if timelines else "",
        lineage_drawing=draw(lineage_of(registry, [registry.one(uri) for uri in uris])),
        moved=registered.result["moved"],
        prepared=prepared.result,
        config_yaml=config.yaml(),
        parent_run=run.context.parent_run,
        tracking=tracker.uri,
    )
    path = run.path / "report.html"
    path.write_text(html)
    for file in (path, picture):
        tracker.log_artifact(run.run_id, file)
    return {"identity": identity_of(path), "artifacts": ["report.html", "samples.png"], "summary": "one HTML file"}


def _who(row: dict[str, Any]) -> str:
    return f"{row['who']}, {row['k']} step{'s' * (row['k'] > 1)}"


def _tables(table: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables of all figures, one for each space: its description, and the header of each of its measures."""
    tables = []
    for space in table["spaces"]:
        own = [name for name in space["measures"] if name in table["measures"]]
        headers = {name: name.removesuffix(space["suffix"]) for name in own}
        headers |= {f"frechet{space['suffix']}_{rows}": f"Frechet, {rows} images" for rows in space["beside"]}
        tables.append(space | {"headers": {name: TITLES.get(header, header) for name, header in headers.items()}})
    return tables


def _title(round_: Round) -> str:
    return f"k = {', '.join(map(str, round_.ks))}" if round_.ks else round_.name


def headline(results: Results, ks: list[int]) -> dict[str, Any]:
    """The figures at the top: the student with the lowest distance beside the teacher with the most steps, and the distance of each
    student over the teacher's at the same k.
    """
    distance = {k: results.students[k]["frechet"]["mean"] for k in ks}
    longest, best = results.longest, min(ks, key=lambda k: distance[k])
    return {
        "k": best,
        "student": distance[best],
        "teacher": longest["frechet"]["mean"],
        "ratio": distance[best] / longest["frechet"]["mean"],
        "fewer": longest["nfe"] / results.students[best]["nfe"],
        "same_k": {k: distance[k] / results.teachers[k]["frechet"]["mean"] for k in ks},
    }


def _timeline(done: Done) -> plots.Timeline:
    from workflows.rendering.plots import Timeline

    points = [(step, moment) for step, _, moment in read_timed_metrics(done.folder)]
    return Timeline(points, list(jsonl.read(done.folder / EVENTS)))


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _costs(prepared: Done, trainings: list[Done], measured: Done) -> list[dict[str, Any]]:
    """The rows of the table of costs. `forwards` counts network evaluations."""
    counts = ("images", "forwards", "best_images")
    costs = [
        {"name": done.name, "run": done.run_id, "seconds": done.seconds}
        | {name: done.result.get(name) for name in counts}
        for done in (prepared, *trainings, measured)
    ]
    table = measured.result
    costs[-1]["forwards"] = sum(row["nfe"] for row in table["rows"]) * table["samples"] * table["seeds"]
    return costs


def last_screen(summary: dict[str, Any], screen: Screen, workspace: str, tracking_uri: str | None) -> None:
    """Shows the students' distances, the path of the report, and commands to continue with."""
    from rich.markup import escape
    from rich.table import Table

    longest, best = summary["teacher_longest"], summary["teacher_best"]
    table = Table(header_style="bold")
    for header in (
        "steps",
        "student",
        "teacher,\nsame steps",
        "student /\nteacher",
        f"student / teacher\nat {longest['k']} steps",
        "trained\nin",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for s in summary["students"]:
        table.add_row(
            str(s["k"]),
            f"{s['frechet']:.3f}" + (f" ± {s['frechet_spread']:.3f}" if summary["seeds"] > 1 else ""),
            f"{s['teacher_frechet_same_k']:.3f}",
            f"{s['frechet'] / s['teacher_frechet_same_k']:.3f}",
            f"{s['frechet'] / longest['frechet']:.2f}",
            clock(s["seconds"]),
        )
    screen.line()
    show_table(screen.console, table)
    seeds = f"{summary['seeds']} seed{'s' * (summary['seeds'] > 1)}"
    screen.line(
        f"Frechet distance in {summary['features']} features, which chose nothing; {summary['counts']}, {seeds}; teacher at "
        f"{longest['k']} steps {longest['frechet']:.3f}; {summary['floor_of']} {summary['floor']:.3f}."
    )
    screen.line(f"The teacher's best row: {best['frechet']:.3f}, {best['sampler']}, {best['k']} steps.")
    if stops := summary.get("interruptions"):
        times = f"{stops['times']} time{'s' * (stops['times'] > 1)}"
        screen.line(f"Went on {times} after an interruption: {short(stops['again'])} images trained again.")
    for text in summary["warnings"]:
        screen.line(f"[yellow]![/] {escape(text)}.")
    screen.line(f"Total {clock(summary['seconds'])}.  Report: [bold]{escape(summary['report'])}[/]")
    if summary["report_here"] != summary["report"]:
        screen.line(escape(f"  a copy is {summary['report_here']}"))
    where = f" --workspace {quote(str(workspace))}" if str(workspace) != ".mmdistill" else ""
    store = f" --tracking-uri {quote(shown(tracking_uri))}" if tracking_uri else ""
    champion = max(summary["students"], key=lambda s: s["k"])
    screen.line("Next:")
    screen.line(escape(f"  mmdistill sample {quote(champion['model_uri'])} --n 64{where}{store}"))
    if summary["tracking"].startswith("http"):
        screen.line(escape(f"  {summary['tracking']}  is MLflow's page"))
    elif not store:
        screen.line(escape(f"  mmdistill ui{where}"))
