"""SIGTERM and Ctrl-C: the first asks trainings for a checkpoint and ends the run when they have written it, the second ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """The run was asked to end; `number` of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Stopping:
    """Whether the run was asked to end. Outside of `waits` it ends at once, by Stopped in the main thread."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._waits = False

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Within the block the first signal is noted alone: the block looks at `asked`, and calls `end` when all is written."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    @property
    def asked(self) -> bool:
        return self.number is not None

    def end(self) -> None:
        """Raises Stopped if the run was asked to end."""
        if self.number is not None:
            raise Stopped(self.number)

    def _heard(self, number: int, frame: Any) -> None:
        again, self.number = self.asked, number
        if again or not self._waits:
            raise Stopped(number)


@contextmanager
def listening() -> Iterator[Stopping]:
    """Hears the signals for the length of the block; from a thread that is not the main one none can be heard."""
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as of a command in the background
            signal.signal(number, stopping._heard)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
