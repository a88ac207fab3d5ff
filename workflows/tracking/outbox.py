"""Outbox: a journal on disk of operations to send, and a thread that sends them in order, however long the receiver is away.

<folder>/
    journal.jsonl      one line per operation: {"n": 17, "kind": ..., ...}
    delivered.json     {"n": 16}: operations up to this one have arrived
    files/<token>/     copies of the files that operations carry
    refused.jsonl      operations that the receiver refused, with the reason

`put` writes a line and returns: a killed process loses nothing that was put. The thread syncs the journal to the disk before each
delivery: a power loss loses what was put since. An operation may be delivered twice (if its answer, or the note of its arrival, was
lost), so `deliver` has to be idempotent. Only one process at a time may use an outbox.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from workflows.storage.local import read_json, write_json

Operation = dict[str, Any]
JOURNAL, DELIVERED, REFUSED, FILES = "journal.jsonl", "delivered.json", "refused.jsonl", "files"
BATCHED, MOST = "metrics", 1000
"""Consecutive operations of this kind are delivered together, up to that many values."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 10.0
"""Seconds between tries while the receiver is away, doubled after each."""
COMPACT = 2**20
"""A journal that was delivered as a whole is emptied if it is larger than that many bytes."""


class Away(Exception):
    """The receiver does not answer: try again later."""


class Refused(Exception):
    """The receiver refused. `stays`: it would refuse everything, as with wrong credentials, so what is queued stays queued."""

    def __init__(self, reason: str, *, stays: bool) -> None:
        super().__init__(reason)
        self.stays = stays


