"""jobs: what runs on a cluster, looked at from elsewhere: a list, a state, a log as it grows, a stop."""

from __future__ import annotations

import sys
import time
from datetime import datetime

from rich.markup import escape
from rich.table import Table

from workflows.errors import UserError
from workflows.jobs.client import STOP_WAIT, Head, Job
from workflows.jobs.submit import explained
from workflows.rendering.screen import Screen, clock

MARKS = {"SUCCEEDED": "[green]✓[/]", "FAILED": "[red]✗[/]", "STOPPED": "[yellow]■[/]"}
GRACE = 30.0
"""Seconds beyond its own that a stop may take: the head looks now and then only."""


def table(jobs: list[Job]) -> Table:
    """A line a job: state, when it began, how long it took or has run, its command."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("job", "state", "began", "took", "command"):
        shown.add_column(name, no_wrap=name != "command")
    for job in jobs:
        began = datetime.fromtimestamp(job.began).strftime("%Y-%m-%d %H:%M") if job.began else ""
        shown.add_row(job.id, job.status.lower(), began, clock(job.seconds), escape(job.entrypoint))
    return shown


def follow(head: Head, name: str, screen: Screen) -> int:
    """Shows the job's log on stdout until it has ended; returns its exit code. Ctrl-C leaves it running: 130."""
    shown: list[str] = []

    def show(text: str) -> None:
        shown[:] = [*shown, text][-50:]
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = head.follow(name, show, lambda text: screen.line(f"[yellow]![/] {escape(text)}"))
    except KeyboardInterrupt:
        screen.line(f"\ndetached: [bold]{name}[/] goes on\n{commands(head, name)}")
        return 130
    return conclude(job, "".join(shown), screen)


def conclude(job: Job, log: str, screen: Screen) -> int:
    """A line on how the job ended, and why, where its head lacks what it needs; returns its exit code."""
    if job.status == "FAILED" and (error := explained(job, log)):
        screen.line(f"error: {escape(str(error))}\n       {escape(error.hint)}")
    code = f", exit {job.code}" if job.status == "FAILED" else ""
    screen.line(f"{MARKS[job.status]} [bold]{job.id}[/]  {job.status.lower()} after {clock(job.seconds)}{code}")
    return job.code


def commands(head: Head, name: str) -> str:
    """How to look again, and how to stop it."""
    end = f"{name} --address {escape(head.address)}"
    return f"  again: mmdistill jobs logs --follow {end}\n  stop:  mmdistill jobs stop {end}"


def stop(head: Head, name: str, screen: Screen) -> None:
    """Asks the job to end, and shows what it still says until it has. Raises UserError if it does not end in time."""
    job = head.newest(name)
    if not job.ended:
        past = len(head.log(job.id))
        head.stop(job.id)
        seconds = float(job.env.get(STOP_WAIT, 3)) + GRACE
        screen.line(f"stopping [bold]{job.id}[/]: it may take {seconds - GRACE:.0f} s for its checkpoint")
        until = time.monotonic() + seconds
        while not (job := head.job(job.id)).ended:
            past = _show_rest(head, job, past)
            if time.monotonic() > until:
                raise UserError(
                    f"job {job.id}: it has not ended after {seconds:.0f} s",
                    hint="look at it with: mmdistill jobs status",
                )
            time.sleep(0.5)
        _show_rest(head, job, past)
    screen.line(f"{MARKS[job.status]} [bold]{job.id}[/]  {job.status.lower()} after {clock(job.seconds)}")


def _show_rest(head: Head, job: Job, past: int) -> int:
    log = head.log(job.id)
    sys.stdout.write(log[past:])
    sys.stdout.flush()
    return len(log)
