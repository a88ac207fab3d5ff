"""Options that commands share, and how their errors are shown."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from workflows.config.schema import RunConfig


def finite(value: float | None) -> float | None:
    """For an option that is a number: neither nan, which is in no range and fails no comparison, nor infinite."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


Workspace_ = Annotated[
    str,
    typer.Option(
        "--workspace", envvar="MMDISTILL_HOME", help="Folder or s3://BUCKET/PREFIX for models, checkpoints and reports."
    ),
]
Tracking = Annotated[
    str | None,
    typer.Option("--tracking-uri", help="MLflow server or store; by default SQLite in the workspace."),
]
TrackingWait = Annotated[
    float | None,
    typer.Option(
        "--tracking-wait",
        help="Seconds to wait at the end for a tracking server that is away; by default 120.",
        min=0,
        callback=finite,
    ),
]
Recipe = Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name, or a YAML file.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", help="section.field=value; may be repeated.")]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="Made so small that all of it runs in seconds: three training steps a stage.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Model = Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@ALIAS.")]
Who = Annotated[str | None, typer.Option(envvar="MMDISTILL_USER", help="Who does it; by default the user's name.")]
DEFAULT_WORKSPACE = ".mmdistill"


_only_checking: ContextVar[bool] = ContextVar("only_checking", default=False)


class Checked(Exception):
    """A command that is only checked came to where its work would begin. `config`: its configuration, if it has one."""

    def __init__(self, config: RunConfig | None) -> None:
        super().__init__()
        self.config = config


@contextmanager
def only_checking() -> Iterator[None]:
    """Commands called inside end with Checked, with a wrong option as they would have shown it, or with the error of what is not
    on this machine.
    """
    before = _only_checking.set(True)
    try:
        yield
    finally:
        _only_checking.reset(before)


def checked(config: RunConfig | None = None) -> None:
    """Stands in a command where all is checked that can be before anything starts. `mmdistill submit` calls it up to here, so
    that a mistake is told before a cluster is asked for anything.
    """
    if _only_checking.get():
        raise Checked(config)


@contextmanager
def errors(debug: bool, continues: bool = False) -> Iterator[None]:
    """The user's mistakes and the world's failures as a line each: exit 2 for a wrong option, 1 for the rest, 130 for Ctrl-C,
    143 for SIGTERM, 129 for SIGHUP.
    """
    from workflows.cluster.stopping import listening
    from workflows.errors import ConfigError, UserError, foreign
    from workflows.storage.workspace import explain_os_error

    try:
        with listening() if continues else nullcontext():
            yield
    except KeyboardInterrupt as stopped:
        say(
            "interrupted: finished stages and the last checkpoints are kept"
            + ("; run the same command again to go on from there" if continues else "")
        )
        raise typer.Exit(128 + getattr(stopped, "number", signal.SIGINT)) from None
    except Exception as error:
        if debug or (_only_checking.get() and not isinstance(error, ConfigError)):
            raise
        shown = foreign(error)
        error = getattr(error, "cause", None) or error  # of a Ray task: its error without the frames
        if isinstance(error, (ConfigError, UserError)):
            shown = error  # type: ignore[assignment]
        elif isinstance(error, OSError):
            shown = explain_os_error(error) or shown
        if shown is None:
            raise
        say(f"error: {shown}")
        if hint := getattr(shown, "hint", ""):
            say(f"       {hint}")
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


def say(text: str) -> None:
    """A line on stderr; what would break it, or colour it, is written out."""
    print("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), file=sys.stderr)
