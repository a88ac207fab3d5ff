"""Tracking: runs, metrics, params and artifacts in MLflow. The model registry is in registry/versions.py.

The pipeline has a parent run, and each stage a child. With an outbox, what is logged goes to the workspace's journal, and a thread
delivers it: an outage of the store stops nothing. Without one, each call goes to the store, and raises UserError if it does not
answer.
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
from typing import Any, TypeVar
from urllib.parse import unquote, unquote_plus, urlsplit

from workflows.errors import UserError, home
from workflows.storage import jsonl
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
URI_VARIABLE = "MLFLOW_TRACKING_URI"
DATABASES = ("postgresql", "mysql", "mssql")
NO_STORE = ("the file does not exist, or is empty", "the database has no MLflow tables")
A_MOMENT = 5.0
"""Seconds that a new run waits for the store's id, before it continues with an id of our own."""
T = TypeVar("T")


class Tracker:
    """A tracking store; `uri` is its address without user and password.

    The constructor and the registry's methods raise UserError if the store does not answer. With an outbox, the other methods
    raise it only if the store refuses.
    """

    def __init__(
        self,
        uri: str,
        *,
        artifacts: Path | None = None,
        experiment: str = EXPERIMENT,
        outbox: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
        read_only: bool = False,
    ) -> None:
        """`artifacts`: where a store without a server keeps files; a server decides for itself. `outbox`: the folder of a
        workspace's outboxes, one for each store; only the holder of the workspace may pass it. `say` shows a line. `read_only`:
        only reads the registry. Nothing is created, and no run can be started.
        """
        import logging

        home()  # MLflow asks for it on import

        import mlflow
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # the error is shown in one line instead
        self.uri, self._mlflow, self._secrets = shown(uri), mlflow, _secrets(uri)
        self._label = f"{self.uri}{origin(uri)}"
        self._outbox: Outbox | None = None
        self._runs: dict[str, str] = {}
        with self.reachable(), _valid_address(self._label):
            if read_only and not store_exists(uri):
                raise UserError(
                    f"tracking: {self._label}: {NO_STORE[_file(uri) is None]}",
                    hint="name the store with --tracking-uri",
                )
            self._address = _with_credentials_aside(uri)
            self.make_current()
            self.client = MlflowClient(tracking_uri=self._address, registry_uri=self._address)
            existing = self.client.get_experiment_by_name(experiment)
            if existing is not None:
                self.experiment = existing.experiment_id
            elif read_only:
                self.experiment = ""
            else:
                location = artifacts.as_uri() if artifacts is not None and not uri.startswith("http") else None
                self.experiment = self.client.create_experiment(experiment, artifact_location=location)
        self._delivery = Delivery(
            self.client, self.experiment, runs=self._runs, note_run=self._note_run, kept=self._kept, hide=self._hide
        )
        if outbox is not None:
            self._folder = outbox_of(outbox, self.uri)
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "store").write_text(self.uri)
            for line in jsonl.read(self._folder / "runs.jsonl"):
                self._runs |= line
            self._outbox = Outbox(self._folder, self._delivery.deliver, name=f"tracking: {self.uri}", say=say)

    def make_current(self) -> None:
        """Points MLflow at this store. MLflow also sets an environment variable, which the next run of this process would find. So
        the variable is restored.
        """
        before = os.environ.get("MLFLOW_TRACKING_URI")
        self._mlflow.set_tracking_uri(self._address)
        self._mlflow.set_registry_uri(self._address)
        if before is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before

    @contextmanager
    def reachable(self) -> Iterator[None]:
        """Turns errors of the store within the block into UserErrors."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import DBAPIError

        try:
            yield
        except (MlflowException, DBAPIError, OSError, Away, Refused) as error:
            if isinstance(error, OSError) and meaning(error) is None:
                raise
            reason = str(error) if isinstance(error, (Away, Refused)) else self._hide(brief(error))
            is_away = isinstance(error, Away) or meaning(error) == "away"
            raise self._failure(reason, is_away) from (None if self._secrets else error)

    def _failure(self, reason: str, is_away: bool) -> UserError:
        when = "the store is back" if is_away else "that is fixed"
        return UserError(
            f"tracking: {self._label} failed: {reason}",
            hint=f"finished stages and the last checkpoints are kept in the workspace: when {when}, "
            "run the same command again (or give another --tracking-uri); it continues where it was",
        )

    def _ask(self, question: Callable[[], T], *, refused: T | None = None, away: T | None = None) -> T:
        """The store's answer; or `refused` if the store refuses, or `away` if it is away and there is an outbox. Raises UserError
        instead if that value is None.
        """
        try:
            return question()
        except Exception as error:
            kind = meaning(error)
            if kind == "refused" and refused is not None:
                return refused
            if kind == "away" and away is not None and self._outbox is not None:
                return away
            with self.reachable():
                raise

    def _hide(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    # The outbox

    def _put(self, operation: Operation) -> int:
        """Queues or delivers the operation. Returns its number in the outbox, or 0 if it was delivered at once."""
        with self.reachable():
            if self._outbox is not None:
                return self._outbox.put(operation)
            self._delivery.deliver([operation])
            return 0

    def _note_run(self, our_id: str, run_id: str) -> None:
        """Notes the store's id of a run for later processes, before anything else is delivered to the run."""
        self._runs[our_id] = run_id
        if self._outbox is not None:
            with (self._folder / "runs.jsonl").open("a") as file:
                file.write("\n" + json.dumps({our_id: run_id}) + "\n")  # ends half a line that a kill may have left
                file.flush()
                os.fsync(file.fileno())

    def _kept(self, operation: Operation) -> Path:
        return self._outbox.kept(operation) if self._outbox is not None else Path(operation["path"])

    def resolve(self, run_id: str) -> str:
        """The store's id of a run, if our own id is given and the store has the run by now; else the id as it is."""
        return self._runs.get(run_id, run_id)

    @property
    def pending(self) -> int:
        """How many operations are not delivered yet."""
        return self._outbox.pending if self._outbox is not None else 0

    @property
    def refused(self) -> int:
        """How many operations the store refused; they were set aside."""
        return self._outbox.refused if self._outbox is not None else 0

    @property
    def away(self) -> bool:
        """Whether the store does not answer; always False without an outbox."""
        return self._outbox is not None and self._outbox.away is not None

    def settle(self, seconds: float) -> bool:
        """Waits up to `seconds` until everything logged is delivered. Returns whether it is. Raises UserError for a refusal."""
        with self.reachable():
            return self._outbox is None or self._outbox.wait(seconds=seconds)

    def unreachable(self) -> UserError:
        """The error for a stage that can't continue without the store's answer."""
        reason = (self._outbox and self._outbox.away) or f"{self.pending} entries are not delivered yet"
        return self._failure(reason, is_away=True)

    def close(self) -> None:
        """Closes the outbox. What is not delivered stays on disk, for the next Tracker of this store with the same outbox."""
        if self._outbox is not None:
            self._outbox.close()

    # Runs

    def start_run(
        self, name: str, *, parent: str | None = None, tags: dict[str, str] | None = None, own: str | None = None
    ) -> str:
        """Starts a run. Returns the store's id, or one of our own while the store does not answer (see `resolve`). `own`: an id
        from `own_id` that the caller has already noted.
        """
        own = own or own_id()
        tags = {"mlflow.runName": name, "mlflow.source.name": "mmdistill"} | (tags or {})
        number = self._put({"kind": "run", "run": own, "parent": parent, "tags": tags, "time": now()})
        if self._outbox is not None:
            with self.reachable():
                self._outbox.wait(number, seconds=A_MOMENT, patient=False)
        return self.resolve(own)

    def has(self, run_id: str) -> bool:
        """Whether the store has the run, or will have it. A store that is away is assumed to have it. False for a deleted run, and
        for an id of our own that is neither in the store nor queued: its outbox was removed or is elsewhere.
        """
        # The queue is checked first, as the run may be delivered at this moment.
        queued = self._outbox is not None and self._outbox.holds(kind="run", run=run_id)
        unknown = not queued and self.resolve(run_id).startswith(QUEUED)
        if unknown and (self.away or not self._ask(lambda: self._delivery.find(run_id), away=False)):
            return False
        known = self.resolve(run_id)
        if known.startswith(QUEUED) or self.away:
            return True
        return self._ask(
            lambda: bool(self.client.get_run(known).info.lifecycle_stage == "active"), refused=False, away=True
        )

    def resume_run(self, run_id: str) -> bool:
        """Marks the run as running again. Returns False if this store does not have it."""
        if not self.has(run_id):
            return False
        self._put({"kind": "resume", "run": self.resolve(run_id)})
        return True

    def knows(self, run_id: str) -> bool:
        """Whether the store has the run, deleted or not."""
        find = self._delivery.find if run_id.startswith(QUEUED) else self.client.get_run
        return self._ask(lambda: bool(find(run_id)), refused=False)

    def log_params(self, run_id: str, params: dict[str, Any]) -> None:
        """Logs parameters. Nested dictionaries become dotted names. Parameters that the run already has are left as they are."""
        flat = {key: str(value)[:6000] for key, value in _flatten(params).items()}
        self._put({"kind": "params", "run": run_id, "params": flat})

    def log_metrics(
        self, run_id: str, rows: list[tuple[int, dict[str, float]]], *, times: list[int] | None = None
    ) -> None:
        """Logs rows of (step, metrics). `times`: when each was measured, in ms since 1970. Rows logged again with the same times
        are stored once.
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
        """The steps at which one of `metrics` was logged. With an outbox: none while the store is away."""
        run_id = self.resolve(run_id)
        if not metrics or run_id.startswith(QUEUED) or self.away:
            return set()
        names, history = [_metric_name(name) for name in metrics], self.client.get_metric_history
        return self._ask(lambda: {metric.step for name in names for metric in history(run_id, name)}, away=set())

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Logs a file or folder as it is now: it may change or be removed afterwards."""
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
    """The time in ms since 1970, as MLflow counts it."""
    return int(time.time() * 1000)


