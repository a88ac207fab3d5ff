"""report: one HTML file, whole in itself, with the table, the plots, the samples, the costs and the lineage."""

from __future__ import annotations

import base64
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from workflows.config.assembly import rounds_of, schedule_of
from workflows.config.schema import RunConfig
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
    from mmdistill_core.methods.base import Curve, Round
    from workflows.rendering import plots

CODE = (
    "workflows/stages/report.py",
    "workflows/rendering/templates/report.html",
    "workflows/rendering/templates/style.css",
    "workflows/rendering/plots.py",
    "workflows/registry/lineage.py",
    "workflows/registry/drawing.py",
    "workflows/training/events.py",
)
NO_COSTS = {"images": None, "forwards": None, "best_images": None}
TITLES = {
    "frechet": "Frechet, features",
    "frechet_pixels": "Frechet, pixels",
    "kid": "kernel distance",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
}


def report(
    context: Context,
    prepared: Done,
    taught: Done,
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
        config={"recipe": context.config.recipe},
        body=lambda run: _body(run, prepared, taught, distilled, measured, registered),
    )


def _body(
    run: StageRun, prepared: Done, taught: Done, distilled: Distilled, measured: Done, registered: Done
) -> dict[str, Any]:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from workflows.registry.drawing import draw
    from workflows.registry.lineage import lineage_of
    from workflows.registry.versions import Registry
    from workflows.rendering import plots

    table, config = measured.result, run.context.config
    results, ks, trainings = Results.of(table), sorted(distilled.students), [taught, *distilled.rounds.values()]
    histories = {_title(one): read_metrics(distilled.rounds[one.name].folder) for one in _rounds(config, distilled)}
    curves = _curves(config, distilled)
    grids = {p.stem: _data_uri(p) for p in (measured.folder / "grids").glob("*.png")}
    timelines = {done.name: _timeline(done) for done in trainings if done.result["interruptions"]["times"]}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    registry, made = Registry(run.context.tracker), registered.result
    lineage = lineage_of(registry, [registry.one(uri) for uri in (made["teacher"], *made["students"].values())])
    environment.filters |= {"short": short, "clock": clock}
    html = environment.get_template("report.html").render(
        recipe=config.recipe,
        method=config.distill.method.rpartition(":")[2].replace("_", " "),
        headline=headline(results, ks),
        most=results.longest["k"],
        table=table,
        titles=TITLES,
        features=_features(table, prepared.result["held_out"]),
        reference=_reference(table),
        pairs=_pairs(table),
        ks=ks,
        shown={k: (results.teacher(k)["name"], results.student(k)["name"]) for k in ks},
        longest=results.longest["name"],
        distance_plot=plots.distance_against_steps(table),
        curve_plots=[(plots.curve_in_training(histories, curve), curve.explanation) for curve in curves],
        progress_plot=plots.distance_in_training(histories, results.longest["frechet"]["mean"], results.longest["k"]),
        grids=grids,
        costs=_costs(prepared, trainings, measured),
        causes=CAUSES,
        interrupted={name: (one.events, interruptions(one.events)) for name, one in timelines.items()},
        timeline=plots.timeline(timelines) if timelines else "",
        lineage=lineage,
        lineage_drawing=draw(lineage),
        moved=made["moved"],
        prepared=prepared.result,
        config_yaml=config.yaml(),
        parent_run=run.context.parent_run,
        tracking=run.context.tracker.uri,
    )
    path = run.path / "report.html"
    path.write_text(html)
    run.context.tracker.log_artifact(run.run_id, path)
    return {"identity": identity_of(path), "artifacts": ["report.html"], "summary": "one HTML file"}


def _rounds(config: RunConfig, distilled: Distilled) -> list[Round]:
    """The rounds, those of few steps first."""
    rounds = [one for one in rounds_of(config.distill, schedule_of(config)) if one.name in distilled.rounds]
    return sorted(rounds, key=lambda one: (one.ks or (0,), one.name))


def _title(one: Round) -> str:
    return f"k = {', '.join(map(str, one.ks))}" if one.ks else one.name


def _curves(config: RunConfig, distilled: Distilled) -> list[Curve]:
    """What the methods of these rounds have to show of their trainings, each once."""
    found = {curve.metric: curve for one in _rounds(config, distilled) for curve in one.method.curves}
    return list(found.values())


def headline(results: Results, ks: list[int]) -> dict[str, Any]:
    """The student of the lowest distance against the teacher's longest row, and each k against the teacher at the same k."""
    distance = {k: results.student(k)["frechet"]["mean"] for k in ks}
    longest, best = results.longest, min(ks, key=lambda k: distance[k])
    return {
        "k": best,
        "student": distance[best],
        "teacher": longest["frechet"]["mean"],
        "ratio": distance[best] / longest["frechet"]["mean"],
        "fewer": longest["nfe"] / results.student(best)["nfe"],
        "same_k": {k: distance[k] / results.teacher(k)["frechet"]["mean"] for k in ks},
    }


