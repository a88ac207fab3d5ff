"""SIGTERM, SIGHUP (a terminal that is gone, as of a lost ssh) and Ctrl-C: the first asks trainings for a checkpoint and ends the
run when they have written it, the second ends it.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


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
        if number == signal.SIGHUP:
            _let_go_of_a_lost_terminal()
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
        if handler is not signal.SIG_IGN:  # as of a command in the background, or of nohup
            signal.signal(number, stopping._heard)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def heard_later() -> Iterator[None]:
    """A signal that comes within the block is heard at its end: for what must not be cut in the middle, and does not take long."""
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, frame: heard.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for one in heard[:1]:
            signal.raise_signal(one)


@contextmanager
def hangups_kept_from_children() -> Iterator[None]:
    """What is started within the block does not hear SIGHUP: a terminal that is lost tells all processes, and a training's workers
    have a checkpoint to write.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _let_go_of_a_lost_terminal() -> None:
    """What is written to it would be an error from now on, and end the run before its checkpoint."""
    for stream in (0, 1, 2):
        try:
            lost = stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream)
        except OSError:
            continue
        if lost:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, stream)
            os.close(nowhere)
