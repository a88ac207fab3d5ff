"""The commands for the results of runs: lineage, promote, export, gc, deliver."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import typer
from typer import Argument, Option

from workflows.cli.options import DEFAULT_WORKSPACE, Model, Tracking, TrackingWait, Who, Workspace_, command

app = typer.Typer()


@command(app)
def lineage(
    model: str = Argument(..., help="Model: models:/NAME/VERSION, models:/NAME@ALIAS, or NAME for all versions."),
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    tracking_uri: Tracking = None,
    as_json: bool = Option(False, "--json", help="Print the lineage as JSON."),
) -> None:
    """Show where a model came from: data, teacher, students, evaluations, exports, and who moved its aliases."""
    from rich.console import Console

    from workflows.registry import lineage as stage

    found = stage.lineage(stage.open_registry(workspace, tracking_uri), model)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        Console(highlight=False, width=None if sys.stdout.isatty() else 500).print(stage.tree(found))


@command(app)
def promote(
    model: Model,
    alias: str = Option(..., help="Alias to move, such as k8-champion."),
    why: str = Option("", help="Reason, recorded with the move."),
    force: bool = Option(False, "--force", help="Move it even if the gate refuses; recorded with the move."),
    who: Who = None,
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    tracking_uri: Tracking = None,
) -> None:
    """Move an alias to a version that passes its recipe's gate; the move is recorded in the registry."""
    from workflows.registry.lineage import open_registry
    from workflows.registry.promote import run_promote

    registry = open_registry(workspace, tracking_uri)
    print(run_promote(registry, model, alias=alias, why=why, who=who, force=force))


@command(app)
def export(
    model: Model,
    destination: Path = Argument(..., help="New or empty folder."),
    form: str = Option(
        "mmdistill", "--format", help="mmdistill, or diffusers for a folder that stock diffusers samples."
    ),
    who: Who = None,
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    tracking_uri: Tracking = None,
) -> None:
    """Write a registered model to a folder, with hashes and a model card; the export is recorded in the registry."""
    from workflows.errors import ConfigError
    from workflows.registry.export import FORMATS, run_export
    from workflows.registry.lineage import open_registry

    if form not in FORMATS:
        raise ConfigError(f"--format: {form!r} is not one of {', '.join(FORMATS)}")
    print(run_export(open_registry(workspace, tracking_uri), model, destination, form=form, who=who))


@command(app)
def gc(
    yes: bool = Option(False, "--yes", "-y", help="Remove without asking."),
    keep_days: float | None = Option(
        None,
        help="Keep what changed in the last N days, and count only configurations that ran in them; default: all count.",
        min=0,
        max=1_000_000,
    ),
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    tracking_uri: Tracking = None,
) -> None:
    """Remove what a workspace no longer needs. Lists it first, and asks."""
    from workflows.rendering.screen import Screen
    from workflows.tools.gc import run_gc

    def agree(question: str) -> bool:
        if yes or not sys.stdin.isatty():
            return yes
        return typer.confirm(question)

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    run_gc(workspace, uri, Screen(), agree=agree, keep_days=keep_days)


@command(app)
def deliver(
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    tracking_uri: Tracking = None,
    wait: TrackingWait = None,
) -> None:
    """Send what runs queued while the tracking server was unreachable."""
    from workflows.rendering.screen import Screen
    from workflows.tools import deliver as stage

    if not stage.deliver(workspace, tracking_uri, Screen(), wait=wait):
        raise typer.Exit(1)
