"""Commands on a cluster's jobs: submit a stage to it, and watch, stop and list what runs there."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from workflows.cli.options import Checked, Debug, errors, only_checking

app = typer.Typer()
jobs = typer.Typer(no_args_is_help=True, help="What runs on a cluster: list, status, logs, stop.")

Address = Annotated[
    str | None,
    typer.Option("--address", help="http://HEAD:8265, Ray's dashboard; by default RAY_API_SERVER_ADDRESS."),
]
Name = Annotated[str, typer.Argument(help="As submit said, or `mmdistill jobs list`; the last attempt of it.")]


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    context: typer.Context,
    stage: Annotated[str, typer.Argument(help="run, prepare, sweep, ablate or bench.")],
    words: Annotated[list[str] | None, typer.Argument(help="What the stage takes here too.", metavar="...")] = None,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show its log until it ends, and exit as it does.")
    ] = True,
    env: Annotated[
        list[str] | None, typer.Option(help="Variable that is passed on, by its name; may be repeated. No secrets.")
    ] = None,
    id_: Annotated[
        str | None, typer.Option("--id", help="Of the job; by default of the command and its configuration.")
    ] = None,
    debug: Debug = False,
) -> None:
    """A stage on a cluster, as a job that outlives this command. Submitted again it is joined, or goes on where it was.

    mmdistill submit run --recipe digits --workspace s3://team/runs --address http://head:8265
    """
    with errors(debug):
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
    """What the stage's own command is given, and its configuration, if it has one: parsed and checked by that command."""
    from rich.markup import escape

    from workflows.config.schema import ConfigError
    from workflows.errors import UserError
    from workflows.jobs.submit import STAGES, given_of

    if stage not in STAGES:
        raise ConfigError(f"submit: {stage!r} is no stage for a cluster; there are: {', '.join(STAGES)}")
    group: Any = context.find_root().command
    command = group.commands[stage]
    with command.make_context(f"submit {stage}", list(words), parent=context.parent) as own:
        given = given_of(command, own)
        try:
            with only_checking():
                command.invoke(own)
        except Checked as reached:
            return given, reached.config
        except (UserError, OSError) as error:
            screen.line(f"[yellow]![/] not checked here: {escape(str(error))}")
            return given, None
    raise AssertionError(f"{stage} did not come to its check")


@jobs.command("list")
def list_(address: Address = None, debug: Debug = False) -> None:
    """All jobs that were submitted to the cluster, oldest first."""
    with errors(debug):
        from rich.console import Console

        from workflows.jobs.client import Head
        from workflows.jobs.watch import table
        from workflows.rendering.screen import show_table

        console = Console(highlight=False, width=None if sys.stdout.isatty() else 500)
        show_table(console, table(Head(address).jobs()))


@jobs.command()
def status(name: Name, address: Address = None, debug: Debug = False) -> None:
    """A job's state in a word; exit code 0 unless it has failed or was stopped: then its own."""
    with errors(debug):
        from workflows.jobs.client import Head

        job = Head(address).newest(name)
        print(job.status.lower())
        raise typer.Exit(job.code if job.ended else 0)


@jobs.command()
def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="As it grows, until the job ends.")] = False,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """What a job has said so far."""
    with errors(debug):
        from workflows.jobs import watch
        from workflows.jobs.client import Head
        from workflows.rendering.screen import Screen

        head = Head(address)
        job = head.newest(name)
        if follow:
            raise typer.Exit(watch.follow(head, job.id, Screen()))
        print(head.log(job.id), end="")


@jobs.command()
def stop(name: Name, address: Address = None, debug: Debug = False) -> None:
    """End a job: it gets SIGTERM, and time for a checkpoint. Waits until it has ended. Submitted again, it goes on from there."""
    with errors(debug):
        from workflows.jobs import watch
        from workflows.jobs.client import Head
        from workflows.rendering.screen import Screen

        watch.stop(Head(address), name, Screen())
