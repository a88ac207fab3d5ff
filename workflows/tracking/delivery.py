"""Delivers operations of the outbox to MLflow, idempotently, and classifies errors.

MLflow keys a metric by run, name, step, time and value: sent twice with the same recorded time, it is stored once. A run is found
again by the tag `mmdistill.run`, which holds the id that we gave it.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from workflows.errors import chain_of, in_a_line
from workflows.tracking.outbox import MOST, Away, Operation, Refused

OWN_ID = "mmdistill.run"
QUEUED = "queued-"
"""The prefix of our own ids. Such an id stands for a run until the store has the run."""
CREDENTIALS = {401, 403}
RETRYABLE = {404, 408, 425, 429}
"""Statuses below 500 after which a retry may succeed. A 404 that is not MLflow's comes from a proxy whose server is away."""
UNREACHABLE = ("ConnectionError", "Timeout", "RetryError", "ChunkedEncodingError", "TimeoutError")
"""Error classes of requests and of Python: no answer, or half of one."""
REASON_LENGTH = 500
"""Maximum characters of a reason. Some of MLflow's, such as for an outdated schema, end with the command that helps."""
MISCONFIGURED = ("InvalidURL", "InvalidSchema", "MissingSchema", "NoCredentialsError")
DATABASE = re.compile(
    r"^\((psycopg2?|sqlite3|pymysql|MySQLdb)[\w.]*\.(OperationalError|InterfaceError|DatabaseError)\)"
)


class Delivery:
    """`deliver(operations)` sends them with `client`, and raises Away or Refused. `runs` maps our own ids to the store's.
    `note_run` is called with each new pair. `kept` gives the file of an operation. `hide` removes secrets from a text.
    """

    def __init__(
        self,
        client: Any,
        experiment: str,
        *,
        runs: dict[str, str],
        note_run: Callable[[str, str], None],
        kept: Callable[[Operation], Path],
        hide: Callable[[str], str],
    ) -> None:
        self.client, self.experiment = client, experiment
        self._runs, self._note_run, self._kept, self._hide = runs, note_run, kept, hide

    def deliver(self, operations: list[Operation]) -> None:
        try:
            if operations[0]["kind"] == "metrics":
                self.metrics(operations)
            else:
                getattr(self, operations[0]["kind"])(operations[0])
        except Exception as error:
            kind = meaning(error)
            if kind is None:
                raise
            text = self._hide(brief(error))
            raise (Away(text) if kind == "away" else Refused(text, stays=kind == "denied")) from error

    def run_id(self, run: str) -> str:
        """The store's id of a run. Raises Refused if the store does not have it."""
        if run.startswith(QUEUED) and run not in self._runs and not self.find(run):
            raise Refused(f"the store has no run {run}", stays=False)
        return self._runs.get(run, run)

    def find(self, our_id: str) -> bool:
        """Whether the store has the run with our id, whichever machine created it."""
        twins = self._twins(our_id)
        if twins:
            self._note_run(our_id, twins[0])
        return bool(twins)

    def _twins(self, our_id: str) -> list[str]:
        """The runs that carry our id, the oldest first."""
        runs = self.client.search_runs(
            [self.experiment], f"tags.`{OWN_ID}` = '{our_id}'", order_by=["attributes.start_time ASC"], max_results=10
        )
        return [run.info.run_id for run in runs]

    def run(self, operation: Operation) -> None:
        """Creates a run, once. An earlier attempt whose answer was lost may have created it already, even twice."""
        our_id, tags = operation["run"], dict(operation["tags"])
        if parent := operation.get("parent"):
            tags["mlflow.parentRunId"] = self.run_id(parent)
        twins = self._twins(our_id)
        if not twins:
            self.client.create_run(self.experiment, start_time=operation["time"], tags=tags | {OWN_ID: our_id})
            twins = self._twins(our_id)
        for twin in twins[1:]:
            self.client.delete_run(twin)
        self._note_run(our_id, twins[0])

    def resume(self, operation: Operation) -> None:
        self.client.update_run(self.run_id(operation["run"]), status="RUNNING")

    def end(self, operation: Operation) -> None:
        self.client.set_terminated(self.run_id(operation["run"]), operation["status"], operation["time"])

    def params(self, operation: Operation) -> None:
        """Logs the parameters that the run does not have yet."""
        from mlflow.entities import Param

        run_id = self.run_id(operation["run"])
        known = self.client.get_run(run_id).data.params
        new = [Param(key, value) for key, value in operation["params"].items() if key not in known]
        for start in range(0, len(new), 100):
            self.client.log_batch(run_id, params=new[start : start + 100], synchronous=True)

    def tags(self, operation: Operation) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in operation["tags"].items()]
        self.client.log_batch(self.run_id(operation["run"]), tags=tags, synchronous=True)

    def metrics(self, operations: Iterable[Operation]) -> None:
        """Logs values [name, value, time, step] of any runs, in batches of at most 1,000 for each run."""
        from mlflow.entities import Metric

        of_run: dict[str, list[Any]] = {}
        for operation in operations:
            of_run.setdefault(operation["run"], []).extend(Metric(*value) for value in operation["values"])
        for run, values in of_run.items():
            for start in range(0, len(values), MOST):
                self.client.log_batch(self.run_id(run), metrics=values[start : start + MOST], synchronous=True)

    def artifact(self, operation: Operation) -> None:
        run_id, path = self.run_id(operation["run"]), self._kept(operation)
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), operation["folder"])
        else:
            self.client.log_artifact(run_id, str(path), operation["folder"])


