"""Checks that a command's --out can be written, before anything is computed."""

from __future__ import annotations

import errno
from pathlib import Path

from workflows.errors import ConfigError, UserError, brief
from workflows.storage.uri import check_here


def check_out(out: Path, as_given: str, *, folder: bool = False) -> None:
    """Checks that the file or the folder can be written. Creates missing folders, and nothing else. `as_given`: the path as typed.

    Raises ConfigError for a path that can't be one, or a folder that is not empty; UserError for a lack of permission or space.
    """
    check_here("--out", as_given)
    file = out / ".probe" if folder else out
    try:
        if folder and out.is_dir() and any(out.iterdir()):
            raise ConfigError(f"--out: {brief(as_given)} has files in it; name a new folder, or an empty one")
        new = not file.exists()
        if not (new or file.is_file() or file.is_dir()):
            raise ConfigError(f"--out: {brief(as_given)} is neither a file nor a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab"):
            pass
        if new:
            file.unlink()
    except OSError as error:
        why = "its folder is a file" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        reason = f"--out: {brief(as_given)} can't be written: {why}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise UserError(reason) from error
        raise ConfigError(reason) from error
