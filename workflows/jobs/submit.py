"""The `submit` command: runs a stage as a job on a cluster.

The same command submitted again joins the running job. If the job has ended, a new attempt continues from the workspace.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape

from workflows.config.loading import exists, sendable
from workflows.config.places import local_places
from workflows.config.schema import RunConfig
from workflows.config.values import digest
from workflows.errors import ConfigError, UserError
from workflows.jobs.client import NAME, STOP_WAIT, Head, Job, attempt_of
from workflows.jobs.package import PACKAGES, checkout, working_directory
from workflows.rendering.screen import Screen, clock
from workflows.storage.code import code_version, git_commit
from workflows.storage.lease import WAITS
from workflows.storage.s3 import shared_environment
from workflows.storage.uri import check_name, is_remote, secrets, shown

STAGES = ("run", "prepare", "sweep", "ablate", "bench")
PLACES = {"workspace", "source", "dest", "place", "out", "page", "latents", "text_encoder", "extractor_weights"}
"""Parameters that name a path or URI. On a cluster all machines must be able to reach it."""
FILE_PLACES = {"out", "page"}
"""The places that are written as local files, so they can't be in an object store."""
SHARED = "an absolute path that all machines see"
CONFIG_PARAMETERS = {"recipe", "set_", "smoke"}
NOT_IN_ID = {"as_json", "debug", "tracking_wait"}
"""Parameters that don't change a job's id."""
SENT_SUFFIXES = {".yaml", ".yml", ".json", ".csv"}
LARGEST_SENT = 2**20
COMMAND, CODE = "mmdistill.command", "mmdistill.code"
"""Metadata keys of a job, besides NAME: the id of its command, and the version of its code."""
TRACKING = "MLFLOW_TRACKING_URI"
STOP_SECONDS = "120"
"""Seconds that a stop waits for the last checkpoint before the job is killed."""
SECRET = re.compile(r"SECRET|PASSW|PASSPHRASE|CREDENTIAL|PRIVATE|(TOKEN|KEY|PASS|PWD)S?(_|$)", re.IGNORECASE)
SECRET_HINT = "anyone who can list the jobs could read it; set it on the nodes instead: docs/jobs.md"


@dataclass(frozen=True)
class Parameter:
    """A parameter of a stage with its value: its name, its option, its values as text, and as words of a command line."""

    name: str
    option: str
    values: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Submission:
    """A job to submit. `command` is an id of the command and its configuration; `name` is the same unless --id names another.

    `files` are sent along with the source.
    """

    name: str
    command: str
    entrypoint: str
    env: dict[str, str]
    files: dict[str, bytes] = field(default_factory=dict)


def given_parameters(command: Any, context: Any) -> list[Parameter]:
    """The parameters of a parsed command that were set on the command line or in the environment, and all in PLACES."""
    found = []
    for parameter in command.params:
        value, source = context.params.get(parameter.name), context.get_parameter_source(parameter.name)
        is_default = getattr(source, "name", "DEFAULT") not in ("COMMANDLINE", "ENVIRONMENT")
        if value is None or value == () or (is_default and parameter.name not in PLACES):
            continue
        option, argument = parameter.opts[0], parameter.param_type_name == "argument"
        values = tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)
        if isinstance(value, bool):
            words = [option if value else parameter.secondary_opts[0]]
        else:
            words = [word for text in values for word in ([text] if argument else [option, text])]
        found.append(Parameter(parameter.name, option, values, tuple(words)))
    return found


def compose(
    stage: str, given: list[Parameter], config: RunConfig | None, *, env: Iterable[str] = (), name: str | None = None
) -> Submission:
    """The job of a command. Raises ConfigError for a path that the cluster can't reach, and for secrets that Ray would show."""
    _check_places(given, config)
    files: dict[str, bytes] = {}
    words, identifying = ["python", "-m", "workflows", stage], []
    # Options come first, because an argument may be a list.
    for part in sorted(given, key=lambda part: not part.option.startswith("-")):
        sent = [_attach(part.name, word, files) if part.name not in PLACES else word for word in part.words]
        words += sent
        if part.name not in NOT_IN_ID and not (config and part.name in CONFIG_PARAMETERS):
            identifying.append(sent)
    for word in words:
        if secrets(word):
            raise ConfigError(f"{stage}: there is a password in an address; {SECRET_HINT}")
    recipe = re.sub(r"[^A-Za-z0-9_.]+", "-", config.recipe) if config else ""
    key = digest([identifying, config and config.model_dump(mode="json")])
    command = "-".join(part for part in (stage, recipe, key) if part)
    if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigError(f"--id: {name!r} should be of letters, digits, '_', '-' and '.'")
    return Submission(name or command, command, shlex.join(words), environment(env), files)


def _check_places(given: list[Parameter], config: RunConfig | None) -> None:
    for part in given:
        for value in part.values if part.name in PLACES else ():
            remote = is_remote(value) and part.name not in FILE_PLACES
            if part.name == "workspace":
                check_name("workspace", value)
            if not remote and not value.removeprefix("file://").startswith("/"):
                kinds = SHARED if part.name in FILE_PLACES else f"s3://BUCKET/PREFIX, or {SHARED}"
                option = part.option if part.option.startswith("-") else part.name.upper()
                raise ConfigError(f"{option}: {value} is a place on this machine; for a cluster give {kinds}")
        if part.name == "tracking_uri" and re.match(r"sqlite:///(?!/)", part.values[0]):
            raise ConfigError(
                f"--tracking-uri: {part.values[0]} is a file on this machine; for a cluster give a server's address"
            )
    for field_, value in local_places(config).items() if config else ():
        if not value.startswith("/"):
            raise ConfigError(f"{field_}: {value} is a place on this machine; for a cluster give {SHARED}")


