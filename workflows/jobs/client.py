"""Client of the jobs API of a Ray head: HTTP with Ray's token. Only this file uses ray.job_submission."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workflows.errors import UserError, expanded, home
from workflows.private.ray import job_client
from workflows.storage.uri import shown

SECONDS = (5.0, 60.0)
"""Connect and read timeouts. Ray's own client has none."""
HEARTBEAT = 20.0
"""Seconds between pings while a log is followed. They tell a dead connection from a silent job."""
PATIENCE = 300.0
"""Seconds for which the head may be unreachable while a log is followed."""
NAME = "mmdistill"
"""Metadata key with the name that the job was submitted under."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Variable in the job's environment: the seconds that Ray waits between SIGTERM and SIGKILL. Ray's default is 3."""


class Unreachable(UserError):
    """The head does not answer now. A retry may succeed."""


@dataclass(frozen=True)
class Job:
    """A submitted job as its head describes it. Times are in seconds since 1970. `exit_code` is None until the command exits."""

    id: str
    status: str
    entrypoint: str
    message: str
    exit_code: int | None
    began: float | None
    over: float | None
    metadata: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def seconds(self) -> float:
        return (self.over or time.time()) - (self.began or time.time())

    @property
    def code(self) -> int:
        """The exit code as a shell reports it: 128 + N after signal N. A job that was stopped counts as ended by SIGTERM."""
        if self.status == "SUCCEEDED":
            return 0
        if self.exit_code is None:
            return 143 if self.status == "STOPPED" else 1
        return 128 - self.exit_code if self.exit_code < 0 else self.exit_code


def address_of(given: str | None) -> str:
    """The URL of the dashboard: `given`, RAY_API_SERVER_ADDRESS, or RAY_ADDRESS if that is an HTTP URL.

    Raises UserError if there is none, or if it is no HTTP URL.
    """
    ray = os.environ.get("RAY_ADDRESS", "")
    url = given or os.environ.get("RAY_API_SERVER_ADDRESS") or (ray if ray.startswith(("http://", "https://")) else "")
    if not url:
        raise UserError(
            "--address: no head is named", hint="give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS"
        )
    if "://" not in url:
        url = f"http://{url}"
    if not re.fullmatch(r"https?://[^/@\s]+(/[^\s@]*)?", url):
        raise UserError(f"--address: {shown(url)!r} should read http://HEAD:8265, the address of Ray's dashboard")
    return url.rstrip("/")


def token() -> tuple[str | None, str]:
    """Ray's token (None: there is none) and where it came from. Looks in the same places as Ray.

    Raises UserError if the token file can't be read.
    """
    env = os.environ
    if env.get("RAY_AUTH_MODE") == "disabled":
        return None, "RAY_AUTH_MODE=disabled"
    if given := env.get("RAY_AUTH_TOKEN", "").strip():
        return given, "RAY_AUTH_TOKEN"
    named = env.get("RAY_AUTH_TOKEN_PATH")
    path = expanded(named) if named else home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip() or None, str(path)
    except FileNotFoundError:
        if named:
            raise UserError(f"RAY_AUTH_TOKEN_PATH: there is no file {named}") from None
        return None, str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: Ray's token can't be read: {getattr(error, 'strerror', 'no text')}") from None


