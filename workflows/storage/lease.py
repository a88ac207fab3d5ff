"""One holder at a time of something in an object store: a lease, renewed while its holder lives, which runs out when it doesn't."""

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
"""How long a lease lasts that is not renewed. The clocks of those who compete should differ by much less."""
WAITS = "MMDISTILL_LEASE_WAIT"
"""Set, as it is for jobs, a lease is waited for as long as nobody renews it: a job that follows one that was killed has no user to
try it again.
"""


@dataclass
class Lease:
    """An object that says who holds it until when. `lost` once another took it over, or may have, which a holder must look at."""

    uri: str
    what: str
    seconds: float = SECONDS
    holder: str = field(default_factory=lambda: f"{socket.gethostname()}, process {os.getpid()}")
    taken: bool = False
    _id: str = ""
    _tag: str = ""
    _until: float = 0.0

    @contextmanager
    def held(self) -> Iterator[Lease]:
        """Raises UserError while another holds it."""
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
            if not self.taken:
                self._release()

    @property
    def lost(self) -> bool:
        """By the clock that others judge by: a put may have taken long, and a machine that slept has not renewed anything."""
        return self.taken or time.time() > self._until

    def _body(self, until: float) -> bytes:
        return json.dumps({"id": self._id, "holder": self.holder, "until": until}).encode()

    def _put(self, before: str | None) -> str | None:
        """The new tag, or None if another was faster. An answer that was lost on its way is no other."""
        until = time.time() + self.seconds
        tag = put_if(self.uri, self._body(until), before)
        if tag is None and (found := read_tagged(self.uri)) and (about := _about(found[0]))["id"] == self._id:
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
            if found is None:  # deleted in between, by hand
                continue
            about, tag = _about(found[0]), found[1]
            left, holder = about["until"] - time.time(), about["holder"]
            if left > 0 and waits and about["until"] == (first := first or about["until"]):
                time.sleep(min(left, 1.0))  # not renewed so far: it may be of a run that was killed
                tries = 5
                continue
            if left > 0:
                raise UserError(
                    f"{self.what}: {shown(self.uri.rpartition('/')[0])} is in use by another run ({holder})",
                    hint=f"wait for it to end; if it was killed, its hold runs out in {left:.0f} s",
                )
            if new := self._put(tag):
                return new
        raise UserError(f"{self.what}: {shown(self.uri.rpartition('/')[0])} is wanted by many runs at once")

    def _renew(self, stop: threading.Event) -> None:
        while not stop.wait(self.seconds / 4):
            try:
                tag = self._put(self._tag)
            except (UserError, OSError):
                continue  # away for now
            if tag is None:
                self.taken = True
                return
            self._tag = tag

    def _release(self) -> None:
        """Leaves it run out, if it is still this one: no store but a few deletes an object on the condition that it is."""
        with suppress(UserError, OSError):  # then it runs out
            put_if(self.uri, self._body(0), self._tag)


def _about(body: bytes) -> dict[str, Any]:
    """What a holder wrote; what is not readable has run out."""
    try:
        about = json.loads(body)
        return {"id": str(about["id"]), "holder": str(about["holder"]), "until": float(about["until"])}
    except (ValueError, KeyError, TypeError):
        return {"id": "", "holder": "unknown", "until": 0.0}
