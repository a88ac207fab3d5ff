"""The report of a sweep, a self-contained HTML file: the Pareto front of k against distance, each field, all trials."""

from __future__ import annotations

from typing import Any

from workflows.rendering import TEMPLATES
from workflows.rendering.screen import clock
from workflows.session.context import Done
from workflows.session.results import Results
from workflows.storage.local import write_json
from workflows.sweep.best import Registered, best_recipe
from workflows.sweep.ledger import Ledger
from workflows.sweep.table import front, short_value, summarise, varied


def write_report(ledger: Ledger, prepared: Done, trained: Done, made: Registered | None, name: str) -> str:
    """Writes report.html, best.yaml and trials.json to reports/<recipe>-<name> in the workspace, and to the sweep's run. Returns
    the URI of report.html.
    """
    context, rows = ledger.context, rows_of(ledger)
    name = f"{context.config.recipe}-{name}"
    folder = context.workspace.report(name)
    (folder / "report.html").write_text(render(ledger, rows, prepared, made))
    (folder / "best.yaml").write_text(best_recipe(ledger))
    write_json(folder / "trials.json", as_json(ledger, trained))
    context.workspace.share_report(name)
    for file in ("report.html", "best.yaml", "trials.json"):
        context.tracker.log_artifact(context.parent_run, folder / file)
    return context.workspace.report_uri(name)


def rows_of(ledger: Ledger) -> list[dict[str, Any]]:
    """The trials that ended, in the order in which they began."""
    return [ledger.rows[name] for name in ledger.order if name in ledger.rows]


def as_json(ledger: Ledger, trained: Done) -> dict[str, Any]:
    """trials.json: the sweep's settings, the rows, and their means over seeds."""
    rows = rows_of(ledger)
    return {
        "recipe": ledger.context.config.recipe,
        "teacher": trained.identity,
        "search": ledger.options.search,
        "scheduler": ledger.options.scheduler,
        "space": ledger.space.described,
        "means": summarise(rows),
        "trials": rows,
    }


def render(ledger: Ledger, rows: list[dict[str, Any]], prepared: Done, made: Registered | None) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from workflows.sweep import plots

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"clock": clock, "value": short_value}
    context, best = ledger.context, ledger.best()
    finished = [row for row in rows if row["outcome"] == "finished"]
    on = front([(row["point"]["k"], row["frechet"]) for row in finished])
    fields = varied([row["point"] for row in rows])
    return environment.get_template("sweep.html").render(
        recipe=context.config.recipe,
        options=ledger.options,
        prepared=prepared.result,
        evaluate=context.config.evaluate,
        rows=sorted(
            rows, key=lambda r: (r["point"]["k"], r["outcome"] != "finished", r.get("frechet", r.get("score", 0)))
        ),
        on_front={finished[i]["name"] for i in on},
        best=best,
        chooses=prepared.result["choosing"]["kind"],
        fields=fields,
        counts={outcome: sum(r["outcome"] == outcome for r in rows) for outcome in ("finished", "stopped", "failed")},
        seconds=sum(row["seconds"] for row in rows),
        reported=_reported(made),
        front_plot=plots.pareto(rows),
        field_plot=plots.by_field(rows, fields),
        moved=made.registered.result["moved"] if made else {},
        lineage_drawing=_lineage(ledger, made),
        best_yaml=best_recipe(ledger),
        parent_run=context.parent_run,
        tracking=context.tracker.uri,
    )


def _reported(made: Registered | None) -> dict[int, tuple[float, float]]:
    """k -> the best student's distance in the features that report, and its teacher's at the same steps. {} if there are none."""
    if made is None:
        return {}
    results = Results.of(made.measured.result)
    return {k: (row["frechet"]["mean"], results.teachers[k]["frechet"]["mean"]) for k, row in results.students.items()}


def _lineage(ledger: Ledger, made: Registered | None) -> str:
    if made is None:
        return ""
    from workflows.registry.drawing import draw
    from workflows.registry.lineage import lineage_of
    from workflows.registry.versions import Registry

    registry, result = Registry(ledger.context.tracker), made.registered.result
    return draw(lineage_of(registry, [registry.one(uri) for uri in (result["teacher"], *result["students"].values())]))