def brief(error: BaseException) -> str:
    """The first line of an error's root cause. The full text of a store's answer can be a whole page."""
    chain = chain_of(error)
    inner = [part for cause in reversed(chain) for part in (cause, *cause.args) if getattr(part, "strerror", None)]
    text = inner[0].strerror if inner else str(_innermost(chain[-1]))
    return in_a_line((text.splitlines() or [type(chain[-1]).__name__])[0], REASON_LENGTH)


def _innermost(error: BaseException) -> BaseException:
    """The innermost of errors nested as arguments, as urllib3 nests them."""
    for part in error.args:
        if isinstance(part, BaseException):
            return _innermost(part)
    return error


def meaning(error: BaseException) -> str | None:
    """Classifies an error of a call to the store: "away" (retry later), "denied" (wrong credentials, an address or a file that
    can't work), "refused" (only this request), or None (not the store's error, but this machine's or our own).
    """
    chain = chain_of(error)
    names = {kind.__name__ for part in chain for kind in type(part).__mro__}
    if any(type(part) is sqlite3.DatabaseError for part in chain):  # the file is damaged, or no database
        return "denied"
    if names & set(MISCONFIGURED) or any("CERTIFICATE_VERIFY_FAILED" in str(part) for part in chain):
        return "denied"
    status = next((code for part in chain if (code := _status(part)) is not None), None)
    if status is not None:
        if status in CREDENTIALS:
            return "denied"
        return "away" if status in RETRYABLE or status >= 500 else "refused"
    if names & set(UNREACHABLE) or "BotoCoreError" in names:
        return "away"
    if "MlflowException" in names:
        return _meaning_of_code(next(part for part in chain if hasattr(part, "error_code")))
    return "away" if "DBAPIError" in names else None  # a database, at the first connection


def _meaning_of_code(error: Any) -> str:
    code, status = error.error_code, error.get_http_status_code()
    if status in CREDENTIALS:
        return "denied"
    if DATABASE.match(str(error)):  # the database is away, which MLflow reports as a bad request
        return "away"
    if code.endswith(("DOES_NOT_EXIST", "NOT_FOUND")):
        return "refused"
    return "away" if status in RETRYABLE or status >= 500 else "refused"


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of requests or boto3, or in MLflow's error about an answer that was not from MLflow."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        code = getattr(response, "status_code", None)
    if code is None and (match := re.search(r"failed with error code (\d{3}) !=", str(error))):
        code = int(match[1])
    return code if isinstance(code, int) else None
