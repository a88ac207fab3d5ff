"""Progress and messages: live bars on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

QUIET_INTERVAL = 15.0
"""Seconds between the progress lines of a bar without a terminal."""
WORD = 16
"""Minimum width, in characters, of a cell whose text is wrapped."""
NARROW = 72
"""Width of a terminal, in characters, below which a bar shows only a percentage and the time."""


def short(number: float) -> str:
    """1234567 -> 1.23M"""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def show_table(console: Console, table: Table) -> None:
    """Prints the table. On a terminal that is too narrow, prints a line for each cell instead, so that no figure is cut."""
    unbound, foldable = console.options.update(width=10_000), 0  # foldable: characters by which cells can be narrowed
    for column in table.columns:
        sizes = [console.measure(cell, options=unbound) for cell in (column.header, *column.cells)]
        if column.no_wrap:
            column.min_width = max(size.maximum for size in sizes)
        else:  # a long word, such as a path, goes on in the next line
            column.overflow = "fold"
            foldable += max(0, max(size.minimum for size in sizes) - WORD)
    if console.measure(table, options=unbound).minimum - foldable <= console.width:
        console.print(table, soft_wrap=False)
        return
    columns = [(" ".join(str(column.header).split()), [str(cell) for cell in column.cells]) for column in table.columns]
    if table.title:
        console.print(table.title, style="bold", soft_wrap=False)
    for i in range(table.row_count):
        for name, text in ((name, cells[i]) for name, cells in columns if cells[i].strip()):
            line = Table.grid(padding=(0, 1, 0, 0), pad_edge=False, expand=True)
            if name:
                line.add_column(overflow="fold", ratio=1)
                line.add_column(overflow="fold", justify="right", max_width=max(1, console.width * 2 // 3))
            else:
                line.add_column(overflow="fold")
            line.add_row(*([name] if name else []), text)
            console.print(line, soft_wrap=False, style=None if name else "bold")
        console.print()


class _Detail(TextColumn):
    """The column that is cut with an ellipsis on a narrow terminal. The others keep their width."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class Bar:
    """A progress bar. Update it with the amount done and a few words, such as a rate or a loss."""

    def __init__(self, screen: Screen, name: str, total: float, unit: str, start_at: float) -> None:
        self.screen, self.name, self.total, self.unit = screen, name, total, unit
        self.completed, self.detail, self._printed = start_at, "", time.monotonic()
        self._since: tuple[float, float] | None = None
        self.task = screen.progress.add_task(name, total=total, completed=int(start_at), count="", detail="", left="")

    def _count(self) -> str:
        return f"{short(self.completed)}/{short(self.total)} {self.unit}" if self.unit else ""

    def _left(self) -> str:
        """The time left, at the rate since the first update: the start-up and the work of earlier runs don't count."""
        now = time.monotonic()
        if self._since is None:
            self._since = (now, self.completed)
        moment, completed = self._since
        if self.completed <= completed or self.completed >= self.total:
            return ""
        return f"{clock((self.total - self.completed) * (now - moment) / (self.completed - completed))} left"

    def update(self, completed: float, detail: str = "") -> None:
        self.completed, self.detail = min(completed, self.total), detail or self.detail
        left = self._left()
        self.screen.progress.update(
            self.task, completed=self.completed, count=self._count(), detail=self.detail, left=left
        )
        if self.screen.quiet and time.monotonic() - self._printed >= QUIET_INTERVAL:
            self._printed = time.monotonic()
            self.screen.line(
                "  " + "  ".join(part for part in (f"{self.name}:", self._count(), left, self.detail) if part)
            )


class Screen:
    """The messages and progress bars of a command, on stderr. Results go to stdout. `quiet`: no terminal, so plain lines only."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = not self.console.is_terminal
        self._lock = threading.Lock()
        self.progress = self._new_progress()

    def _new_progress(self) -> Progress:
        columns: list[tuple[int, ProgressColumn]] = [
            (0, SpinnerColumn(finished_text="[green]✓[/]", table_column=Column(no_wrap=True))),
            (0, TextColumn("[bold]{task.description}")),
            (NARROW, BarColumn(bar_width=12, table_column=Column(no_wrap=True))),
            (0, TextColumn("{task.percentage:>3.0f} %" if self.console.width < NARROW else "{task.fields[count]}")),
            (NARROW // 2, TimeElapsedColumn(table_column=Column(no_wrap=True))),
            (NARROW, TextColumn("[cyan]{task.fields[left]}")),
            (NARROW, _Detail("[dim]{task.fields[detail]}", table_column=Column(no_wrap=False))),
        ]
        return Progress(
            *(column for least, column in columns if self.console.width >= least),
            console=self.console,
            transient=True,
            disable=self.quiet,
        )

    def line(self, text: str = "", style: str = "") -> None:
        with self._lock:
            self.console.print(text, style=style or None, markup=not style)

    @contextmanager
    def bars(self) -> Iterator[Screen]:
        """Shows bars within the block. They vanish at its end."""
        self.progress = self._new_progress()
        with self.progress:
            yield self

    def status(self, text: str) -> AbstractContextManager[Any]:
        """Shows a short text while the block runs. Does nothing without a terminal."""
        return nullcontext() if self.quiet else self.console.status(text)

    def bar(self, name: str, total: float, *, unit: str = "", start_at: float = 0) -> Bar:
        """Adds a bar; call it within `bars`. `start_at`: the amount that an earlier run had done."""
        return Bar(self, name, total, unit, start_at)
