"""Checks that files are as their stage left them. A stage's result holds the size and the hash of each file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmdistill_core.files import read_in_parts, sha256_of
from workflows.errors import UserError


def files_of(folder: Path, *, skip: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """All files below a folder, without hidden ones: {relative path: {"bytes", "sha256"}}."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    seen = [name for name in names if not any(part.startswith(".") for part in Path(name).parts) and not skip(name)]
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in seen}


def damage(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """The first file that differs from what `files_of` found, and how; None if all are intact. Sizes are checked first."""
    for name, recorded in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{folder / name} is gone"
        if size != recorded["bytes"]:
            return f"{folder / name} has {size:,} bytes, and had {recorded['bytes']:,} when it was made"
    for name, recorded in files.items():
        if sha256_of(folder / name) != recorded["sha256"]:
            return f"{folder / name} has other content than when it was made"
    return None


def check_model(folder: Path) -> Path:
    """Returns the model folder. Raises UserError if it is not as its stage made it. A folder of no stage passes unchecked."""
    whole = folder.resolve()
    with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):  # a result of another format
        files = json.loads((whole.parent / "result.json").read_text()).get("files", {})
        own = {name: recorded for name, recorded in files.items() if name.startswith(f"{whole.name}/")}
        if why := damage(whole.parent, own):
            stage = whole.parent.name.rpartition("-")[0]
            raise UserError(f"{stage}: {why}", hint=f"restore it, or make it again with --force {stage}")
    return folder


def identity_of(*paths: Path) -> str:
    """A hash of the files' names and contents."""
    content = hashlib.sha256()
    for path in paths:
        content.update(path.name.encode() + b"\0")
        for part in read_in_parts(path):
            content.update(part)
    return content.hexdigest()[:16]


def model_identity(folder: Path) -> str:
    """A hash of a model folder."""
    return identity_of(folder / "weights.safetensors", folder / "model.json")