class Head:
    """The jobs of the cluster whose dashboard is at `address`.

    Methods raise UserError if nothing answers there, the token is refused, or the job does not exist.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address_of(address)
        self._token, self._place = token()
        self._headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.ERROR)
        with self._translated_errors():
            self._client = job_client(self.address, self._headers, seconds=SECONDS)

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError
        from requests import JSONDecodeError, RequestException

        try:
            yield
        except AuthenticationError:
            raise self._token_error() from None
        except (JSONDecodeError, KeyError, TypeError):
            raise _no_dashboard(self.address) from None
        except (RequestException, ConnectionError) as error:
            if (response := getattr(error, "response", None)) is not None and response.status_code < 500:
                raise _no_dashboard(self.address) from None
            raise Unreachable(
                f"head: nothing answers at {self.address}",
                hint="check --address, and the tunnel if you use one: ssh -L 8265:127.0.0.1:8265 HEAD",
            ) from None
        except RuntimeError as error:
            if isinstance(error, UserError):
                raise
            if str(error).startswith("Version check returned 404"):
                raise _no_dashboard(self.address) from None
            lines = re.sub(r"^Request failed with status code \d+: ", "", str(error)).strip().splitlines()
            raise UserError(f"head: {shown(lines[-1] if lines else 'it refused the request')[:300]}") from None

    def _token_error(self) -> UserError:
        why = "refuses the token of" if self._token else "wants Ray's token, and there is none in"
        return UserError(
            f"head: {self.address} {why} {self._place}",
            hint="set RAY_AUTH_TOKEN_PATH to a file with the token that the cluster was started with",
        )

    def needs_no_token(self) -> bool:
        """Whether the head accepts requests without a token. Then anyone who reaches it can run code on the cluster."""
        import requests

        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.address}/api/version", timeout=SECONDS).status_code == 200
        return False

    def jobs(self) -> list[Job]:
        """All submitted jobs, oldest first."""
        with self._translated_errors():
            jobs = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(jobs, key=lambda job: job.began or 0)

    def job(self, name: str) -> Job:
        with self._translated_errors():
            return _job(self._client.get_job_info(name))

    def attempts(self, name: str) -> list[Job]:
        """All attempts of a job: NAME, NAME-2, NAME-3, ..., in this order.

        A job with another name may look like an attempt, so the name in the metadata decides.
        """
        named = [job for job in self.jobs() if job.id == name or job.metadata.get(NAME) == name]
        return sorted((job for job in named if attempt_of(job.id, name)), key=lambda job: attempt_of(job.id, name))

    def newest(self, name: str) -> Job:
        """The last attempt of a job. NAME-1 names the first attempt. Raises UserError if there is no such job."""
        attempts = self.attempts(name) or self.attempts(name.removesuffix("-1"))[:1]
        if not attempts:
            raise UserError(
                f"{name}: the head at {self.address} knows no such job", hint="mmdistill jobs list shows those it knows"
            )
        return attempts[-1]

    def submit(
        self, name: str, *, entrypoint: str, folder: Path | None, env: dict[str, str], metadata: dict[str, str]
    ) -> bool:
        """Starts `entrypoint` in a copy of `folder`. Returns False if a job of this name exists already."""
        runtime: dict[str, Any] = {"env_vars": env} | ({"working_dir": str(folder)} if folder else {})
        with self._translated_errors():
            try:
                self._client.submit_job(
                    entrypoint=entrypoint, submission_id=name, runtime_env=runtime, metadata=metadata
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                return False
        return True

    def stop(self, name: str) -> bool:
        """Asks a job to end: SIGTERM, then SIGKILL after the seconds in its STOP_WAIT. Returns False if it had ended already."""
        with self._translated_errors():
            return bool(self._client.stop_job(name))

    def log(self, name: str) -> str:
        with self._translated_errors():
            return str(self._client.get_job_logs(name))

    def follow(self, name: str, show: Callable[[str], None], say: Callable[[str], None]) -> Job:
        """Passes the job's log to `show` as it grows. Returns the job when it has ended.

        Reconnects if the connection drops, and shows no text twice. `say` gets messages about lost and restored connections.
        Raises Unreachable if the head does not answer for PATIENCE seconds.
        """
        printed = received = 0  # characters shown, and characters that came over this connection
        last_answer, pause, away = time.monotonic(), 1.0, False

        def receive(text: str) -> None:
            nonlocal printed, received, pause, away
            if away:
                say("the head answers again")
            received, away = received + len(text), False
            if received > printed:
                show(text[len(text) - (received - printed) :])
                printed, pause = received, 1.0

        while True:
            received = 0
            complete = asyncio.run(self._tail(name, receive))
            try:
                job, last_answer = self.job(name), time.monotonic()
                if not complete:  # cut off, or a proxy that lets no websocket through
                    received = 0
                    receive(self.log(name))
                if job.ended:
                    return job
            except Unreachable as error:
                if time.monotonic() - last_answer > PATIENCE:
                    raise Unreachable(
                        f"head: it has not answered at {self.address} for {PATIENCE:.0f} s; the job may still be running",
                        hint=f"to follow it again: mmdistill jobs logs {name} --follow --address {self.address}",
                    ) from error
                if not away:
                    say(f"the head at {self.address} does not answer; trying again")
                away = True
            time.sleep(pause)
            pause = min(2 * pause, 15.0)

    async def _tail(self, name: str, receive: Callable[[str], None]) -> bool:
        """Passes the log from its beginning to `receive`. Returns False if the connection drops before the end of the log."""
        import aiohttp

        url = f"{self.address}/api/jobs/{name}/logs/tail"
        session = aiohttp.ClientSession(headers=self._headers, trust_env=True)
        try:
            async with session, session.ws_connect(url, heartbeat=HEARTBEAT) as socket:
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        receive(message.data)
                return socket.close_code == aiohttp.WSCloseCode.OK
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return False


def attempt_of(job_id: str, name: str) -> int:
    """The number of an attempt: 1 for NAME, n for NAME-n, 0 for another job."""
    if job_id == name:
        return 1
    found = re.fullmatch(re.escape(name) + r"-([1-9]\d*)", job_id)
    return int(found[1]) if found else 0


def _no_dashboard(address: str) -> UserError:
    return UserError(
        f"head: what answers at {address} is not Ray's dashboard",
        hint="the dashboard listens on port 8265 by default; RAY_ADDRESS (port 6379) is for drivers",
    )


def _job(details: Any) -> Job:
    env = (details.runtime_env or {}).get("env_vars") or {}
    return Job(
        id=details.submission_id or details.job_id,
        status=str(getattr(details.status, "value", details.status)),
        entrypoint=details.entrypoint,
        message=details.message or "",
        exit_code=details.driver_exit_code,
        began=details.start_time / 1000 if details.start_time else None,
        over=details.end_time / 1000 if details.end_time else None,
        metadata=details.metadata or {},
        env=env,
    )