def _features(table: dict[str, Any], held_out: int) -> str:
    """In words, what the distances are measured in."""
    if table["features"] == "classifier":
        accuracy = f"{100 * table['classifier_accuracy']:.1f} % accuracy on {held_out} held-out images"
        return (
            f"Features are those of a classifier with {accuracy}, each divided by its standard deviation on the data."
        )
    if table["features"] == "inception":
        return (
            f"Features are the 2,048 of the FID's Inception-v3, weights {table['reference']['fingerprint']['weights']}."
        )
    if table["features"] == "mixture":
        return (
            "Features are the posterior weights of the mixture's modes, and the offsets from their means times these."
        )
    return "Features are the images themselves."


def _reference(table: dict[str, Any]) -> str:
    about, folder = table["reference"]["fingerprint"], table["reference"]["folder"]
    count = f"{table['reference_count']:,}"
    if folder:
        data = "the same data" if table["reference"]["own_data"] else f"other data ({about['data']})"
        return f"The reference is {folder}: {count} images of {data}."
    if about["rows"] == "holdout":
        return f"The {count} images held out are the reference; neither the teacher nor a student was trained on them."
    return f"All {count} images are the reference, and the training set."


def _pairs(table: dict[str, Any]) -> str:
    near, subsets = table["near"], table["kid_subsets"]
    kid = f"{subsets} subsets of at most 1,000" if subsets else "all pairs"
    score = f", Inception score in {table['inception_splits']} splits" if "inception_score" in table["measures"] else ""
    counts = f"{near['samples']:,} samples and {near['reference']:,} images"
    return f"Precision, recall and kernel distance are from {counts}, the last over {kid}{score}."


def _timeline(done: Done) -> plots.Timeline:
    from workflows.rendering.plots import Timeline

    points = [(step, moment) for step, _, moment in read_timed_metrics(done.folder)]
    return Timeline(points, list(jsonl.read(done.folder / EVENTS)))


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _costs(prepared: Done, trainings: list[Done], measured: Done) -> list[dict[str, Any]]:
    costs: list[dict[str, Any]] = [{**NO_COSTS, "name": "prepare", "run": prepared.run_id, "seconds": prepared.seconds}]
    for done in trainings:
        costs.append(
            {
                "name": done.name,
                "run": done.run_id,
                "seconds": done.seconds,
                "images": done.result["images"],
                "forwards": done.result["forwards"],
                "best_images": done.result.get("best_images"),
            }
        )
    evaluations = sum(r["nfe"] for r in measured.result["rows"]) * measured.result["samples"] * measured.result["seeds"]
    costs.append(
        {**NO_COSTS, "name": "evaluate", "run": measured.run_id, "seconds": measured.seconds, "forwards": evaluations}
    )
    return costs


def last_screen(summary: dict[str, Any], screen: Screen, workspace: str, tracking_uri: str | None) -> None:
    """The table, where the report is, and what to try next."""
    from rich.markup import escape
    from rich.table import Table

    table, longest = Table(title=None, header_style="bold", title_justify="left"), summary["teacher_longest"]
    for name, justify in (
        ("steps", "right"),
        ("student", "right"),
        ("teacher,\nsame steps", "right"),
        ("student /\nteacher", "right"),
        (f"student / teacher\nat {longest['k']} steps", "right"),
        ("trained\nin", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for s in summary["students"]:
        same = s["frechet"] / s["teacher_frechet_same_k"]
        table.add_row(
            str(s["k"]),
            f"{s['frechet']:.3f}" + (f" ± {s['frechet_spread']:.3f}" if summary["seeds"] > 1 else ""),
            f"{s['teacher_frechet_same_k']:.3f}",
            f"{same:.3f}",
            f"{s['frechet'] / longest['frechet']:.2f}",
            clock(s["seconds"]),
        )
    where = f" --workspace {quote(str(workspace))}" if str(workspace) != ".mmdistill" else ""
    store = f" --tracking-uri {quote(shown(tracking_uri))}" if tracking_uri else ""
    champion = max(summary["students"], key=lambda s: s["k"])
    screen.line()
    show_table(screen.console, table)
    seeds = f"{summary['seeds']} seed{'s' * (summary['seeds'] > 1)}"
    screen.line(
        f"Frechet distance in {summary['features']} features, {summary['counts']}, {seeds}; teacher at {longest['k']} steps "
        f"{longest['frechet']:.3f}; half the data against the other half {summary['floor']:.3f}."
    )
    best = summary["teacher_best"]
    screen.line(f"The teacher's best row: {best['frechet']:.3f}, {best['sampler']}, {best['k']} steps.")
    if stops := summary.get("interruptions"):
        screen.line(
            f"Went on {stops['times']} time{'s' * (stops['times'] > 1)} after an interruption: {short(stops['again'])} images "
            f"trained again."
        )
    for text in summary["warnings"]:
        screen.line(f"[yellow]![/] {escape(text)}.")
    screen.line(f"Total {clock(summary['seconds'])}.  Report: [bold]{escape(summary['report'])}[/]")
    if summary["report_here"] != summary["report"]:
        screen.line(escape(f"  a copy is {summary['report_here']}"))
    screen.line("Next:")
    screen.line(escape(f"  mmdistill sample {quote(champion['model_uri'])} --n 64{where}{store}"))
    if summary["tracking"].startswith("http"):
        screen.line(escape(f"  {summary['tracking']}  is MLflow's page"))
    elif not store:
        screen.line(escape(f"  mmdistill ui{where}"))
