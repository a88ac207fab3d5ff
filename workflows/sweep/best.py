"""The outcome of a sweep: the best student of each k, as a recipe and in the registry, through the gates of `register`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from workflows.config.schema import RunConfig
from workflows.session.context import Context, Done
from workflows.sweep.ledger import Ledger
from workflows.sweep.space import with_points


@dataclass(frozen=True)
class Registered:
    """The stages that measured and registered the best students."""

    measured: Done
    registered: Done


def best_config(ledger: Ledger) -> RunConfig:
    """The recipe with the settings of the best trial of each k."""
    return with_points(ledger.context.config, {k: row["point"] for k, row in ledger.best().items()})


def register_best(ledger: Ledger, prepared: Done, trained: Done) -> Registered:
    """Evaluates the best trial of each k beside the teacher, registers it, and promotes it if it passes the gate."""
    from workflows.stages.evaluate import evaluate
    from workflows.stages.register import register

    context: Context = replace(ledger.context, config=best_config(ledger))
    students = {k: ledger.done[row["name"]] for k, row in ledger.best().items()}
    measured = evaluate(context, prepared, trained, students)
    return Registered(measured, register(context, prepared, trained, students, measured))


def best_recipe(ledger: Ledger) -> str:
    """YAML for `mmdistill run -r`: the recipe with the best settings. A seed is not a setting, so it is stated in a comment."""
    if not ledger.best():
        return "# No trial finished.\n"
    seeds = [f"k = {k}: seed {row['point']['seed']}" for k, row in ledger.best().items() if row["point"].get("seed")]
    comment = "# The best settings that a sweep has found for each k, by measured distance.\n"
    comment += f"# Its trials had other seeds than a run has: {', '.join(seeds)}.\n" if seeds else ""
    return comment + best_config(ledger).yaml()