def _attach(parameter: str, word: str, files: dict[str, bytes]) -> str:
    """If `word` names a small local file (a recipe, a sweep space, labels), adds it to `files` and returns its path in the job's
    folder. A recipe is sent together with those that it extends. Other words are returned unchanged.
    """
    path = Path(word)
    if path.suffix not in SENT_SUFFIXES or not exists(path):
        return word
    content, size = b"", path.stat().st_size
    if size <= LARGEST_SENT:
        content = sendable(word) if parameter == "recipe" else path.read_bytes()
    if (size := max(size, len(content))) > LARGEST_SENT:
        raise ConfigError(f"{word}: {size / 2**20:.1f} MiB is too large to send along; for a cluster give {SHARED}")
    name = f"given/{hashlib.sha256(content).hexdigest()[:8]}/{path.name}"
    files[name] = content
    return name


def environment(names: Iterable[str]) -> dict[str, str]:
    """The environment variables of a job: how to reach the object store, and the variables in `names`.

    Raises ConfigError for a variable that is not set, and for a secret: Ray shows the environment to anyone who can list the jobs.
    """
    # The cache folder is specific to this machine.
    env = {name: value for name, value in shared_environment().items() if name != "MMDISTILL_CACHE"}
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(
                "--env: it takes the name of a variable that is set here, as in --env MLFLOW_TRACKING_URI"
            )
        if SECRET.search(name):
            raise ConfigError(f"--env {name}: it looks like a secret; {SECRET_HINT}")
        if name not in os.environ:
            raise ConfigError(f"--env {name}: it is not set here")
        env[name] = os.environ[name]
    for name, value in env.items():
        if secrets(value):
            raise ConfigError(f"--env {name}: there is a password in it; {SECRET_HINT}")
    # The driver passes the same variables to its workers. Ray calls that a conflict unless RAY_OVERRIDE_JOB_RUNTIME_ENV is set.
    defaults = {
        STOP_WAIT: STOP_SECONDS,
        WAITS: "1",
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
        "MMDISTILL_COMMIT": git_commit(),
    }
    return defaults | env


def submit(head: Head, job: Submission, screen: Screen) -> str:
    """Starts the job, or joins it if it is running. Returns the id of the running attempt.

    Raises UserError if another command is running under this name.
    """
    if head.needs_no_token():
        screen.line(
            f"[yellow]![/] the head at {escape(head.address)} accepts requests without a token: anyone who reaches it can run "
            "code there (start it with RAY_AUTH_MODE=token)"
        )
    if os.environ.get(TRACKING) and TRACKING not in job.env and "--tracking-uri" not in job.entrypoint:
        screen.line(f"[yellow]![/] {TRACKING} is set here, but not passed to the job: add --env {TRACKING}")
    code, last = code_version(*PACKAGES), 0
    with working_directory(job.files) as folder:
        while True:
            attempts = head.attempts(job.name)
            if attempts and not attempts[-1].ended:
                return _join(job, attempts[-1], code, screen)
            n = max(last, attempt_of(attempts[-1].id, job.name) if attempts else 0) + 1
            name = job.name if n == 1 else f"{job.name}-{n}"
            if head.submit(
                name,
                entrypoint=job.entrypoint,
                folder=folder,
                env=job.env,
                metadata={NAME: job.name, COMMAND: job.command, CODE: code if checkout() else ""},
            ):
                again = f"  [dim]attempt {n}: continues from the workspace[/]" if n > 1 else ""
                screen.line(f"[green]submitted[/] [bold]{name}[/]{again}")
                return name
            # Another submitter of this job took the name, and the next round joins it; or another job has this name.
            last = n


def _join(wanted: Submission, job: Job, code: str, screen: Screen) -> str:
    if job.metadata.get(COMMAND, wanted.command) != wanted.command:
        raise UserError(
            f"--id {wanted.name}: another command is running under this name: {shown(job.entrypoint)}",
            hint=f"give another name, or: mmdistill jobs stop {job.id}",
        )
    screen.line(
        f"[green]joined[/] [bold]{job.id}[/], which is already running ({job.status.lower()}, {clock(job.seconds)})"
    )
    if job.metadata.get(CODE, "") not in ("", code):
        screen.line(
            f"[yellow]![/] its code differs from the code here; to run this code, first: mmdistill jobs stop {job.id}"
        )
    return job.id


MISSING_PACKAGE = re.compile(
    r"^(?:\S*python\S*: |ModuleNotFoundError: )No module named '?([A-Za-z0-9_]+)[^\n]*\Z", re.MULTILINE
)
"""The last line of a log, if a package was missing."""


def explain_failure(job: Job, log: str) -> UserError | None:
    """Why a job failed, if its head lacks something that it needs. None for errors of the job itself, which are in its log."""
    install = (
        "run the pinned image, or install mmdistill there with infra/constraints.txt before `ray start`: docs/jobs.md"
    )
    if found := MISSING_PACKAGE.search(log.rstrip()) or MISSING_PACKAGE.search(job.message.rstrip()):
        return UserError(f"job {job.id}: the head's Python has no package {found[1]}", hint=install)
    if re.search(r"python: (command )?not found", log[-20_000:] + job.message):
        return UserError(
            f"job {job.id}: the head has no `python`",
            hint="activate its environment in the shell that runs `ray start`",
        )
    if job.exit_code is None and job.status == "FAILED":
        lines = [line for line in job.message.splitlines() if line.strip()] or ["it did not start"]
        return UserError(f"job {job.id}: {lines[0][:300]}", hint="submit it again: it continues from the workspace")
    return None
