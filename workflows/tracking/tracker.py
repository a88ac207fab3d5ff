"""Tracking: runs, metrics, params and artifacts, in MLflow; the model registry is registry.py's.

One parent run for the pipeline, a child for each stage. With an outbox, what is logged is written to the workspace's journal
and delivered by a thread: a store that stops answering stops nothing. Without one, each call goes to the store, and raises
UserError when it does not answer.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, unquote_plus, urlsplit

from workflows.errors import UserError, home
from workflows.storage import jsonl as lines
from workflows.storage.uri import secrets, shown
from workflows.tracking.delivery import QUEUED, Delivery, brief, meaning
from workflows.tracking.outbox import MOST, Away, Operation, Outbox, Refused

os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

EXPERIMENT = "mmdistill"
NAMED = "MLFLOW_TRACKING_URI"
DATABASES = ("postgresql", "mysql", "mssql")
NOTHING = ("there is no such file, or nothing in it", "the database has no tables of MLflow's")
A_MOMENT = 5.0
"""Seconds that a new run waits for the store's id, before it goes on with one of its own."""


class Tracker:
    """A tracking store; `uri` is its address without user and password. Raises UserError when it does not answer, from the
    constructor, from the registry's methods, and, without an outbox, from all others; with one, only when it refuses.
    """

    def __init__(
        self,
        uri: str,
        *,
        artifacts: Path | None = None,
        experiment: str = EXPERIMENT,
        outbox: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
        looks: bool = False,
    ) -> None:
        """`artifacts`: where a store without a server keeps files; a server decides for itself. `outbox`: the folder of a
        workspace's outboxes, of which this store has one; only the holder of the workspace may name it. `say` shows a line.
        `looks`: for the registry alone, without making what is not there: no runs can be begun.
        """
        import logging

        home()  # which MLflow asks for as it is imported

        import mlflow
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # the error is told, in a line
        self.uri, self._mlflow, self._secrets = shown(uri), mlflow, _secrets(uri)
        self._named = f"{self.uri}{origin(uri)}"
        self._outbox: Outbox | None = None
        self._runs: dict[str, str] = {}
        with self.reachable(), _an_address(self._named):
            if looks and not made(uri):
                raise UserError(
                    f"tracking: {self._named}: {NOTHING[_file(uri) is None]}", hint="name the store with --tracking-uri"
                )
            self._address = _with_credentials_aside(uri)
            self.make_current()
            self.client = MlflowClient(tracking_uri=self._address, registry_uri=self._address)
            found = self.client.get_experiment_by_name(experiment)
            if found is None and looks:
                self.experiment = ""
            elif found is None:
                location = artifacts.as_uri() if artifacts is not None and not uri.startswith("http") else None
                self.experiment = self.client.create_experiment(experiment, artifact_location=location)
            else:
                self.experiment = found.experiment_id
        self._delivery = Delivery(
            self.client, self.experiment, runs=self._runs, found=self._found, kept=self._kept, hide=self._hide
        )
        if outbox is not None:
            self._folder = outbox_of(outbox, self.uri)
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "store").write_text(self.uri)
            for line in lines.read(self._folder / "runs.jsonl"):
                self._runs |= line
            self._outbox = Outbox(self._folder, self._delivery.deliver, name=f"tracking: {self.uri}", say=say)

    def make_current(self) -> None:
        """MLflow at this store. It writes the address to the environment, where the next run of this process would find it."""
        before = os.environ.get("MLFLOW_TRACKING_URI")
        self._mlflow.set_tracking_uri(self._address)
        self._mlflow.set_registry_uri(self._address)
        if before is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before

    @contextmanager
    def reachable(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import DBAPIError

        try:
            yield
        except (MlflowException, DBAPIError, OSError, Away, Refused) as error:
            if isinstance(error, OSError) and meaning(error) is None:
                raise
            told = isinstance(error, (Away, Refused))
            reason = str(error) if told else self._hide(brief(error))
            when = "the store is back" if isinstance(error, Away) or meaning(error) == "away" else "that is mended"
            raise UserError(
                f"tracking: {self._named} failed: {reason}",
                hint=f"finished stages and the last checkpoints are kept in the workspace: when {when}, "
                "run the same command again (or give another --tracking-uri); it goes on where it was",
            ) from (None if self._secrets else error)

    def _hide(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    # The outbox

    def _put(self, operation: Operation) -> int:
        """Its number in the outbox; 0 if it was delivered at once."""
        with self.reachable():
            if self._outbox is not None:
                return self._outbox.put(operation)
            self._delivery.deliver([operation])
            return 0

    def _found(self, own: str, run_id: str) -> None:
        """The store has the run: noted for later processes before anything else is delivered to it."""
        self._runs[own] = run_id
        if self._outbox is not None:
            with (self._folder / "runs.jsonl").open("a") as file:
                file.write("\n" + json.dumps({own: run_id}) + "\n")  # half a line before it, of a kill, stays by itself
                file.flush()
                os.fsync(file.fileno())

    def _kept(self, operation: Operation) -> Path:
        return self._outbox.kept(operation) if self._outbox is not None else Path(operation["path"])

    def resolve(self, run_id: str) -> str:
        """The store's id of a run that began while it was away, if it has one by now; ids of the store's stay."""
        return self._runs.get(run_id, run_id)

    def expects(self, run_id: str) -> bool:
        """False for an id of our own that is neither the store's by now nor queued: its outbox was removed, or waits on another
        machine.
        """
        queued = self._outbox is not None and self._outbox.holds(kind="run", run=run_id)
        # In this order: it may be delivered at this moment.
        return queued or not self.resolve(run_id).startswith(QUEUED) or self._finds(run_id)

    def _finds(self, own: str) -> bool:
        """Whether the store has the run that another machine gave this id: with an outbox, taken as not while it is away."""
        try:
            return not self.away and self._delivery.find(own)
        except Exception as error:
            if self._outbox is not None and meaning(error) == "away":
                return False
            with self.reachable():
                raise

    @property
    def pending(self) -> int:
        """How many operations are not delivered yet."""
        return self._outbox.pending if self._outbox is not None else 0

    @property
    def refused(self) -> int:
        """How many operations the store would not have, and were set aside."""
        return self._outbox.refused if self._outbox is not None else 0

    @property
    def away(self) -> bool:
        return self._outbox is not None and self._outbox.away is not None

    def settle(self, seconds: float) -> bool:
        """Waits until all that was logged is delivered, for so many seconds at most: whether it is. Raises UserError for what
        was refused.
        """
        with self.reachable():
            return self._outbox is None or self._outbox.wait(seconds=seconds)

    def unreachable(self) -> UserError:
        """The error of a stage that can't do without the store's answer."""
        try:
            with self.reachable():
                raise Away((self._outbox and self._outbox.away) or f"{self.pending} entries are not delivered yet")
        except UserError as error:
            return error

    def close(self) -> None:
        """What is not delivered stays on disk, for the next Tracker of this store with the same outbox."""
        if self._outbox is not None:
            self._outbox.close()

    # Runs

    def start_run(
        self, name: str, *, parent: str | None = None, tags: dict[str, str] | None = None, own: str | None = None
    ) -> str:
        """The id of a new run: the store's, or while it does not answer one of our own (`resolve`); `own`, one of `own_id`, is what
        the caller has noted already.
        """
        own = own or own_id()
        tags = {"mlflow.runName": name, "mlflow.source.name": "mmdistill"} | (tags or {})
        number = self._put({"kind": "run", "run": own, "parent": parent, "tags": tags, "time": now()})
        if self._outbox is not None:
            with self.reachable():
                self._outbox.wait(number, seconds=A_MOMENT, patient=False)
        return self.resolve(own)

    def has(self, run_id: str) -> bool:
        """Whether the store has the run, or will have it; False if it does not know it, or it was deleted. One that is away is
        taken to have it.
        """
        if not self.expects(run_id):
            return False
        run_id = self.resolve(run_id)
        return run_id.startswith(QUEUED) or self.away or self._active(run_id)

    def resume_run(self, run_id: str) -> bool:
        """Marks the run as running again; False if this store does not have it."""
        if not self.has(run_id):
            return False
        self._put({"kind": "resume", "run": self.resolve(run_id)})
        return True

    def knows(self, run_id: str) -> bool:
        """Whether the store has the run, or has it among the deleted ones."""
        try:
            return self._finds(run_id) if run_id.startswith(QUEUED) else bool(self.client.get_run(run_id))
        except Exception as error:
            if meaning(error) == "refused":
                return False
            with self.reachable():
                raise

    def _active(self, run_id: str) -> bool:
        """Whether the store has the run. One that stops answering is taken to have it, if there is an outbox to go on with."""
        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "active")
        except Exception as error:
            told = meaning(error)
            if told == "refused":
                return False
            if told == "away" and self._outbox is not None:
                return True
            with self.reachable():
                raise

    def log_params(self, run_id: str, params: dict[str, Any]) -> None:
        """Nested dictionaries become dotted names. Parameters that are already there are left."""
        flat = {key: str(value)[:6000] for key, value in _flatten(params).items()}
        self._put({"kind": "params", "run": run_id, "params": flat})

    def log_metrics(
        self, run_id: str, rows: list[tuple[int, dict[str, float]]], *, times: list[int] | None = None
    ) -> None:
        """rows of (step, metrics); `times`: when each was measured, in ms since 1970. The same rows with the same times may be
        logged again: they are there once.
        """
        times = times or [now()] * len(rows)
        values = [
            [_metric_name(key), float(value), moment, step]
            for (step, row), moment in zip(rows, times, strict=True)
            for key, value in row.items()
        ]
        for start in range(0, len(values), MOST):
            self._put({"kind": "metrics", "run": run_id, "values": values[start : start + MOST]})

    def steps(self, run_id: str, *metrics: str) -> set[int]:
        """The steps at which one of `metrics` was logged, as far as the store can tell: none while it is away."""
        run_id = self.resolve(run_id)
        if not metrics or run_id.startswith(QUEUED) or self.away:
            return set()
        try:
            return {m.step for name in metrics for m in self.client.get_metric_history(run_id, _metric_name(name))}
        except Exception as error:
            if self._outbox is not None and meaning(error) == "away":
                return set()
            with self.reachable():
                raise

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """A file or folder as it is now: it may change or go afterwards."""
        kept = {"path": str(path)} if self._outbox is None else self._outbox.keep(path)
        self._put({"kind": "artifact", "run": run_id, "folder": folder} | kept)

    def log_text(self, run_id: str, text: str, file: str) -> None:
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / Path(file).name
            path.write_text(text)
            folder = str(Path(file).parent)
            self.log_artifact(run_id, path, None if folder == "." else folder)

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        self._put({"kind": "tags", "run": run_id, "tags": tags})

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        self._put({"kind": "end", "run": run_id, "status": status, "time": now()})


def own_id() -> str:
    """An id for a run that the store does not have yet."""
    return QUEUED + uuid.uuid4().hex


def now() -> int:
    """In ms since 1970, as MLflow has it."""
    return int(time.time() * 1000)


def outbox_of(folder: Path, uri: str) -> Path:
    """Where what is queued for a store lies, below a workspace's folder of outboxes."""
    return folder / sha256(shown(uri).encode()).hexdigest()[:12]


def address_of(given: str | None, default: str) -> str:
    """The store of a command: as given, or of the environment, or the workspace's own."""
    return given or os.environ.get(NAMED) or default


def origin(uri: str) -> str:
    """Where an address comes from, as it may be shown after it, if not from the command line: it may be there by accident."""
    return f" (of {NAMED})" if uri == os.environ.get(NAMED) else ""


def made(uri: str) -> bool:
    """Whether there is a store at this address, without making one: MLflow's own client writes its tables to an empty database.
    What is no database is taken to be one.
    """
    path = _file(uri)
    if path is not None:
        return path.is_file() and path.stat().st_size > 0
    if uri.partition(":")[0].partition("+")[0] not in DATABASES:
        return True
    from sqlalchemy import create_engine, inspect
    from sqlalchemy.pool import NullPool

    return bool(inspect(create_engine(uri, poolclass=NullPool)).has_table("experiments"))


def _file(uri: str) -> Path | None:
    """The file of a store in SQLite."""
    kind, _, path = uri.partition(":///")
    return Path(unquote(path.partition("?")[0])) if kind.startswith("sqlite") and path else None


@contextmanager
def _an_address(uri: str) -> Iterator[None]:
    """Raises UserError for one that nothing can be asked at: which can't be read, or whose database has no driver here."""
    from sqlalchemy.exc import ArgumentError

    try:
        yield
    except (ValueError, ImportError, ArgumentError) as error:
        if isinstance(error, OSError):
            raise
        hint = "such as http://HOST:5000, postgresql+psycopg2://USER:PASSWORD@HOST/DATABASE, or sqlite:////FOLDER/mlflow.db"
        reason = shown(brief(error)) if isinstance(error, ImportError) else "it can't be read"
        raise UserError(f"tracking: {uri} is no address of a store: {reason}", hint=hint) from None


def _secrets(uri: str) -> list[str]:
    """Texts that must not be shown: the longest first."""
    found = {form for text in secrets(uri) for form in (text, unquote(text), unquote_plus(text)) if text.strip("@")}
    return sorted(found, key=lambda text: (-len(text), text))


def _with_credentials_aside(uri: str) -> str:
    """The address for MLflow. A server's user and password go by MLflow's own variables, so that they are in no address of its."""
    for name, value in _lent.items():  # another store's, of this process, are not for this one
        if os.environ.get(name) == value:
            del os.environ[name]
    _lent.clear()
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    _lent["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    _lent["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    os.environ.update(_lent)
    return shown(uri)


_lent: dict[str, str] = {}


def _metric_name(name: str) -> str:
    return name.replace("@", "_at_")


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            out |= _flatten(value, f"{name}.")
        else:
            out[name] = value
    return out
