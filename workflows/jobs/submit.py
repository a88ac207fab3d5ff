"""submit: a stage's command as a job of a cluster, once: submitted again it is joined, or goes on from the workspace."""

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

from workflows.config.schema import ConfigError, RunConfig, digest, exists, sendable
from workflows.errors import UserError
from workflows.jobs.client import NAME, STOP_WAIT, Head, Job, attempt_of
from workflows.jobs.package import PACKAGES, checkout, working_directory
from workflows.rendering.screen import Screen, clock
from workflows.storage.lease import WAITS
from workflows.storage.s3 import told
from workflows.storage.uri import check_name, is_remote, secrets, shown
from workflows.storage.workspace import code_version, git_commit

STAGES = ("run", "prepare", "sweep", "ablate", "bench")
PLACES = {"workspace", "source", "dest", "place", "out", "page", "latents", "text_encoder", "extractor_weights"}
"""Parameters that say where something is or goes: on a cluster, a place that all of its machines see."""
FILES = {"out", "page"}
"""Those of them that are written as files, and can't be in an object store."""
FIELDS = (("data", "path"), ("data", "extractor_weights"), ("evaluate", "reference"))
"""The same, of a configuration."""
SHARED = "an absolute path that all machines see"
OF_CONFIG = {"recipe", "set_", "smoke"}
SHOWN_ONLY = {"as_json", "debug", "tracking_wait"}
"""Parameters that make no other job."""
SENT = {".yaml", ".yml", ".json", ".csv"}
LARGEST = 2**20
COMMAND, CODE = "mmdistill.command", "mmdistill.code"
"""Of a job's metadata, beside its NAME: what tells its command from another, and the version of its code."""
TRACKING = "MLFLOW_TRACKING_URI"
STOP_SECONDS = "120"
"""A stop waits so long for the checkpoint; after it comes the kill."""
SECRET = re.compile(r"SECRET|PASSW|PASSPHRASE|CREDENTIAL|PRIVATE|(TOKEN|KEY|PASS|PWD)S?(_|$)", re.IGNORECASE)
GIVE = "whoever sees the cluster could read it; give it to the nodes themselves: docs/jobs.md"


@dataclass(frozen=True)
class Given:
    """A parameter of a stage as it was given: its name, the option's, its values as text, and as words of a command line."""

    name: str
    option: str
    values: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Submission:
    """What a head is asked to run. `name` is the same for the same command and configuration; `files`: sent beside the source."""

    name: str
    command: str
    entrypoint: str
    env: dict[str, str]
    files: dict[str, bytes] = field(default_factory=dict)


def given_of(command: Any, context: Any) -> list[Given]:
    """The parameters of a parsed command that were given, by the command line or the environment, and those that name places."""
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
        found.append(Given(parameter.name, option, values, tuple(words)))
    return found


def compose(
    stage: str, given: list[Given], config: RunConfig | None, *, env: Iterable[str] = (), name: str | None = None
) -> Submission:
    """The job of a command. Raises ConfigError for a place that the cluster can't see, and for what would show a secret."""
    _check_places(given, config)
    files: dict[str, bytes] = {}
    words, own = ["python", "-m", "workflows", stage], []
    # Options first: an argument may be a list.
    for part in sorted(given, key=lambda part: not part.option.startswith("-")):
        sent = [_sent(part.name, word, files) if part.name not in PLACES else word for word in part.words]
        words += sent
        if part.name not in SHOWN_ONLY and not (config and part.name in OF_CONFIG):
            own.append(sent)
    for word in words:
        if secrets(word):
            raise ConfigError(f"{stage}: there is a password in an address; {GIVE}")
    of = re.sub(r"[^A-Za-z0-9_.]+", "-", config.recipe) if config else ""
    made = "-".join(part for part in (stage, of, digest([own, config and config.model_dump(mode="json")])) if part)
    return Submission(_checked_name(name) if name else made, made, shlex.join(words), environment(env), files)


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigError(f"--id: {name!r} should be of letters, digits, '_', '-' and '.'")
    return name


def _check_places(given: list[Given], config: RunConfig | None) -> None:
    for part in given:
        for value in part.values if part.name in PLACES else ():
            remote = is_remote(value) and part.name not in FILES
            if part.name == "workspace":
                check_name("workspace", value)
            if not remote and not value.removeprefix("file://").startswith("/"):
                kinds = SHARED if part.name in FILES else f"s3://BUCKET/PREFIX, or {SHARED}"
                option = part.option if part.option.startswith("-") else part.name.upper()
                raise ConfigError(f"{option}: {value} is a place on this machine; for a cluster give {kinds}")
        if part.name == "tracking_uri" and re.match(r"sqlite:///(?!/)", part.values[0]):
            raise ConfigError(
                f"--tracking-uri: {part.values[0]} is a file on this machine; for a cluster give a server's"
            )
    for section, name in FIELDS if config else ():
        value = str(getattr(getattr(config, section), name) or "/")
        if not is_remote(value) and not value.startswith("/"):
            raise ConfigError(f"{section}.{name}: {value} is a place on this machine; for a cluster give {SHARED}")


