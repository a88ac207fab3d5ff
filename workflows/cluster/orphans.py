"""Ends the Ray processes that a killed driver of this program leaves: agents and workers only check now and then whether it lives.

A process of this program writes a note next to Ray's sessions before it begins one, and removes the note when that ends normally.
The next run on this machine ends what is left of sessions whose driver is dead, and of no others.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from workflows.storage.local import write_json

DATED = "%Y-%m-%d_%H-%M-%S_%f"
"""The date in the names of Ray's sessions: session_<date>_<process id of the driver>."""


@contextmanager
def noted(folder: Path) -> Iterator[None]:
    """Keeps a note, for the length of the block, that this process has a session below Ray's `folder`."""
    path = _notes(folder) / f"{os.getpid()}.json"
    about = {
        "driver": os.getpid(),
        "born": born(os.getpid()),
        "since": datetime.now().strftime(DATED),
        "among": _pid_space(),
    }
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, about)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def end_orphans(folder: Path) -> int:
    """Kills the processes of sessions below `folder` that this program began and whose drivers are dead. Returns their number."""
    ended = 0
    for path in sorted(_notes(folder).glob("*.json")):
        for session in _orphans(folder, path):
            for pid in processes_of(session):
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    ended += 1
    return ended


def _orphans(folder: Path, path: Path) -> Iterator[Path]:
    """The sessions of a note whose process is gone. Removes the note. The process id may belong to another process by now, or
    have belonged to one before.
    """
    try:
        about = json.loads(path.read_text())
        driver, since = int(about["driver"]), str(about["since"])
        if about["among"] != _pid_space() or path.stat().st_uid != os.getuid() or born(driver) == about["born"]:
            return
    except (OSError, ValueError, KeyError, TypeError):
        return
    for session in folder.glob(f"session_*_{driver}"):
        if session.name.removeprefix("session_") >= since:
            yield session
    with suppress(OSError):
        path.unlink()


def _notes(folder: Path) -> Path:
    """The folder of this user's notes."""
    return folder / f"mmdistill-{os.getuid()}"


def _pid_space() -> str:
    """Identifies where a process id is valid: this boot of the machine, and this container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def born(pid: int) -> str | None:
    """When the process began, in clock ticks since boot; None if it does not exist or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def processes_of(session: Path) -> Iterator[int]:
    """This user's processes that have a log of the session open, as all of Ray's processes have."""
    logs = f"{session.resolve() / 'logs'}{os.sep}"
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.stat().st_uid == os.getuid() and any(_open(process, logs)):
                yield int(process.name)


def _open(process: Path, prefix: str) -> Iterator[bool]:
    for link in (process / "fd").iterdir():
        with suppress(OSError):
            yield os.readlink(link).startswith(prefix)
