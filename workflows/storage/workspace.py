"""The workspace: one folder for everything a run leaves, here or in an object store; stages kept by key, one run at a time.

.mmdistill/
    stages/<stage>-<key>/   result.json (last: the stage is done), config.yaml, metrics.jsonl, runs.json, its outputs
    pipelines/<name>.json   a configuration that was run: its tracking run, and the stages that it refers to
    reports/<recipe>/       report.html, summary.json
    ray/                    checkpoints of trainings
    mlflow.db, mlartifacts/ the default tracking store
    outbox/<store>/         what is logged, until a tracking store has it

Of one in an object store a working copy is kept on this machine. A stage is there once its result.json is, which is written last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from workflows.errors import ConfigError, UserError
from workflows.storage import store as storage
from workflows.storage.lease import Lease
from workflows.storage.uri import absolute, check_name, is_remote, join, shown

RESULT = "result.json"
RUNS = "runs.json"
"""The ids of a stage's tracking runs, by store."""
WORLDS = (errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EMFILE, errno.ENFILE)
"""Errors of files that are never a fault of this program's."""
MINIMUM_FREE = 200 * 1024**2


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() or file.is_symlink())


def changed(path: Path) -> float:
    """When the file, or the newest file or folder below a folder, was written (seconds since 1970)."""
    return max(p.lstat().st_mtime for p in (path, *(path.rglob("*") if path.is_dir() else ())))


