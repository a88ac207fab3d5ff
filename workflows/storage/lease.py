"""A lease in an object store: one holder at a time. The holder renews it while it lives; if it dies, the lease expires."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from workflows.errors import UserError
from workflows.storage.store import put_if, read_tagged
from workflows.storage.uri import shown

SECONDS = 60.0
"""How long a lease lasts without renewal. The clocks of competing machines should differ by much less."""
WAITS = "MMDISTILL_LEASE_WAIT"
"""If set, as for jobs, a run waits for a lease that nobody renews. A job that follows a killed one has no user to retry it."""


@dataclass
class Lease:
    """An object that names its holder, and the time until which it is held. The holder must check `lost`: another run may have
    taken the lease over.
    """

    uri: str
    what: str
    seconds: float = SECONDS
    holder: str = field(default_factory=lambda: f"{socket.gethostname()}, process {os.getpid()}")
    taken_over: bool = False
    _id: str = ""
    _tag: str = ""
    _until: float = 0.0

    @contextmanager
    def held(self) -> Iterator[Lease]:
        """Holds the lease for the length of the block, renewing it in a thread. Raises UserError if another holds it."""
        self._id = uuid.uuid4().hex
        self._tag = self._take()
        stop = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(stop,), daemon=True)
        renewing.start()
        try:
            yield self
        finally:
            stop.set()
            renewing.join()
            if not self.taken_over:
                self._release()

    @property
    def lost(self) -> bool:
        """Whether others may hold it now, by the wall clock: a write may have taken long, and a sleeping machine renews nothing."""
        return self.taken_over or time.time() > self._until

    def _body(self, until: float) -> bytes:
        return json.dumps({"id": self._id, "holder": self.holder, "until": until}).encode()

    def _put(self, before: str | None) -> str | None:
        """The new etag, or None if another run was faster. If only the answer to our own write was lost, that write counts."""
        until = time.time() + self.seconds
        tag = put_if(self.uri, self._body(until), before)
        if tag is None and (found := read_tagged(self.uri)) and (about := _parsed(found[0]))["id"] == self._id:
            tag, until = found[1], about["until"]
        if tag is not None:
            self._until = until
        return tag

    def _take(self) -> str:
        tries, waits, first = 5, bool(os.environ.get(WAITS)), 0.0
        while tries:
            tries -= 1
            if tag := self._put(None):
                return tag
            found = read_tagged(self.uri)
            if found is None:  # somebody deleted it in between
                continue
            about, tag = _parsed(found[0]), found[1]
            left, holder = about["until"] - time.time(), about["holder"]
            if left > 0 and waits and about["until"] == (first := first or about["until"]):
                time.sleep(min(left, 1.0))  # not renewed so far: its run may have been killed
                tries = 5
                continue
            if left > 0:
                raise UserError(
                    f"{self.what}: {shown(self.uri.rpartition('/')[0])} is in use by another run ({holder})",
                    hint=f"wait for it to end; if it was killed, its lease runs out in {left:.0f} s",
                )
            if new := self._put(tag):
                return new
        raise UserError(f"{self.what}: many runs want {shown(self.uri.rpartition('/')[0])} at once")

    def _renew(self, stop: threading.Event) -> None:
        while not stop.wait(self.seconds / 4):
            try:
                tag = self._put(self._tag)
            except (UserError, OSError):
                continue  # the store is away: try again at the next interval
            if tag is None:
                self.taken_over = True
                return
            self._tag = tag

    def _release(self) -> None:
        """Marks the lease as expired, if it is still ours. Few stores could delete it on that condition."""
        with suppress(UserError, OSError):  # if this fails, it expires by itself
            put_if(self.uri, self._body(0), self._tag)


def _parsed(body: bytes) -> dict[str, Any]:
    """The values that a holder wrote. An unreadable body counts as expired."""
    try:
        about = json.loads(body)
        return {"id": str(about["id"]), "holder": str(about["holder"]), "until": float(about["until"])}
    except (ValueError, KeyError, TypeError):
        return {"id": "", "holder": "unknown", "until": 0.0}
