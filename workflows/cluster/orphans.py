"""What a Ray of our own leaves when its driver is killed: agents and workers that look only now and then whether it is still there.

A note beside Ray's sessions says that a process of this program is about to begin one; it goes when the session ends as it should.
The next run on this machine ends what is left of a session whose driver is dead, and of no other.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from workflows.storage.workspace import write_json

DATED = "%Y-%m-%d_%H-%M-%S_%f"
"""As in the names of Ray's sessions: session_<date>_<the driver's process>."""


@contextmanager
def noted(folder: Path) -> Iterator[None]:
    """Within the block this process begins a session below Ray's `folder`, and ends it."""
    path = _notes(folder) / f"{os.getpid()}.json"
    about = {
        "driver": os.getpid(),
        "born": born(os.getpid()),
        "since": datetime.now().strftime(DATED),
        "among": _among(),
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
    """Ends what is left of the sessions below Ray's folder that this program began and whose drivers are dead: how many
    processes that were.
    """
    ended = 0
    for path in sorted(_notes(folder).glob("*.json")):
        for session in _orphans(folder, path):
            for pid in processes_of(session):
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    ended += 1
    return ended


def _orphans(folder: Path, path: Path) -> Iterator[Path]:
    """The sessions that the note is about, if its process is gone; the note goes too. The process's number may be another's by now,
    or have been another's before.
    """
    try:
        about = json.loads(path.read_text())
        driver, since = int(about["driver"]), str(about["since"])
        if about["among"] != _among() or path.stat().st_uid != os.getuid() or born(driver) == about["born"]:
            return
    except (OSError, ValueError, KeyError, TypeError):
        return
    for session in folder.glob(f"session_*_{driver}"):
        if session.name.removeprefix("session_") >= since:
            yield session
    with suppress(OSError):
        path.unlink()


def _notes(folder: Path) -> Path:
    """This user's."""
    return folder / f"mmdistill-{os.getuid()}"


def _among() -> str:
    """Which processes are numbered together: those of this machine, or of a container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def born(pid: int) -> str | None:
    """When the process began, in ticks since the machine did; None if there is none, or if it is dead and only not buried yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def processes_of(session: Path) -> Iterator[int]:
    """Those of this user that have a log of the session open, as all of Ray's have."""
    logs = f"{session.resolve() / 'logs'}{os.sep}"
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.stat().st_uid == os.getuid() and any(_open(process, logs)):
                yield int(process.name)


def _open(process: Path, prefix: str) -> Iterator[bool]:
    for link in (process / "fd").iterdir():
        with suppress(OSError):
            yield os.readlink(link).startswith(prefix)
