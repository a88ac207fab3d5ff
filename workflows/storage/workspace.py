"""The workspace: one folder, local or in an object store, for everything that runs leave. Stages have keys; one run at a time.

.mmdistill/
    stages/<stage>-<key>/   result.json (last: the stage is done), config.yaml, metrics.jsonl, runs.json, its outputs
    pipelines/<name>.json   a configuration that was run: its tracking run, and the stages that it refers to
    reports/<recipe>/       report.html, samples.png, summary.json
    ray/                    checkpoints of trainings
    mlflow.db, mlartifacts/ the default tracking store
    outbox/<store>/         what was logged, until the tracking store has it

A workspace in an object store has a working copy on this machine. A stage exists once its result.json does, which is written last.
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
from pathlib import Path
from typing import Any

from workflows.errors import ConfigError, UserError
from workflows.storage import store
from workflows.storage.lease import Lease
from workflows.storage.local import read_json, write_json
from workflows.storage.uri import absolute, check_name, is_remote, join, shown

RESULT = "result.json"
RUNS = "runs.json"
"""The ids of a stage's tracking runs, by store."""
SYSTEM_ERRORS = (errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EMFILE, errno.ENFILE)
"""Errors of files that are never this program's fault."""
MINIMUM_FREE = 200 * 1024**2


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() or file.is_symlink())


def changed(path: Path) -> float:
    """When the file, or the newest file or folder in a folder, was written (seconds since 1970)."""
    return max(p.lstat().st_mtime for p in (path, *(path.rglob("*") if path.is_dir() else ())))