def outbox_of(folder: Path, uri: str) -> Path:
    """The outbox of a store, below a workspace's folder of outboxes."""
    return folder / sha256(shown(uri).encode()).hexdigest()[:12]


def address_of(given: str | None, default: str) -> str:
    """The store that a command uses: the given one, else the environment's, else the default."""
    return given or os.environ.get(URI_VARIABLE) or default


def origin(uri: str) -> str:
    """A suffix that tells that an address comes from the environment, where it may be set by accident; else ""."""
    return f" (of {URI_VARIABLE})" if uri == os.environ.get(URI_VARIABLE) else ""


def store_exists(uri: str) -> bool:
    """Whether there is a store at this address, without creating one: MLflow's client would write its tables to an empty database.
    True for anything but a database.
    """
    path = _file(uri)
    if path is not None:
        return path.is_file() and path.stat().st_size > 0
    if not uri.startswith(DATABASES):
        return True
    from sqlalchemy import create_engine, inspect
    from sqlalchemy.pool import NullPool

    return bool(inspect(create_engine(uri, poolclass=NullPool)).has_table("experiments"))


def _file(uri: str) -> Path | None:
    """The file of a SQLite store; None for another store."""
    kind, _, path = uri.partition(":///")
    return Path(unquote(path.partition("?")[0])) if kind.startswith("sqlite") and path else None


@contextmanager
def _valid_address(uri: str) -> Iterator[None]:
    """Raises UserError for an address that can't be parsed, or whose database driver is not installed."""
    from sqlalchemy.exc import ArgumentError

    try:
        yield
    except (ValueError, ImportError, ArgumentError) as error:
        if isinstance(error, OSError):
            raise
        hint = "such as http://HOST:5000, postgresql+psycopg2://USER:PASSWORD@HOST/DATABASE, or sqlite:////FOLDER/mlflow.db"
        reason = shown(brief(error)) if isinstance(error, ImportError) else "it can't be parsed"
        raise UserError(f"tracking: {uri} is not the address of a store: {reason}", hint=hint) from None


def _secrets(uri: str) -> list[str]:
    """Texts that must not be shown, the longest first."""
    forms = {form for text in secrets(uri) for form in (text, unquote(text), unquote_plus(text)) if text.strip("@")}
    return sorted(forms, key=lambda text: (-len(text), text))


def _with_credentials_aside(uri: str) -> str:
    """The address for MLflow. A server's user and password go into MLflow's own variables, so that no address shows them."""
    for name, value in _lent.items():  # this store must not get the credentials of the process's previous one
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
