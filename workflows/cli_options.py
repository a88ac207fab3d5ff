"""Options that commands share, and how their errors are shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

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
        "--tracking-wait", help="Seconds to wait at the end for a tracking server that is away; by default 120.", min=0
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


@contextmanager
def errors(debug: bool, continues: bool = False) -> Iterator[None]:
    """The user's mistakes and the world's failures as a line each: exit 2 for a wrong option, 1 for the rest, 130 for Ctrl-C."""
    from workflows.config import ConfigError
    from workflows.runtime.errors import UserError
    from workflows.runtime.workspace import explain_os_error

    try:
        yield
    except KeyboardInterrupt:
        say(
            "interrupted: finished stages and the last checkpoints are kept"
            + ("; run the same command again to go on from there" if continues else "")
        )
        raise typer.Exit(130) from None
    except (ConfigError, UserError, OSError) as error:
        if debug:
            raise
        error = getattr(error, "cause", None) or error  # of a Ray task: its error without the frames
        shown = explain_os_error(error, Path(DEFAULT_WORKSPACE)) if isinstance(error, OSError) else error
        if shown is None:
            raise
        say(f"error: {shown}")
        if hint := getattr(shown, "hint", ""):
            say(f"       {hint}")
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


def say(text: str) -> None:
    print(text, file=sys.stderr)
