"""Whether files are as they were when their stage was finished: its result holds the size and the hash of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from workflows.errors import UserError

AT_ONCE = 2**20


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(AT_ONCE):
            content.update(part)
    return content.hexdigest()


def files_of(folder: Path, *, skip: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """All files below a folder by their path from there, hidden ones aside: {"bytes", "sha256"}."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    seen = [name for name in names if not any(part.startswith(".") for part in Path(name).parts) and not skip(name)]
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in seen}


def damage(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """Of the first file that is not as `files_of` found it, its path and what is wrong with it. Sizes are looked at first."""
    for name, was in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{folder / name} is gone"
        if size != was["bytes"]:
            return f"{folder / name} has {size:,} bytes, and had {was['bytes']:,} when it was made"
    for name, was in files.items():
        if sha256_of(folder / name) != was["sha256"]:
            return f"{folder / name} has another content than when it was made"
    return None


def check_model(folder: Path) -> Path:
    """The model folder, if it is as its stage made it, or no stage's. Raises UserError."""
    whole = folder.resolve()
    with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):  # a result of another format
        files = json.loads((whole.parent / "result.json").read_text()).get("files", {})
        own = {name: was for name, was in files.items() if name.startswith(f"{whole.name}/")}
        if why := damage(whole.parent, own):
            stage = whole.parent.name.rpartition("-")[0]
            raise UserError(f"{stage}: {why}", hint=f"put it back, or make it anew: --force {stage}")
    return folder
