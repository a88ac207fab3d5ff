"""Handles SIGTERM, SIGHUP (a lost terminal or ssh connection) and Ctrl-C. The first signal asks trainings for a checkpoint, and
ends the run when it is written. The second ends the run at once.
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
    """The run was asked to end, by signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Stopping:
    """Whether the run was asked to end. Outside of `waits`, a signal raises Stopped in the main thread at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._waits = False

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Within the block the first signal is only noted. The block checks `asked`, and calls `end` when everything is written."""
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

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            _redirect_lost_terminal()
        second, self.number = self.asked, number
        if second or not self._waits:
            raise Stopped(number)


@contextmanager
def listening() -> Iterator[Stopping]:
    """Handles the signals for the length of the block. Only the main thread can; in any other, nothing is handled."""
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup and background commands ignore signals
            signal.signal(number, stopping._on_signal)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Postpones a signal to the end of the block: for short work that must not be interrupted."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for first in received[:1]:
            signal.raise_signal(first)


@contextmanager
def hangups_kept_from_children() -> Iterator[None]:
    """Processes started within the block don't get SIGHUP. A lost terminal sends it to all processes, and a training's workers have
    a checkpoint to write.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _redirect_lost_terminal() -> None:
    """Redirects a lost terminal to /dev/null: writing to it would raise, and end the run before its checkpoint."""
    for stream in (0, 1, 2):
        try:
            lost = stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream)
        except OSError:
            continue
        if lost:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, stream)
            os.close(nowhere)