@dataclass(frozen=True)
class StageFolder:
    """A stage's outputs. `path` is on this machine; `uri` is where other machines find them: the same, or in the store. `in_store`:
    what a worker already wrote there.
    """

    name: str
    key: str
    path: Path
    uri: str
    in_store: set[str] = field(default_factory=set)

    @property
    def result(self) -> dict[str, Any] | None:
        """What the stage returned, or None if it is not finished."""
        return read_json(self.path / RESULT)

    def at(self, name: str) -> str:
        """The path or URI of a file or folder of the stage, for other machines."""
        return join(self.uri, name)

    def keep(self, name: str) -> None:
        """Uploads a file of an unfinished stage that a run on another machine would need."""
        if is_remote(self.uri):
            store.upload(self.path / name, self.at(name))

    def _begun_here(self) -> bool:
        """Whether the store's unfinished stage is the one that was begun on this machine."""
        try:
            return (self.path / RUNS).read_bytes() == store.read(self.at(RUNS))
        except FileNotFoundError:
            return False

    def collect(self, name: str) -> None:
        """Downloads what a worker wrote to `at(name)`."""
        if is_remote(self.uri):
            store.pull(self.at(name), self.path / name)
            self.in_store.add(name)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the stage; {} if it does not exist or can't be read."""
        return read_json(self.path / name) or {}

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the result. In a store everything else is uploaded before it."""
        write_json(self.path / RESULT, result)
        if is_remote(self.uri):
            collected = tuple(f"{name}/" for name in self.in_store)
            store.publish(self.path, self.uri, skip=lambda name: name.startswith(collected), last=RESULT)

    def refresh(self) -> None:
        """Updates the working copy from the store."""
        if not is_remote(self.uri):
            return
        try:
            stored = store.read(self.at(RESULT))
        except FileNotFoundError:
            (self.path / RESULT).unlink(missing_ok=True)
            if not self._begun_here():  # another machine has begun it since
                shutil.rmtree(self.path)
                self.path.mkdir()
                store.pull(self.uri, self.path, skip=_is_shard)
            return
        if not (self.path / RESULT).is_file() or (self.path / RESULT).read_bytes() != stored:
            self.fetch_again()

    def fetch_again(self) -> None:
        """Downloads a finished stage again; the result comes last."""
        stored = store.read(self.at(RESULT))
        shutil.rmtree(self.path)
        self.path.mkdir()
        store.pull(self.uri, self.path, skip=lambda name: _is_shard(name) or name == RESULT)
        (self.path / RESULT).write_bytes(stored)


def _is_shard(name: str) -> bool:
    """Shards are read from the store, not copied."""
    return name.startswith("data/shards/")


def _is_record(name: str) -> bool:
    """Whether the file tells what the workspace has, or what can be resumed."""
    parts = name.split("/")
    return name.endswith(".json") and (parts[0] == "pipelines" or (len(parts) == 3 and parts[0] in ("stages", "ray")))


class Workspace:
    """`root` is a folder or s3://BUCKET/PREFIX. Raises ConfigError for anything else, UserError if it can't be created or written,
    or the disk is full.
    """

    def __init__(self, root: str | Path, *, minimum_free: int | None = None, read_only: bool = False) -> None:
        """`minimum_free`: bytes that must be free on its disk; by default what a run may need. `read_only`: nothing is
        created, and whether anything could be written is not checked.
        """
        check_name("workspace", root)
        self.remote = is_remote(root)
        if self.remote and not str(root).startswith(("s3://", "s3a://")):  # other stores have no lock
            raise ConfigError(f"workspace: {shown(root)} should be a folder, or s3://BUCKET/PREFIX")
        if self.remote:
            self.uri = str(root).rstrip("/")
            if not read_only:
                store.check(self.uri)
            self.root = store.cache_folder() / "workspaces" / hashlib.sha256(self.uri.encode()).hexdigest()[:16]
        else:
            self.root = absolute(root)
            self.uri = str(self.root)
            check_name("workspace", self.uri)  # a relative path has the current folder's name in it now
        self._lease: Lease | None = None
        if read_only:
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
        free, needed = shutil.disk_usage(self.root).free, MINIMUM_FREE if minimum_free is None else minimum_free
        if free < needed:
            raise UserError(
                f"workspace: only {free // 1024**2} MB are free on the disk of {self.root}, {needed // 1024**2} MB are needed",
                hint="free some space, or give another folder with --workspace",
            )

    def stage(self, name: str, key: str) -> StageFolder:
        """A stage's folder: created if it is new, and updated from the store."""
        path = self.root / "stages" / f"{name}-{key}"
        path.mkdir(parents=True, exist_ok=True)
        folder = StageFolder(name, key, path, join(self.uri, "stages", path.name))
        folder.refresh()
        return folder

    def remove(self, path: Path) -> None:
        """Removes a file or folder of the workspace; raises UserError for one outside of it. A folder is renamed first, so that no
        partial one is left. In a store the result is deleted first: without it the stage does not exist.
        """
        if self.root not in path.parents:
            raise UserError(f"{path} is not in the workspace {self.root}: it is not removed")
        if self.remote:
            for name in (f"{path.relative_to(self.root)}/{RESULT}", str(path.relative_to(self.root))):
                store.delete(join(self.uri, name))
        if not path.exists():
            return
        if path.is_dir() and not path.is_symlink():
            if not path.name.endswith(".partial"):
                partial = path.with_name(f".{path.name}.partial")
                if partial.exists():  # left by a removal that was killed
                    shutil.rmtree(partial)
                path = path.rename(partial)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def discard(self, folder: StageFolder) -> None:
        """Forgets a stage and its checkpoints."""
        self.remove(folder.path)
        self.remove(self.root / "ray" / folder.path.name)
        folder.path.mkdir(parents=True)

    @contextlib.contextmanager
    def tree(self) -> Iterator[Workspace]:
        """The workspace as a local tree: itself, or a skeleton of the store, in which only records have content."""
        if not self.remote:
            yield self
            return
        with tempfile.TemporaryDirectory() as scratch:
            store.skeleton(self.uri, Path(scratch), whole=_is_record)
            yield Workspace(scratch, minimum_free=0)

    def stages(self) -> list[StageFolder]:
        """All stage folders on this machine, finished or not."""
        paths = sorted(path for path in (self.root / "stages").glob("[!.]*") if path.is_dir())
        return [StageFolder(*path.name.rpartition("-")[::2], path, str(path)) for path in paths]

    def pipelines(self) -> dict[str, dict[str, Any]]:
        """The records of the configurations that were run, by name. "used" is the time of the last run (seconds since 1970). A
        damaged record has only that.
        """
        found: dict[str, dict[str, Any]] = {}
        for path in sorted((self.root / "pipelines").glob("*.json")):
            record = read_json(path) or {}
            whole = isinstance(record.get("stages", {}), dict)
            found[path.stem] = (record if whole else {}) | {"used": path.lstat().st_mtime}
        return found

    def refer(self, pipeline: str, folder: StageFolder) -> None:
        """Records that the pipeline uses this stage, instead of one of the same name with another key."""
        note = f"pipelines/{pipeline}.json"
        record = self.read_note(note) or {}
        self.write_note(note, record | {"stages": record.get("stages", {}) | {folder.name: folder.key}})

    @property
    def training_storage(self) -> str:
        return join(self.uri, "ray")

    def read_note(self, name: str) -> dict[str, Any] | None:
        """A small JSON file of the workspace, or None if it does not exist or is damaged."""
        try:
            return dict(json.loads(store.read(join(self.uri, name))))
        except (FileNotFoundError, ValueError):
            return None

    def write_note(self, name: str, value: dict[str, Any]) -> None:
        store.write(join(self.uri, name), (json.dumps(value, indent=2) + "\n").encode())

    def report(self, recipe: str) -> Path:
        path = self.root / "reports" / recipe
        path.mkdir(parents=True, exist_ok=True)
        return path

    def report_uri(self, recipe: str) -> str:
        return join(self.uri, "reports", recipe, "report.html")

    def share_report(self, recipe: str) -> None:
        """Uploads the report of a workspace in a store."""
        if self.remote:
            store.publish(self.report(recipe), join(self.uri, "reports", recipe))

    @property
    def default_tracking_uri(self) -> str:
        """The workspace's SQLite store. In an address % and ? have a meaning, and are quoted. MLflow would then create a folder of
        the quoted name, unless the address names the driver too.
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
        """Raises UserError if another run took the workspace over, as it may when this one could not reach the store for long."""
        if self._lease and self._lease.lost:
            raise UserError(
                f"workspace: {self.uri} was taken over by another run: this one could not renew its lease",
                hint="what it had saved is kept, and the other run continues from it",
            )

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Within the block, a full disk or a folder that can't be written raises a UserError that names this workspace."""
        try:
            yield
        except OSError as error:
            if explanation := explain_os_error(error, self.uri):
                raise explanation from error
            raise

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One run at a time. The kernel frees a local lock when its holder dies, however it dies; a lease in a store expires."""
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
    """A full disk or a folder that can't be written, as a UserError; None for other errors. `workspace`: the run's workspace."""
    error = getattr(error, "cause", None) or error  # an error of a Ray task wraps the original
    where = error.filename or workspace
    saved = f"; finished stages and the last checkpoints in {workspace} are kept" if workspace else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        full = f"the disk is full ({where})" if where else "the disk is full"
        return UserError(f"{full}{saved}", hint="free space, run it again")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"{where or 'a file'} cannot be written{saved}", hint="fix that, then run it again")
    if error.errno in SYSTEM_ERRORS and where:
        return UserError(f"{where}: {error.strerror}{saved}", hint="fix that, then run it again")
    return None
