"""The workspace: one folder for everything a run leaves, stages kept by key, one run at a time.

.mmdistill/
    stages/<stage>-<key>/   result.json (last: the stage is done), config.yaml, metrics.jsonl, runs.json, its outputs
    reports/<recipe>/       report.html, summary.json
    ray/                    checkpoints of trainings
    mlflow.db, mlartifacts/ the default tracking store
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from workflows.runtime.errors import UserError

RESULT = "result.json"
MINIMUM_FREE = 200 * 1024**2


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


@dataclass(frozen=True)
class StageFolder:
    """A stage's outputs, and whether they are whole."""

    name: str
    key: str
    path: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """What the stage returned, or None while it is not done."""
        try:
            value = json.loads((self.path / RESULT).read_text())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def finish(self, result: dict[str, Any]) -> None:
        write_json(self.path / RESULT, result)


class Workspace:
    """Raises UserError if the folder can't be made or written, or the disk is full."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().resolve()
        try:
            for folder in ("stages", "reports", "ray"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            probe = self.root / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"workspace: {self.root} cannot be written: {error.strerror}",
                hint="give another folder with --workspace or MMDISTILL_HOME",
            ) from error
        free = shutil.disk_usage(self.root).free
        if free < MINIMUM_FREE:
            raise UserError(
                f"workspace: only {free // 1024**2} MB are free on the disk of {self.root}, "
                f"{MINIMUM_FREE // 1024**2} MB are needed",
                hint="free some space, or give another folder with --workspace",
            )

    def stage(self, name: str, key: str) -> StageFolder:
        path = self.root / "stages" / f"{name}-{key}"
        path.mkdir(parents=True, exist_ok=True)
        return StageFolder(name, key, path)

    def discard(self, folder: StageFolder) -> None:
        """Forgets a stage, its checkpoints included."""
        shutil.rmtree(folder.path, ignore_errors=True)
        shutil.rmtree(self.training_storage / f"{folder.name}-{folder.key}", ignore_errors=True)
        folder.path.mkdir(parents=True)

    @property
    def training_storage(self) -> Path:
        return self.root / "ray"

    def report(self, recipe: str) -> Path:
        path = self.root / "reports" / recipe
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def default_tracking_uri(self) -> str:
        return f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def default_artifacts(self) -> Path:
        return self.root / "mlartifacts"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One run at a time; the kernel frees the lock when its holder dies, however it dies."""
        with (self.root / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise UserError(
                    f"workspace: {self.root} is in use by another run (process {holder})",
                    hint="wait for it to end, or use another --workspace",
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield


def explain_os_error(error: OSError, workspace: Path) -> UserError | None:
    """What a full disk or a folder that can't be written means here; None for other errors."""
    saved = f"finished stages and the last checkpoints in {workspace} are kept"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk is full ({error.filename or workspace}); {saved}", hint="free space, run it again")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"{error.filename or workspace} cannot be written; {saved}", hint="mend that, run it again")
    return None


@cache
def code_version(*parts: str) -> str:
    """A hash of the source files below the named packages or files: the part of a stage's key that is code."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for part in parts:
        path = root / part
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def git_commit() -> str:
    """The commit of this source tree, with "+" if it has changes; "unknown" outside a checkout."""
    import subprocess

    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        out = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
        return out.stdout.strip() if out.returncode == 0 else ""

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if git("rev-parse", "--show-toplevel") == str(root) and (commit := git("rev-parse", "HEAD")):
            return commit + ("+" if git("status", "--porcelain") else "")
    return "unknown"