class Outbox:
    """`deliver` takes operations in order, and raises Away or Refused; `say` shows a line.

    An error of the delivery, other than Away, is raised by the next `put` or `wait` and all later ones; `put` writes its
    operation first. If the receiver refuses what an earlier process left, the operation is set aside, and a line says so.
    """

    def __init__(
        self, folder: Path, deliver: Callable[[list[Operation]], None], *, name: str, say: Callable[[str], None]
    ) -> None:
        self.folder, self._deliver, self._name, self._say = folder, deliver, name, say
        (folder / FILES).mkdir(parents=True, exist_ok=True)
        (folder / REFUSED).touch()
        self._journal = os.open(folder / JOURNAL, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._changed = threading.Condition()
        self.away: str | None = None
        """Why the receiver does not answer; None while it does."""
        self.refused = 0
        """How many operations were set aside."""
        self._error: Exception | None = None
        self._outage = self._halted = self._closed = self._abandoned = False
        self._singly = 0
        self._open()
        self._inherited = self._written
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    # The journal

    def _open(self) -> None:
        """Continues where an earlier process stopped: cuts off half a line at the end, removes files that no operation needs."""
        self._delivered = self._written = _delivered(self.folder)
        self._at = self._end = 0
        kept = {row.get("token") for row in _rows(self.folder / REFUSED)}
        with (self.folder / JOURNAL).open("rb") as journal:
            for line in journal:
                if not line.endswith(b"\n"):
                    break
                self._end += len(line)
                operation = _parsed(line)
                if operation is not None and operation["n"] > self._delivered:
                    self._written = operation["n"]
                    kept.add(operation.get("token"))
                elif self._written == self._delivered:
                    self._at = self._end
        os.ftruncate(self._journal, self._end)
        for folder in (self.folder / FILES).iterdir():
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def keep(self, path: Path) -> dict[str, str]:
        """Copies a file or folder as it is now, synced to disk. Returns what an operation needs to carry it: {"token", "file"}."""
        token = uuid.uuid4().hex
        copy = self.folder / FILES / token / path.name
        copy.parent.mkdir()
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            shutil.copyfile(path, copy)
        for part in (copy, *copy.rglob("*"), copy.parent, copy.parent.parent):
            _to_disk(part)
        return {"token": token, "file": path.name}

    def kept(self, operation: Operation) -> Path:
        """The copy that `keep` made."""
        return self.folder / FILES / operation["token"] / operation["file"]

    def put(self, operation: Operation) -> int:
        """Queues the operation and returns its number. Raises OSError if the disk is full, and the delivery's error if any."""
        with self._changed:
            number = self._written + 1
            line = (json.dumps({"n": number} | operation) + "\n").encode()
            try:
                done = os.write(self._journal, line)
                while done < len(line):
                    done += os.write(self._journal, line[done:])
            except OSError:
                os.ftruncate(self._journal, self._end)  # leave no half line before the next one
                raise
            self._written, self._end = number, self._end + len(line)
            self._changed.notify_all()
            if self._error:
                raise self._error
        return number

    def holds(self, **fields: Any) -> bool:
        """Whether an operation with these fields is queued."""
        rows = [row for row in _rows(self.folder / JOURNAL) if row["n"] > self._delivered]
        return any(all(row.get(name) == value for name, value in fields.items()) for row in rows)

    @property
    def pending(self) -> int:
        return self._written - self._delivered

    def wait(self, number: int | None = None, *, seconds: float, patient: bool = True) -> bool:
        """Waits at most `seconds` until operation `number`, or every one, is delivered. Returns whether it is.
        Unless `patient`, it does not wait while the receiver is away. Raises the delivery's error.
        """
        with self._changed:
            goal = self._written if number is None else number

            def over() -> bool:
                return self._delivered >= goal or self._error is not None or (self.away is not None and not patient)

            self._changed.wait_for(over, seconds)
            if self._error:
                raise self._error
            return self._delivered >= goal

    def close(self) -> None:
        """Stops the thread, or leaves it to finish its last call. What was not delivered stays in the journal."""
        if self._closed:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(2)
        with self._changed:
            self._compact(0)
            self._abandoned = True
        if not self._thread.is_alive():
            os.close(self._journal)

    # The delivery

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # of the delivery, or of writing files or showing lines
            self._fail(error, halt=True)

    def _work(self) -> None:
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._at < self._end and not self._halted))
                if self._closed:
                    return
            operations: list[Operation] = []
            try:
                operations, after = self._next()
                if operations:
                    self._check_copy(operations[0])
                    self._deliver(operations)
                self._mark_delivered(operations, after)
                pause = FIRST_PAUSE
            except Away as reason:
                self._note_outage(str(reason))
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            except Refused as refusal:
                if len(operations) > 1:
                    self._singly = len(operations)  # to find out which of them is refused
                elif refusal.stays:
                    self._fail(refusal, halt=True)
                else:
                    self._set_aside(operations[0], refusal)
                    self._mark_delivered(operations, after, files=False)

    def _next(self) -> tuple[list[Operation], int]:
        """The operations to deliver together, and the journal's offset after them."""
        with self._changed:
            at, end = self._at, self._end
        os.fsync(self._journal)
        operations: list[Operation] = []
        values = 0
        with (self.folder / JOURNAL).open("rb") as journal:
            journal.seek(at)
            while at < end:
                line = journal.readline()
                operation = _parsed(line)
                if operation is not None:
                    batched = operation["kind"] == BATCHED and not self._singly
                    values += len(operation["values"]) if batched else MOST
                    if operations and values > MOST:
                        break
                    operations.append(operation)
                at += len(line)
                if values >= MOST:
                    break
        return operations, at

    def _check_copy(self, operation: Operation) -> None:
        """Raises Refused for an operation whose file was lost: it would block all others for ever."""
        if "token" in operation and not self.kept(operation).exists():
            raise Refused(f"the copy of {operation['file']} is gone", stays=False)

    def _mark_delivered(self, operations: list[Operation], after: int, *, files: bool = True) -> None:
        """Notes the arrival. With `files`, removes the copies that the operations carried."""
        with self._changed:
            if self._abandoned:
                return  # another outbox may have the journal by now; a second delivery is harmless
            self._at, self.away = after, None
            if operations:
                self._delivered = operations[-1]["n"]
            if self._at == self._end:
                self._delivered = self._written
            self._singly = max(0, self._singly - len(operations))
            write_json(self.folder / DELIVERED, {"n": self._delivered})
            self._compact(COMPACT)
            back = self._outage and self._at == self._end
            self._outage = self._outage and not back
            self._changed.notify_all()
        for operation in operations if files else []:
            if "token" in operation:
                shutil.rmtree(self.folder / FILES / operation["token"], ignore_errors=True)
        if back:
            self._say(f"{self._name} answers again, and everything that was queued was delivered")

    def _compact(self, more_than: int) -> None:
        if self._at == self._end and self._end > more_than:
            os.ftruncate(self._journal, 0)
            self._at = self._end = 0

    def _note_outage(self, reason: str) -> None:
        with self._changed:
            first, self._outage, self.away = not self._outage, True, reason
            self._changed.notify_all()
        if first:
            self._say(f"{self._name} does not answer ({reason}): the run continues, what it logs is queued on disk")

    def _set_aside(self, operation: Operation, refusal: Refused) -> None:
        with (self.folder / REFUSED).open("a") as file:
            file.write(json.dumps(operation | {"refused": str(refusal)}) + "\n")
        self.refused += 1
        if operation["n"] > self._inherited:
            self._fail(refusal, halt=False)
        else:
            self._say(
                f"{self._name} refused what an earlier run had left: {refusal}; it is kept in {self.folder / REFUSED}"
            )

    def _fail(self, error: Exception, *, halt: bool) -> None:
        with self._changed:
            self._error, self._halted = error, self._halted or halt
            self._changed.notify_all()


def _to_disk(path: Path) -> None:
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)


def _rows(path: Path) -> Iterator[Operation]:
    with path.open("rb") as file:
        for line in file:
            if (operation := _parsed(line)) is not None:
                yield operation


def _parsed(line: bytes) -> Operation | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("n"), int) and "kind" in value else None


def queued(folder: Path) -> int:
    """How many operations are queued in an outbox that no process has open."""
    delivered = _delivered(folder)
    journal = folder / JOURNAL
    return sum(row["n"] > delivered for row in _rows(journal)) if journal.exists() else 0


def _delivered(folder: Path) -> int:
    return int((read_json(folder / DELIVERED) or {}).get("n", 0))
