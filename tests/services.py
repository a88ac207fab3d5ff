"""The real server stack for tests: PostgreSQL, MLflow, nginx and Ceph on free ports of 127.0.0.1, by infra/stack.sh.

Tests that ask for `stack` or `server` bear the marker `services`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INFRA = ROOT / "infra"
PORTS = ("port", "mlflow-port", "postgres-port", "s3-port", "mon-port")


def free_ports(number: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def clean_environment() -> dict[str, str]:
    """This process's, without what names a store or account."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "MMDISTILL_"))}


def command(script: str, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A script of infra/, to its end. What stays running doesn't hold the pipes: it writes to logs of its own."""
    return subprocess.run(
        [str(INFRA / script), *map(str, arguments)],
        env=clean_environment() | (env or {}),
        capture_output=True,
        text=True,
        timeout=900,
    )


class Server:
    """A stack of its own in a folder of its own. `script` is stack.sh, or mlflow/serve.sh with a bucket that is there."""

    def __init__(self, script: str = "stack.sh", *options: str, env: dict[str, str] | None = None) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="mmdistill-services-"))
        self.base.chmod(0o755)  # as root the services run as another user, which has to come here
        self.dir, self.script, self.env_before = self.base / "stack", script, env
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.options = [word for name, port in self.ports.items() for word in (f"--{name}", str(port))]
        self.options += ["--python", sys.executable, *options]

    def __call__(self, verb: str, *options: str) -> subprocess.CompletedProcess[str]:
        return command(self.script, verb, self.dir, *options, env=self.env_before)

    def start(self) -> None:
        """Raises AssertionError with what the script said, and the logs' ends."""
        done = self("start", *self.options)
        if done.returncode:
            logs = "".join(
                f"\n--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in self.dir.glob("log/*.log")
            )
            raise AssertionError(f"{done.stdout}{done.stderr}{logs}")

    def stop(self) -> None:
        done = self("stop")
        assert done.returncode == 0, done.stderr

    def remove(self) -> None:
        if (self.dir / "settings").exists():
            self.stop()
        shutil.rmtree(self.base)

    def environment(self) -> dict[str, str]:
        """What `env` prints: how clients reach the stack."""
        done = self("env")
        assert done.returncode == 0, done.stderr
        lines = [shlex.split(line) for line in done.stdout.splitlines()]
        return dict(words[1].split("=", 1) for words in lines)

    def pid(self, daemon: str) -> int:
        return int((self.dir / f"run/{daemon}.pid").read_text().split()[0])

    def secrets(self) -> list[str]:
        """Every password and key of the stack."""
        env = self.environment()
        files = [
            (self.dir / "secrets" / name).read_text().strip()
            for name in ("postgres", "mlflow-database", "mlflow-session")
        ]
        return [*files, env["MLFLOW_TRACKING_PASSWORD"], env["AWS_SECRET_ACCESS_KEY"]]


def running(group: int) -> list[int]:
    """The processes of a process group, but those that ended and wait for their parent to notice."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = path.read_text().rpartition(") ")[2].split()[:3]
        except OSError:
            continue
        if int(of) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


class CommandLines:
    """Collects the command lines of all processes while it is open, as any user of the machine can. Programs of `brief` may end
    between two looks: what runs with `env` meets a wrapper of each, which writes its command line down.
    """

    def __init__(self, *brief: str) -> None:
        self._wrappers = Path(tempfile.mkdtemp(prefix="mmdistill-wrappers-"))
        self._wrappers.chmod(0o755)
        self._lines = self._wrappers / "lines"
        self._lines.touch()
        self._lines.chmod(0o666)
        for name in brief:
            wrapper = self._wrappers / name
            wrapper.write_text(
                f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >>{self._lines}\nexec {shutil.which(name)} "$@"\n'
            )
            wrapper.chmod(0o755)
        self.env = {"PATH": f"{self._wrappers}:{os.environ['PATH']}"}

    def __enter__(self) -> CommandLines:
        self.seen: set[bytes] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seen.add(self._lines.read_bytes())
        shutil.rmtree(self._wrappers)

    def _watch(self) -> None:
        while not self._stop.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(path.read_bytes())
                except OSError:
                    continue
            time.sleep(0.02)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The stack that all tests of this process share. A test may stop it if it starts it again."""
    one = Server()
    try:
        with CommandLines("ceph-authtool", "radosgw-admin", "openssl") as lines:
            one.env_before = lines.env
            one.start()
        one.env_before = None
        one.lines = lines.seen  # type: ignore[attr-defined]
        yield one
    finally:
        one.remove()


@pytest.fixture(scope="session")
def stack(server: Server) -> dict[str, str]:
    """Its environment, for clients: MLFLOW_TRACKING_URI and so on, AWS_*, MMDISTILL_BUCKET."""
    return server.environment()


@pytest.fixture
def in_stack(stack: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The same, in this process's own environment."""
    for name, value in stack.items():
        monkeypatch.setenv(name, value)
    return stack
