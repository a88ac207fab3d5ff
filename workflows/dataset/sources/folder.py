"""A local folder of images as a source. Subfolders are the classes. The stage `prepare` turns it into a data set."""

from __future__ import annotations

from pathlib import Path

from workflows.errors import UserError, expanded


def checked(path: str | None) -> Path:
    """Returns the folder as a Path. Raises UserError if it is not given or is not a folder."""
    if path is None:
        hint = "--set data.path=FOLDER, with one subfolder per class; or --smoke, to try the recipe on synthetic images"
        raise UserError("data.path: this recipe needs a folder of images", hint=hint)
    root = expanded(path)
    if not root.is_dir():
        raise UserError(f"data.path: {path} is not a folder")
    return root