def _sent(parameter: str, word: str, files: dict[str, bytes]) -> str:
    """A word that is a small file here (a recipe with those that it extends, a space, labels) as the file's name in the job's
    folder.
    """
    path = Path(word)
    if path.suffix not in SENT or not exists(path):
        return word
    content, size = b"", path.stat().st_size
    if size <= LARGEST:
        content = sendable(word) if parameter == "recipe" else path.read_bytes()
    if (size := max(size, len(content))) > LARGEST:
        raise ConfigError(f"{word}: {size / 2**20:.1f} MiB are too much to send along; for a cluster give {SHARED}")
    name = f"given/{hashlib.sha256(content).hexdigest()[:8]}/{path.name}"
    files[name] = content
    return name


def environment(names: Iterable[str]) -> dict[str, str]:
    """What a job's processes find in their environment: how the object store is reached, and the variables that are named.

    Raises ConfigError for one that is not set, and for a secret: Ray shows all of it to whoever may list the jobs.
    """
    # The cache is this machine's own.
    env = {name: value for name, value in told().items() if name != "MMDISTILL_CACHE"}
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(
                "--env: it takes the name of a variable that is set here, as in --env MLFLOW_TRACKING_URI"
            )
        if SECRET.search(name):
            raise ConfigError(f"--env {name}: it looks like a secret; {GIVE}")
        if name not in os.environ:
            raise ConfigError(f"--env {name}: it is not set here")
        env[name] = os.environ[name]
    for name, value in env.items():
        if secrets(value):
            raise ConfigError(f"--env {name}: there is a password in it; {GIVE}")
    # The driver tells its workers the same variables, which Ray takes for a conflict unless it is told not to.
    ours = {STOP_WAIT: STOP_SECONDS, WAITS: "1", "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1", "MMDISTILL_COMMIT": git_commit()}
    return ours | env


def submit(head: Head, job: Submission, screen: Screen) -> str:
    """Starts the job, or finds that it runs; returns the id of the attempt that runs now."""
    if head.takes_anyone():
        screen.line(
            f"[yellow]![/] the head at {escape(head.address)} asks for no token: whoever reaches it runs what they like "
            "(RAY_AUTH_MODE=token where it is started)"
        )
    if os.environ.get(TRACKING) and TRACKING not in job.env and "--tracking-uri" not in job.entrypoint:
        screen.line(f"[yellow]![/] {TRACKING} is set here, and not passed on: --env {TRACKING} would do it")
    code, taken = code_version(*PACKAGES), 0
    with working_directory(job.files) as folder:
        while True:
            attempts = head.attempts(job.name)
            if attempts and not attempts[-1].ended:
                return _joined(job, attempts[-1], code, screen)
            n = max(taken, attempt_of(attempts[-1].id, job.name) if attempts else 0) + 1
            name = job.name if n == 1 else f"{job.name}-{n}"
            if head.submit(
                name,
                entrypoint=job.entrypoint,
                folder=folder,
                env=job.env,
                metadata={NAME: job.name, COMMAND: job.command, CODE: code if checkout() else ""},
            ):
                again = f"  [dim]attempt {n}: goes on from what the workspace has[/]" if n > 1 else ""
                screen.line(f"[green]submitted[/] [bold]{name}[/]{again}")
                return name
            taken = n  # by another submitter, who was faster and is joined; or by a job of another name


def _joined(wanted: Submission, job: Job, code: str, screen: Screen) -> str:
    if job.metadata.get(COMMAND, wanted.command) != wanted.command:
        raise UserError(
            f"--id {wanted.name}: under this name another command runs: {shown(job.entrypoint)}",
            hint=f"give another name, or: mmdistill jobs stop {job.id}",
        )
    screen.line(f"[green]joined[/] [bold]{job.id}[/], which runs already ({job.status.lower()}, {clock(job.seconds)})")
    if job.metadata.get(CODE, "") not in ("", code):
        screen.line(f"[yellow]![/] it runs other code than there is here; to run this: mmdistill jobs stop {job.id}")
    return job.id


LACKING = re.compile(
    r"^(?:\S*python\S*: |ModuleNotFoundError: )No module named '?([A-Za-z0-9_]+)[^\n]*\Z", re.MULTILINE
)
"""As the last line of a log."""


def explained(job: Job, log: str) -> UserError | None:
    """Why a job has failed, where its head lacks something; None for errors of its own, which stand in its log."""
    install = (
        "run the pinned image, or install mmdistill there with infra/constraints.txt before `ray start`: docs/jobs.md"
    )
    if found := LACKING.search(log.rstrip()) or LACKING.search(job.message.rstrip()):
        return UserError(f"job {job.id}: the head's Python has no package {found[1]}", hint=install)
    if re.search(r"python: (command )?not found", log[-20_000:] + job.message):
        return UserError(
            f"job {job.id}: the head has no `python`",
            hint="activate its environment in the shell that runs `ray start`",
        )
    if job.exit_code is None and job.status == "FAILED":
        said = [line for line in job.message.splitlines() if line.strip()] or ["it did not start"]
        return UserError(
            f"job {job.id}: {said[0][:300]}", hint="submitted again, it goes on from what the workspace has"
        )
    return None
