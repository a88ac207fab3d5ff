"""The commands that train many students of one teacher: sweep and ablate."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

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
    space: list[str] | None = Option(
        None,
        help="Values to try: a space's name, a YAML file, or a field of distill: w_s=flat,sigmoid, "
        "optimiser.lr=loguniform(1e-4,1e-2), seed=0,1. May be repeated.",
    ),
    k: list[int] | None = Option(
        None, "-k", help="Steps of the students; may be repeated. Default: the space's, or the recipe's.", min=1
    ),
    trials: int = Option(
        16, help="Trials in all, shared evenly by the ks; a grid tries everything.", min=1, max=100_000
    ),
    search: str | None = Option(
        None, help="Search: grid, random or tpe; default: grid, or random if a field is not a list."
    ),
    scheduler: str = Option("none", help="Scheduler: none, or asha, which stops trials whose distance lags."),
    warm_start: bool = Option(False, help="Start students of k steps from the best of 2k steps."),
    register: bool = Option(
        True, "--register/--no-register", help="Register the best student of each k, through the recipe's gate."
    ),
    at_once: int | None = Option(None, help="Trials at once; default: as many as fit.", min=1),
    cpus: float = Option(1, "--cpus-per-trial", help="CPUs of each trial.", min=0.01, callback=finite),
    gpus: float = Option(
        0, "--gpus-per-trial", help="GPUs of each trial: 0.25 puts four on one.", min=0, callback=finite
    ),
    hours: float | None = Option(
        None,
        help="Hours after which the sweep stops; unfinished trials wait for the next one.",
        min=0.001,
        callback=finite,
    ),
    out: Path | None = Option(None, help="File for the rows and their means, as JSON."),
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
        say(f"to continue: mmdistill {shown(shlex.join(sys.argv[1:]))}")
        raise


@command(app, continues=True)
def ablate(
    recipe: list[str] | None = Argument(None, help="Recipes: gmm, digits, or both (default)."),
    page: Path = Option(
        Path("ablation.md"),
        help="Page whose tables are rewritten. The rows are kept beside it, except those of another teacher.",
    ),
    only: list[str] | None = Option(None, help="Setting to run; may be repeated. Default: all."),
    k: list[int] | None = Option(None, "-k", help="Steps; may be repeated. Default: 1, 2, 4, 8."),
    seeds: int = Option(3, help="Trainings of each setting.", min=1),
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
