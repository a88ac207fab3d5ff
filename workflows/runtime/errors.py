"""Errors that are shown to the user as a line, not as a traceback."""

from __future__ import annotations

import re
from pathlib import Path

COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
MOST = 300
"""Characters of another program's reason, in a line of ours."""


class ConfigError(ValueError):
    """The user's mistake, in one line: the field, the value and the choices. Exit code 2."""


class UserError(RuntimeError):
    """What went wrong, what was saved, and what to do: for the screen. Exit code 1."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def training_failed(name: str, why: str) -> UserError:
    """Of a training, whose checkpoints stay."""
    return UserError(
        f"{name}: training failed: {why}",
        hint="the last checkpoint is kept; run the same command again to go on from it, or --debug to see all",
    )


def home() -> Path:
    """The user's. Raises UserError where there is none by HOME or by name, as of a container's user: MLflow and Ray want one."""
    try:
        return Path.home()
    except RuntimeError:
        raise UserError(
            "HOME is not set, and this user has no home by name", hint="set HOME to a folder of yours"
        ) from None


def in_a_line(text: str, most: int = MOST) -> str:
    """A text of another program's as a line without colours: as many whole sentences of it as fit, or, of a first one that is
    longer, as many words.
    """
    line = " ".join(COLOURS.sub("", text).split())
    if len(line) <= most:
        return line
    ends = [found.start() for found in re.finditer(r"(?<=[.!?])\s+(?=[A-Z(])", line)]
    whole = max((end for end in ends if end <= most), default=0)
    return line[:whole] if whole else line[: most - 3].rsplit(" ", 1)[0].rstrip(" ,;:(") + "..."
