"""Errors that are shown to the user as a line, not as a traceback."""

from __future__ import annotations


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
