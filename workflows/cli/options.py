"""Options that several commands share, and the display of errors."""

from __future__ import annotations

import functools
import inspect
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

if TYPE_CHECKING:
    from workflows.config.schema import RunConfig


def finite(value: float | None) -> float | None:
    """A callback for numeric options: raises BadParameter for nan, which passes range checks, and for infinity."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


Workspace_ = Annotated[
    str,
    Option(
        "--workspace", envvar="MMDISTILL_HOME", help="Folder or s3://BUCKET/PREFIX for models, checkpoints and reports."
    ),
]
Tracking = Annotated[
    str | None,
    Option("--tracking-uri", help="MLflow server or store; default: MLFLOW_TRACKING_URI, or SQLite in the workspace."),
]
TrackingWait = Annotated[
    float | None,
    Option(
        "--tracking-wait",
        help="Seconds to wait at the end for an unreachable tracking server; default: 120.",
        min=0,
        callback=finite,
    ),
]
Recipe = Annotated[str, Option("--recipe", "-r", help="Name of a recipe, or a YAML file.")]
Set = Annotated[list[str] | None, Option("--set", "-s", help="Setting, as section.field=value; may be repeated.")]
Smoke = Annotated[bool, Option("--smoke", help="Shrink everything to run in seconds: three training steps a stage.")]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
Model = Annotated[str, Argument(help="Model: models:/NAME/VERSION or models:/NAME@ALIAS.")]
Who = Annotated[str | None, Option(envvar="MMDISTILL_USER", help="Name to record; default: the login name.")]
DEFAULT_WORKSPACE = ".mmdistill"


_only_checking: ContextVar[bool] = ContextVar("only_checking", default=False)


class Checked(Exception):
    """Raised by `checked` inside `only_checking`: the command's options are valid. `config`: its configuration, if it has one."""

    def __init__(self, config: RunConfig | None) -> None:
        super().__init__()
        self.config = config


@contextmanager
def only_checking() -> Iterator[None]:
    """Within the block, commands stop before their work begins.

    They raise Checked if their options are valid, show option errors as usual, and raise the errors of files that are not on this
    machine.
    """
    before = _only_checking.set(True)
    try:
        yield
    finally:
        _only_checking.reset(before)


def checked(config: RunConfig | None = None) -> None:
    """Commands call this once their options are checked and before their work begins.

    Raises Checked inside `only_checking`. So `mmdistill submit` can report mistakes before it contacts a cluster.
    """
    if _only_checking.get():
        raise Checked(config)


@contextmanager
def errors(debug: bool, continues: bool = False) -> Iterator[None]:
    """Shows expected errors as one line instead of a traceback, and exits.

    The exit code is 2 for a wrong option, 1 for other errors, 130 for Ctrl-C, 143 for SIGTERM and 129 for SIGHUP.

    debug      show tracebacks
    continues  the command can be resumed: signals end it after a checkpoint, and the message says how to resume
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
            + ("; run the same command again to continue from there" if continues else "")
        )
        raise typer.Exit(128 + getattr(stopped, "number", signal.SIGINT)) from None
    except Exception as error:
        if debug or (_only_checking.get() and not isinstance(error, ConfigError)):
            raise
        shown = foreign(error)
        error = getattr(error, "cause", None) or error  # the error of a Ray task, without its frames
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


def command(
    app: typer.Typer, name: str | None = None, *, continues: bool = False, **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As `app.command`, with the option --debug, and with errors shown by `errors`."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(debug: bool, **values: Any) -> None:
            with errors(debug, continues):
                function(**values)

        signature = inspect.signature(function, eval_str=True)
        debug = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
        run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), debug])  # type: ignore[attr-defined]
        app.command(name, **settings)(run)
        return function

    return add


def say(text: str) -> None:
    """Prints a line on stderr. Control characters, such as line breaks and colour codes, are escaped."""
    print("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), file=sys.stderr)
