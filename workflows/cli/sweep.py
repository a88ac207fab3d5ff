"""The commands that train many students of one teacher: sweep and ablate."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from workflows.cli.options import (
    DEFAULT_WORKSPACE,
    Recipe,
    Set,
    Tracking,
    TrackingWait,
    Workspace_,
    checked,
    command,
    finite,
    say,
)

app = typer.Typer()


@command(app, continues=True)
def sweep(
    recipe: Recipe = "digits",
    set_: Set = None,
    space: Annotated[
        list[str] | None,
        Option(
            help="Values to try: a space's name, a YAML file, or a field of distill: pairing=uniform,grid, "
            "optimiser.lr=loguniform(1e-4,1e-2), seed=0,1. May be repeated."
        ),
    ] = None,
    k: Annotated[
        list[int] | None,
        Option("-k", help="Steps of the students; may be repeated. Default: the space's, or the recipe's.", min=1),
    ] = None,
    trials: Annotated[
        int, Option(help="Trials in all, shared evenly by the ks; a grid tries everything.", min=1, max=100_000)
    ] = 16,
    search: Annotated[
        str | None, Option(help="Search: grid, random or tpe; default: grid, or random if a field is not a list.")
    ] = None,
    scheduler: Annotated[
        str, Option(help="Scheduler: none, or asha, which stops trials whose distance lags.")
    ] = "none",
    warm_start: Annotated[bool, Option(help="Start students of k steps from the best of 2k steps.")] = False,
    register: Annotated[
        bool, Option("--register/--no-register", help="Register the best student of each k, through the recipe's gate.")
    ] = True,
    at_once: Annotated[int | None, Option(help="Trials at once; default: as many as fit.", min=1)] = None,
    cpus: Annotated[float, Option("--cpus-per-trial", help="CPUs of each trial.", min=0.01, callback=finite)] = 1,
    gpus: Annotated[
        float, Option("--gpus-per-trial", help="GPUs of each trial: 0.25 puts four on one.", min=0, callback=finite)
    ] = 0,
    hours: Annotated[
        float | None,
        Option(
            help="Hours after which the sweep stops; unfinished trials wait for the next one.", min=0, callback=finite
        ),
    ] = None,
    out: Annotated[Path | None, Option(help="File for the rows and their means, as JSON.")] = None,
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    tracking_uri: Tracking = None,
    tracking_wait: TrackingWait = None,
) -> None:
    """Distil one teacher many ways (Ray Tune), and measure each student as a run does. Run again, it continues where it stopped."""
    from workflows.config.loading import load_config
    from workflows.rendering.screen import Screen
    from workflows.session.options import RunOptions
    from workflows.storage.outputs import check_out
    from workflows.storage.uri import shown
    from workflows.sweep.options import SweepOptions
    from workflows.sweep.run import run_sweep
    from workflows.sweep.space import read_space

    config = load_config(recipe, set_)
    fields = read_space([*(space or []), *([f"k={','.join(map(str, k))}"] if k else [])], config)
    options = RunOptions(workspace=workspace, tracking_uri=tracking_uri, tracking_wait=tracking_wait, at_once=at_once)
    how = SweepOptions(search, scheduler, trials, warm_start, register, hours, cpus, gpus)
    checked(config)
    if out:
        check_out(out, str(out))
    try:
        run_sweep(config, options, Screen(), space=fields, how=how, out=out)
    except KeyboardInterrupt:
        say(f"to go on: mmdistill {shown(shlex.join(sys.argv[1:]))}")
        raise


@command(app, continues=True)
def ablate(
    recipe: Annotated[list[str] | None, Argument(help="Recipes: gmm, digits, or both (default).")] = None,
    page: Annotated[
        Path,
        Option(help="Page whose tables are rewritten. The rows are kept beside it, except those of another teacher."),
    ] = Path("ablation.md"),
    only: Annotated[list[str] | None, Option(help="Setting to run; may be repeated. Default: all.")] = None,
    k: Annotated[list[int] | None, Option("-k", help="Steps; may be repeated. Default: 1, 2, 4, 8.")] = None,
    seeds: Annotated[int, Option(help="Trainings of each setting.", min=1)] = 3,
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    tracking_uri: Tracking = None,
) -> None:
    """Change one choice at a time from the same base, to see which of the paper's findings hold here, with mean and spread."""
    from workflows.rendering.screen import Screen
    from workflows.session.options import RunOptions
    from workflows.tools.checkout import benchmark

    options = RunOptions(workspace=workspace, tracking_uri=tracking_uri)
    checked()
    run = benchmark("ablation").run_ablation
    run(recipe or [], options, Screen(), page=page, only=only or [], ks=k or [1, 2, 4, 8], seeds=seeds)
