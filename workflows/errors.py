"""Errors that are shown to the user as a line, not as a traceback."""

from __future__ import annotations

import math
import os
import re
import reprlib
from pathlib import Path
from typing import Any

COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
MOST = 300
"""Most characters of another program's error in a message."""


class ConfigError(ValueError):
    """The user's mistake, in one line: the field, the value and the choices. Exit code 2."""


class UserError(RuntimeError):
    """A message for the screen: what went wrong, and what was saved. `hint` says what to do. Exit code 1."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def training_failed(name: str, why: str) -> UserError:
    """The error of a training that failed. Its checkpoints are kept."""
    return UserError(
        f"{name}: training failed: {why}",
        hint="the last checkpoint is kept; run the same command again to continue from it, or --debug to see all",
    )


def home() -> Path:
    """The user's home. Raises UserError without one, as for a container's user without HOME: MLflow and Ray need it."""
    try:
        return Path.home()
    except RuntimeError:
        raise UserError(
            "HOME is not set, and this user has no home by name", hint="set HOME to a folder of yours"
        ) from None


def expanded(path: str | Path) -> Path:
    """A local path with ~ expanded. Raises ConfigError if there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: there is no such home: write the path out, or set HOME") from None


def seconds_of(name: str, usual: float, *, least: float = 0) -> float:
    """An environment variable that holds a number of seconds; `usual` if it is unset or empty. Raises ConfigError."""
    text = os.environ.get(name) or str(usual)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not least <= seconds < math.inf:
        of = f" of at least {least:g}" if least else ""
        raise ConfigError(f"{name}: {text!r} is not a number of seconds{of}")
    return seconds


FOREIGN = {
    "OutOfMemoryError": (
        "a process was ended, as its machine ran out of memory",
        "use fewer --workers, or a smaller micro_batch",
    ),
    "AuthenticationError": (
        "the cluster refuses the token",
        "set RAY_AUTH_TOKEN_PATH to a file with the one it was started with",
    ),
    "OutOfDiskError": ("the disk for Ray's objects is full", "free space, or set RAY_TMPDIR"),
    "RuntimeEnvSetupError": ("a process could not be given its environment", "Ray's logs on that machine say why"),
    "GetTimeoutError": ("the cluster did not answer in time", "run the same command again: it continues where it was"),
    "RayError": (
        "a process or a machine of the cluster was lost",
        "run the same command again: it continues where it was",
    ),
    "MlflowException": (
        "the tracking store refuses",
        "finished stages and the last checkpoints are kept; run it again when that is fixed",
    ),
}
"""Errors of Ray and MLflow, the narrowest class first: what each means, and what to do. None is a bug of this program."""


def foreign(error: BaseException) -> UserError | None:
    """An error of Ray or MLflow in one line. None for other errors, and for an error that Ray only passes on from a task."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__.split(".")[0] in ("ray", "mlflow")]
    if "RayTaskError" in kinds:
        return None
    reason = in_a_line(str(error)) or type(error).__name__
    for kind, (meaning, hint) in FOREIGN.items():
        if kind in kinds:
            return UserError(f"{meaning} ({reason})", hint=hint)
    if isinstance(error, (ConnectionError, TimeoutError)):  # Ray raises these too
        return UserError(f"a connection was lost ({reason})", hint=FOREIGN["RayError"][1])
    return None


def in_a_line(text: str, most: int = MOST) -> str:
    """Another program's text as one line without colours. A long text is cut after a sentence, or after a word if not even the
    first sentence fits.
    """
    line = " ".join(COLOURS.sub("", text).split())
    if len(line) <= most:
        return line
    ends = [found.start() for found in re.finditer(r"(?<=[.!?])\s+(?=[A-Z(])", line)]
    whole = max((end for end in ends if end <= most), default=0)
    return line[:whole] if whole else line[: most - 3].rsplit(" ", 1)[0].rstrip(" ,;:(") + "..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 40


def brief(value: Any) -> str:
    """A value in one line, for a message. A long value is shortened."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except ValueError:  # Python does not print integers of more than 4,300 digits
        return "a number of thousands of digits"


def chain_of(error: BaseException) -> list[BaseException]:
    """The error, its cause, the cause of that, and so on."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain
