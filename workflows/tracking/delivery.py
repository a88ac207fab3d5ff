"""Delivery: an operation of the outbox to MLflow, in such a way that a second time changes nothing, and what an error means.

MLflow keys a metric by run, name, step, time and value, so that the same one sent twice is there once as long as its recorded
time goes with it. A run is found again by the tag `mmdistill.run`, which holds the id that we gave it ourselves.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from workflows.errors import in_a_line
from workflows.tracking.outbox import MOST, Away, Operation, Refused

OWN_ID = "mmdistill.run"
QUEUED = "queued-"
"""How the id of a run begins that the store does not have yet."""
CREDENTIALS = {401, 403}
LATER = {404, 408, 425, 429}
"""Statuses below 500 after which the same request may succeed; a 404 that is not MLflow's own is a proxy's without its server."""
ABSENT = ("ConnectionError", "Timeout", "RetryError", "ChunkedEncodingError", "TimeoutError")
"""Classes of requests and of Python: no answer, or half of one."""
AT_LENGTH = 500
"""Characters of a reason. MLflow's own, such as of a schema that is out of date, end with the command that helps."""
AMISS = ("InvalidURL", "InvalidSchema", "MissingSchema", "NoCredentialsError")
DATABASE = re.compile(
    r"^\((psycopg2?|sqlite3|pymysql|MySQLdb)[\w.]*\.(OperationalError|InterfaceError|DatabaseError)\)"
)


class Delivery:
    """`deliver(operations)` sends them with `client`; raises Away or Refused. `runs` maps our own ids to the store's, `found` is
    called with each new pair, `kept` gives the file of an operation, `hide` takes secrets out of a text.
    """

    def __init__(
        self,
        client: Any,
        experiment: str,
        *,
        runs: dict[str, str],
        found: Callable[[str, str], None],
        kept: Callable[[Operation], Path],
        hide: Callable[[str], str],
    ) -> None:
        self.client, self.experiment = client, experiment
        self._runs, self._found, self._kept, self._hide = runs, found, kept, hide

    def deliver(self, operations: list[Operation]) -> None:
        try:
            if operations[0]["kind"] == "metrics":
                self.metrics(operations)
            else:
                getattr(self, operations[0]["kind"])(operations[0])
        except Exception as error:
            told = meaning(error)
            if told is None:
                raise
            text = self._hide(brief(error))
            raise (Away(text) if told == "away" else Refused(text, stays=told == "denied")) from error

    def run_id(self, run: str) -> str:
        """The store's id of a run."""
        if run.startswith(QUEUED) and run not in self._runs and not self.find(run):
            raise Refused(f"the run {run} is not there", stays=False)
        return self._runs.get(run, run)

    def find(self, own: str) -> bool:
        """Whether the store has the run with our id, whichever machine gave it."""
        twins = self._twins(own)
        if twins:
            self._found(own, twins[0])
        return bool(twins)

    def _twins(self, own: str) -> list[str]:
        """The runs that carry our id, the oldest first."""
        found = self.client.search_runs(
            [self.experiment], f"tags.`{OWN_ID}` = '{own}'", order_by=["attributes.start_time ASC"], max_results=10
        )
        return [run.info.run_id for run in found]

    def run(self, operation: Operation) -> None:
        """A new run. An attempt whose answer was lost may have made it, or may have made it twice."""
        own, tags = operation["run"], dict(operation["tags"])
        if parent := operation.get("parent"):
            tags["mlflow.parentRunId"] = self.run_id(parent)
        twins = self._twins(own)
        if not twins:
            self.client.create_run(self.experiment, start_time=operation["time"], tags=tags | {OWN_ID: own})
            twins = self._twins(own)
        for twin in twins[1:]:
            self.client.delete_run(twin)
        self._found(own, twins[0])

    def resume(self, operation: Operation) -> None:
        self.client.update_run(self.run_id(operation["run"]), status="RUNNING")

    def end(self, operation: Operation) -> None:
        self.client.set_terminated(self.run_id(operation["run"]), operation["status"], operation["time"])

    def params(self, operation: Operation) -> None:
        """Those that are already there are left."""
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
        """Values [name, value, time, step] of any runs, in batches of at most 1,000 for each run."""
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
    """The first line of what an error came from; what a store says at length is a page, and not its reason."""
    chain = _chain(error)
    inner = [part for cause in reversed(chain) for part in (cause, *cause.args) if getattr(part, "strerror", None)]
    text = inner[0].strerror if inner else str(_within(chain[-1]))
    return in_a_line((text.splitlines() or [type(chain[-1]).__name__])[0], AT_LENGTH)


def _within(error: BaseException) -> BaseException:
    """The innermost of the errors that an error was given as its arguments, as urllib3 does it."""
    for part in error.args:
        if isinstance(part, BaseException):
            return _within(part)
    return error


def meaning(error: BaseException) -> str | None:
    """What an error of a call to the store means: "away" (try again later), "denied" (credentials, an address
    or a file that cannot be), "refused" (this very request), or None: it is not the store's, but this machine's or our own.
    """
    chain = _chain(error)
    names = {kind.__name__ for part in chain for kind in type(part).__mro__}
    if any(type(part) is sqlite3.DatabaseError for part in chain):  # a file that is damaged, or no database
        return "denied"
    if names & set(AMISS) or any("CERTIFICATE_VERIFY_FAILED" in str(part) for part in chain):
        return "denied"
    status = next((code for part in chain if (code := _status(part)) is not None), None)
    if status is not None:
        if status in CREDENTIALS:
            return "denied"
        return "away" if status in LATER or status >= 500 else "refused"
    if names & set(ABSENT) or "BotoCoreError" in names:
        return "away"
    if "MlflowException" in names:
        return _meaning_of_code(next(part for part in chain if hasattr(part, "error_code")))
    return "away" if "DBAPIError" in names else None  # a database, when its address is first tried


def _meaning_of_code(error: Any) -> str:
    code, status = error.error_code, error.get_http_status_code()
    if status in CREDENTIALS:
        return "denied"
    if DATABASE.match(str(error)):  # which is not there, and which MLflow calls a bad request
        return "away"
    if code.endswith(("DOES_NOT_EXIST", "NOT_FOUND")):
        return "refused"
    return "away" if status in LATER or status >= 500 else "refused"


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error of requests or boto3, or of MLflow's about an answer that was none of its own."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        code = getattr(response, "status_code", None)
    if code is None and (told := re.search(r"failed with error code (\d{3}) !=", str(error))):
        code = int(told[1])
    return code if isinstance(code, int) else None


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain
