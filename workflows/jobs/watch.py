"""The `jobs` commands: list the jobs of a cluster, follow a log, stop a job."""

from __future__ import annotations

import sys
import time
from datetime import datetime

from rich.markup import escape
from rich.table import Table

from workflows.errors import UserError
from workflows.jobs.client import STOP_WAIT, Head, Job
from workflows.jobs.submit import explain_failure
from workflows.rendering.screen import Screen, clock

MARKS = {"SUCCEEDED": "[green]✓[/]", "FAILED": "[red]✗[/]", "STOPPED": "[yellow]■[/]"}
GRACE = 30.0
"""Extra seconds to wait for a stop, because the head checks its jobs only now and then."""


def table(jobs: list[Job]) -> Table:
    """A table of jobs: state, start time, duration so far, command."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("job", "state", "began", "took", "command"):
        shown.add_column(name, no_wrap=name != "command")
    for job in jobs:
        began = datetime.fromtimestamp(job.began).strftime("%Y-%m-%d %H:%M") if job.began else ""
        shown.add_row(job.id, job.status.lower(), began, clock(job.seconds), escape(job.entrypoint))
    return shown


def follow(head: Head, name: str, screen: Screen) -> int:
    """Writes the job's log to stdout until the job ends, and returns its exit code. Ctrl-C detaches and returns 130."""
    shown: list[str] = []

    def show(text: str) -> None:
        shown[:] = [*shown, text][-50:]
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = head.follow(name, show, lambda text: screen.line(f"[yellow]![/] {escape(text)}"))
    except KeyboardInterrupt:
        screen.line(f"\ndetached: [bold]{name}[/] keeps running\n{commands(head, name)}")
        return 130
    return conclude(job, "".join(shown), screen)


def conclude(job: Job, log: str, screen: Screen) -> int:
    """Says how the job ended, and what its head lacks if that is why. Returns the job's exit code."""
    if job.status == "FAILED" and (error := explain_failure(job, log)):
        screen.line(f"error: {escape(str(error))}\n       {escape(error.hint)}")
    code = f", exit {job.code}" if job.status == "FAILED" else ""
    screen.line(f"{MARKS[job.status]} [bold]{job.id}[/]  {job.status.lower()} after {clock(job.seconds)}{code}")
    return job.code


def commands(head: Head, name: str) -> str:
    """The commands that follow and stop a job."""
    end = f"{name} --address {escape(head.address)}"
    return f"  follow: mmdistill jobs logs --follow {end}\n  stop:   mmdistill jobs stop {end}"


def stop(head: Head, name: str, screen: Screen) -> None:
    """Stops the last attempt of a job, and shows its log until it has ended. Raises UserError if it does not end in time."""
    job = head.newest(name)
    if not job.ended:
        past = len(head.log(job.id))
        head.stop(job.id)
        seconds = float(job.env.get(STOP_WAIT, 3)) + GRACE
        screen.line(f"stopping [bold]{job.id}[/]: it has {seconds - GRACE:.0f} s to write a checkpoint")
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
