"""The commands for jobs on a cluster: submit, and jobs list, status, logs and stop."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer import Argument, Option

from workflows.cli.options import Checked, command, only_checking

app = typer.Typer()
jobs = typer.Typer(no_args_is_help=True, help="Jobs on a cluster: list, status, logs, stop.")

Address = Annotated[
    str | None, Option("--address", help="URL of Ray's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS.")
]
Name = Annotated[str, Argument(help="Job id, from submit or `mmdistill jobs list`; means its last attempt.")]


@command(app, context_settings={"ignore_unknown_options": True})
def submit(
    context: typer.Context,
    stage: str = Argument(..., help="Command to run: run, prepare, sweep, ablate or bench."),
    words: list[str] | None = Argument(None, help="Options of that command.", metavar="..."),
    address: Address = None,
    follow: bool = Option(
        True, "--follow/--no-follow", help="Show the log until the job ends, and exit with its exit code."
    ),
    env: list[str] | None = Option(None, help="Name of a variable to pass on; may be repeated. No secrets."),
    id_: str | None = Option(None, "--id", help="Job id; default: made from the command and its configuration."),
) -> None:
    """Run a stage on a cluster, as a job that outlives this command. Submitted again, it is joined or continues where it stopped.

    mmdistill submit run --recipe digits --workspace s3://team/runs --address http://head:8265
    """
    from workflows.jobs import submit as stages
    from workflows.jobs import watch
    from workflows.jobs.client import Head
    from workflows.rendering.screen import Screen

    screen = Screen()
    given, config = _checked(context, stage, words or [], screen)
    job = stages.compose(stage, given, config, env=env or [], name=id_)
    with screen.status("asking the head"):
        head = Head(address)
        name = stages.submit(head, job, screen)
    if not follow:
        print(name)
        print(watch.commands(head, name), file=sys.stderr)
        return
    raise typer.Exit(watch.follow(head, name, screen))


def _checked(context: typer.Context, stage: str, words: list[str], screen: Any) -> tuple[list[Any], Any]:
    """The parameters of the stage's command, and its configuration if it has one, parsed and checked by that command."""
    from rich.markup import escape

    from workflows.errors import ConfigError, UserError
    from workflows.jobs.submit import STAGES, given_parameters

    if stage not in STAGES:
        raise ConfigError(f"submit: {stage!r} is not a stage for a cluster; there are: {', '.join(STAGES)}")
    group: Any = context.find_root().command
    target = group.commands[stage]
    with target.make_context(f"submit {stage}", list(words), parent=context.parent) as target_context:
        given = given_parameters(target, target_context)
        try:
            with only_checking():
                target.invoke(target_context)
        except Checked as reached:
            return given, reached.config
        except (UserError, OSError) as error:
            screen.line(f"[yellow]![/] not checked here: {escape(str(error))}")
            return given, None
    raise AssertionError(f"{stage} did not reach its check")


@command(jobs, "list")
def list_(address: Address = None) -> None:
    """List all jobs that were submitted to the cluster, oldest first."""
    from rich.console import Console

    from workflows.jobs.client import Head
    from workflows.jobs.watch import table
    from workflows.rendering.screen import show_table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 500)
    show_table(console, table(Head(address).jobs()))


@command(jobs)
def status(name: Name, address: Address = None) -> None:
    """Print the state of a job in a word. Exits with 0, or with the job's exit code if it failed or was stopped."""
    from workflows.jobs.client import Head

    job = Head(address).newest(name)
    print(job.status.lower())
    raise typer.Exit(job.code if job.ended else 0)


@command(jobs)
def logs(
    name: Name,
    follow: bool = Option(False, "--follow/--no-follow", help="Follow the log until the job ends."),
    address: Address = None,
) -> None:
    """Print the log of a job."""
    from workflows.jobs import watch
    from workflows.jobs.client import Head
    from workflows.rendering.screen import Screen

    head = Head(address)
    job = head.newest(name)
    if follow:
        raise typer.Exit(watch.follow(head, job.id, Screen()))
    print(head.log(job.id), end="")


@command(jobs)
def stop(name: Name, address: Address = None) -> None:
    """Stop a job with SIGTERM and time for a checkpoint, and wait until it has ended. Submitted again, it continues from there."""
    from workflows.jobs import watch
    from workflows.jobs.client import Head
    from workflows.rendering.screen import Screen

    watch.stop(Head(address), name, Screen())