@dataclass(frozen=True)
class StageFolder:
    """A stage's outputs, and whether they are whole. `path` is here; `uri` is where others find them: the same, or in the store."""

    name: str
    key: str
    path: Path
    uri: str
    there: set[str] = field(default_factory=set)

    @property
    def result(self) -> dict[str, Any] | None:
        """What the stage returned, or None while it is not done."""
        try:
            value = json.loads((self.path / RESULT).read_text())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def at(self, name: str) -> str:
        """Where others find this file or folder of the stage."""
        return join(self.uri, name)

    def keep(self, name: str) -> None:
        """A file that a run on another machine would want, before the stage is done."""
        if is_remote(self.uri):
            storage.upload(self.path / name, self.at(name))

    def _begun_here(self) -> bool:
        """Whether the store says of this unfinished stage what was begun here."""
        try:
            return (self.path / RUNS).read_bytes() == storage.read(self.at(RUNS))
        except FileNotFoundError:
            return False

    def collect(self, name: str) -> None:
        """What a worker wrote to `at(name)`, here."""
        if is_remote(self.uri):
            storage.pull(self.at(name), self.path / name)
            self.there.add(name)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the stage; empty where there is none."""
        with contextlib.suppress(OSError, ValueError):
            value = json.loads((self.path / name).read_text())
            return value if isinstance(value, dict) else {}
        return {}

    def finish(self, result: dict[str, Any]) -> None:
        write_json(self.path / RESULT, result)
        if is_remote(self.uri):
            collected = tuple(f"{name}/" for name in self.there)
            storage.publish(self.path, self.uri, skip=lambda name: name.startswith(collected), last=RESULT)

    def refresh(self) -> None:
        """The working copy as the store has it."""
        if not is_remote(self.uri):
            return
        try:
            stored = storage.read(self.at(RESULT))
        except FileNotFoundError:
            (self.path / RESULT).unlink(missing_ok=True)
            if not self._begun_here():  # or another machine began it anew since
                shutil.rmtree(self.path)
                self.path.mkdir()
                storage.pull(self.uri, self.path, skip=_heavy)
            return
        if not (self.path / RESULT).is_file() or (self.path / RESULT).read_bytes() != stored:
            self.fetch_again()

    def fetch_again(self) -> None:
        """The working copy of a finished stage, from the store; the result comes last."""
        stored = storage.read(self.at(RESULT))
        shutil.rmtree(self.path)
        self.path.mkdir()
        storage.pull(self.uri, self.path, skip=lambda name: _heavy(name) or name == RESULT)
        (self.path / RESULT).write_bytes(stored)


def _heavy(name: str) -> bool:
    """Shards are read where they are."""
    return name.startswith("data/shards/")


def _record(name: str) -> bool:
    """What says what a workspace has, and what may be resumed."""
    parts = name.split("/")
    return name.endswith(".json") and (parts[0] == "pipelines" or (len(parts) == 3 and parts[0] in ("stages", "ray")))


class Workspace:
    """`root` is a folder or s3://BUCKET/PREFIX. Raises ConfigError for what is no name of one, UserError if it can't be made or
    written, or the disk is full.
    """

    def __init__(self, root: str | Path, *, minimum_free: int | None = None, looks: bool = False) -> None:
        """`minimum_free`: bytes that must be free on its disk; by default what a run may need. `looks`: to read only, so that
        nothing is made, and whether anything could be is not asked.
        """
        check_name("workspace", root)
        self.remote = is_remote(root)
        if self.remote and not str(root).startswith(
            ("s3://", "s3a://")
        ):  # of others none can be held by one run at a time
            raise ConfigError(f"workspace: {shown(root)} should be a folder, or s3://BUCKET/PREFIX")
        if self.remote:
            self.uri = str(root).rstrip("/")
            if not looks:
                storage.check(self.uri)
            self.root = storage.cache_folder() / "workspaces" / hashlib.sha256(self.uri.encode()).hexdigest()[:16]
        else:
            self.root = absolute(root)
            self.uri = str(self.root)
            check_name("workspace", self.uri)  # the current folder's is part of it
        self._lease: Lease | None = None
        if looks:
            return
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
        if free < (MINIMUM_FREE if minimum_free is None else minimum_free):
            raise UserError(
                f"workspace: only {free // 1024**2} MB are free on the disk of {self.root}, "
                f"{MINIMUM_FREE // 1024**2} MB are needed",
                hint="free some space, or give another folder with --workspace",
            )

    def stage(self, name: str, key: str) -> StageFolder:
        path = self.root / "stages" / f"{name}-{key}"
        path.mkdir(parents=True, exist_ok=True)
        folder = StageFolder(name, key, path, join(self.uri, "stages", path.name))
        folder.refresh()
        return folder

    def remove(self, path: Path) -> None:
        """Removes a file or folder of the workspace, and only of it; a folder is renamed first, so that none is there in part. In a
        store the result goes first, without which a stage is not there.
        """
        if self.root not in path.parents:
            raise UserError(f"{path} is not in the workspace {self.root}; it is left")
        if self.remote:
            for name in (f"{path.relative_to(self.root)}/{RESULT}", str(path.relative_to(self.root))):
                storage.delete(join(self.uri, name))
        if not path.exists():
            return
        if path.is_dir() and not path.is_symlink():
            if not path.name.endswith(".partial"):
                partial = path.with_name(f".{path.name}.partial")
                if partial.exists():  # of a removal that was killed
                    shutil.rmtree(partial)
                path = path.rename(partial)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def discard(self, folder: StageFolder) -> None:
        """Forgets a stage, its checkpoints included."""
        self.remove(folder.path)
        self.remove(self.root / "ray" / folder.path.name)
        folder.path.mkdir(parents=True)

    @contextlib.contextmanager
    def tree(self) -> Iterator[Workspace]:
        """The workspace for those who look through it: itself, or what the store has, its records whole and all else without
        content.
        """
        if not self.remote:
            yield self
            return
        with tempfile.TemporaryDirectory() as scratch:
            storage.skeleton(self.uri, Path(scratch), whole=_record)
            yield Workspace(scratch, minimum_free=0)

    def stages(self) -> list[StageFolder]:
        """All stage folders on this machine, finished or not."""
        parts = [
            (path, *path.name.rpartition("-")) for path in sorted((self.root / "stages").glob("[!.]*")) if path.is_dir()
        ]
        return [StageFolder(name, key, path, str(path)) for path, name, _, key in parts]

    def pipelines(self) -> dict[str, dict[str, Any]]:
        """The records of the configurations that were run, by name, each with "used", when (seconds since 1970). One that is not
        as it was written has that alone.
        """
        found: dict[str, dict[str, Any]] = {}
        for path in sorted((self.root / "pipelines").glob("*.json")):
            record: Any = None
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(path.read_text())
            whole = isinstance(record, dict) and isinstance(record.get("stages", {}), dict)
            found[path.stem] = (record if whole else {}) | {"used": path.lstat().st_mtime}
        return found

    def refer(self, pipeline: str, folder: StageFolder) -> None:
        """Records that the pipeline has this stage, in the place of one of the same name with another key."""
        note = f"pipelines/{pipeline}.json"
        record = self.read_note(note) or {}
        self.write_note(note, record | {"stages": record.get("stages", {}) | {folder.name: folder.key}})

    @property
    def training_storage(self) -> str:
        return join(self.uri, "ray")

    def read_note(self, name: str) -> dict[str, Any] | None:
        """A small JSON file of the workspace, or None if it is not there."""
        try:
            return dict(json.loads(storage.read(join(self.uri, name))))
        except (FileNotFoundError, ValueError):
            return None

    def write_note(self, name: str, value: dict[str, Any]) -> None:
        storage.write(join(self.uri, name), (json.dumps(value, indent=2) + "\n").encode())

    def report(self, recipe: str) -> Path:
        path = self.root / "reports" / recipe
        path.mkdir(parents=True, exist_ok=True)
        return path

    def share_report(self, recipe: str) -> str:
        """Puts the report where the workspace is; says where."""
        if self.remote:
            storage.publish(self.report(recipe), join(self.uri, "reports", recipe))
        return join(self.uri, "reports", recipe, "report.html")

    @property
    def default_tracking_uri(self) -> str:
        """In an address % and ? mean something, and are quoted. MLflow would then make a folder of the quoted name, unless the
        address names the driver too.
        """
        path = str(self.root / "mlflow.db")
        quoted = path.replace("%", "%25").replace("?", "%3F")
        return f"sqlite{'' if quoted == path else '+pysqlite'}:///{quoted}"

    @property
    def default_artifacts(self) -> Path:
        return self.root / "mlartifacts"

    @property
    def outbox(self) -> Path:
        return self.root / "outbox"

    def check_held(self) -> None:
        """Raises UserError when another run took the workspace over, as it may when this one did not reach the store for long."""
        if self._lease and self._lease.lost:
            raise UserError(
                f"workspace: {self.uri} was taken over by another run: this one could not renew its hold",
                hint="what it had saved is kept, and the other run goes on from it",
            )

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """What a full disk, or a folder that can't be written, does to a run of this workspace is a UserError that names it."""
        try:
            yield
        except OSError as error:
            if told := explain_os_error(error, self.uri):
                raise told from error
            raise

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One run at a time. Here the kernel frees the lock when its holder dies, however it dies; in a store it runs out."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._flock())
            if self.remote:
                self._lease = Lease(join(self.uri, ".lock"), "workspace")
                stack.enter_context(self._lease.held())
            yield

    @contextlib.contextmanager
    def _flock(self) -> Iterator[None]:
        with (self.root / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise UserError(
                    f"workspace: {self.uri} is in use by another run (process {holder})",
                    hint="wait for it to end, or use another --workspace",
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield


def explain_os_error(error: OSError, workspace: str | Path | None = None) -> UserError | None:
    """What a full disk or a folder that can't be written means here; None for other errors. `workspace`: of the run that met it."""
    error = getattr(error, "cause", None) or error  # of a Ray task: its error without the frames
    where = error.filename or workspace
    saved = f"; finished stages and the last checkpoints in {workspace} are kept" if workspace else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        full = f"the disk is full ({where})" if where else "the disk is full"
        return UserError(f"{full}{saved}", hint="free space, run it again")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"{where or 'a file'} cannot be written{saved}", hint="mend that, run it again")
    if error.errno in WORLDS and where:
        return UserError(f"{where}: {error.strerror}{saved}", hint="mend that, run it again")
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
    """The commit of this source tree, with "+" if it has changes. Outside a checkout MMDISTILL_COMMIT, which a job is told, or
    "unknown".
    """
    import subprocess

    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        out = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
        return out.stdout.strip() if out.returncode == 0 else ""

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if git("rev-parse", "--show-toplevel") == str(root) and (commit := git("rev-parse", "HEAD")):
            return commit + ("+" if git("status", "--porcelain") else "")
    return os.environ.get("MMDISTILL_COMMIT") or "unknown"
