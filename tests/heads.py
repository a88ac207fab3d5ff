"""A head of Ray for tests: with a dashboard and token authentication, on the loopback, in a process that is known."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from stores import answers, free_port

TOKEN = "0123456789abcdef" * 2
WORDS = "--head --block --node-ip-address 127.0.0.1 --port 0 --min-worker-port 0 --max-worker-port 0 --num-cpus 2 "
WORDS += "--dashboard-host 127.0.0.1 --dashboard-agent-listen-port 0 --disable-usage-stats"


class RayHead:
    """`address` is its dashboard's, `folder` its sessions'; `environment` is that of a client."""

    def __init__(self, folder: str, port: int, environment: dict[str, str]) -> None:
        self.folder, self.address = Path(folder), f"http://127.0.0.1:{port}"
        self.environment = environment | {"RAY_API_SERVER_ADDRESS": self.address}

    def call(self, *words: str, timeout: float = 600, **more: str) -> subprocess.CompletedProcess[str]:
        """`mmdistill WORDS` as from another machine."""
        return subprocess.run(
            [sys.executable, "-m", "workflows", *words], env=self.environment | more, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip

    def begin(self, *words: str, **more: str) -> Shown:
        """The same, not waited for."""
        return Shown(
            subprocess.Popen(
                [sys.executable, "-m", "workflows", *words], env=self.environment | more, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, start_new_session=True,
            )
        )  # fmt: skip


class Shown:
    """A process and what it has said so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.out, self.err = process, "", ""
        self._readers = [threading.Thread(target=self._read, args=(n,), daemon=True) for n in ("stdout", "stderr")]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        for line in getattr(self.process, name):
            setattr(self, name[3:], getattr(self, name[3:]) + line)

    def until(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        """Waits for it on stdout or stderr."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.out) or re.search(pattern, self.err)):
            assert time.monotonic() < end, f"no {pattern!r} in:\n{self.out}\n{self.err}"
            assert self.process.poll() is None or self._alive(), f"ended without {pattern!r}:\n{self.out}\n{self.err}"
            time.sleep(0.1)
        return found

    def _alive(self) -> bool:
        return any(reader.is_alive() for reader in self._readers)

    def wait(self, seconds: float = 300) -> int:
        code = self.process.wait(timeout=seconds)
        for reader in self._readers:
            reader.join(10)
        return code


@contextmanager
def ray_head(scratch: Path, **more: str):
    """A RayHead with two CPUs. `more`: of its own environment, which jobs inherit, and clients do not."""
    token, port = scratch / "ray-token", free_port()
    token.write_text(TOKEN)
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "MLFLOW_TRACKING", "MMDISTILL"))}
    path = f"{os.path.dirname(sys.executable)}:{plain['PATH']}"
    plain |= {"RAY_AUTH_TOKEN_PATH": str(token), "PATH": path}
    client = plain | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # Ray's sockets need a short path
        process = subprocess.Popen(
            [*f"ray start {WORDS} --dashboard-port {port} --temp-dir {folder}".split()],
            env={k: v for k, v in plain.items() if k != "PYTHONPATH"} | {"RAY_AUTH_MODE": "token"} | more,
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            answers(f"http://127.0.0.1:{port}/api/version", 120)
            yield RayHead(folder, port, client)
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """Kills the head, and all that it started: a job's command has a session of its own."""
    for pid in (process.pid, *_below(process.pid)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(timeout=30)


def _below(pid: int) -> list[int]:
    """All processes that it started, and those that they did."""
    try:
        own = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return own + [below for child in own for below in _below(child)]
