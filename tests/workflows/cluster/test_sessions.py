"""What killed drivers leave of Ray is ended, and nothing else is. The processes stand in for Ray's: they have a log open."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager

from small import ROOT

from workflows.cluster.orphans import born, end_orphans, noted, processes_of

DRIVER = """
import os, sys, time
from pathlib import Path
from datetime import datetime
from workflows.cluster.orphans import DATED, noted
with noted(Path(sys.argv[1])):
    session = Path(sys.argv[1]) / f"session_{datetime.now().strftime(DATED)}_{os.getpid()}"
    (session / "logs").mkdir(parents=True)
    print(session, flush=True)
    sys.stdin.readline()
"""
AGENT = "import sys, time; log = open(sys.argv[1], 'w'); print('up', flush=True); time.sleep(60)"


@contextmanager
def started(*words):
    process = subprocess.Popen(
        [sys.executable, "-c", *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def test_what_a_killed_driver_leaves_is_ended_and_nothing_else(tmp_path):
    with started(DRIVER, tmp_path) as (driver, session), started(AGENT, f"{session}/logs/agent.log") as (agent, _):
        # As of `ray start`, whose process had the same number before, and of another program.
        older = tmp_path / f"session_2001-01-01_00-00-00_000000_{driver.pid}"
        other = tmp_path / "session_2999-01-01_00-00-00_000000_1"
        for folder in (older, other):
            (folder / "logs").mkdir(parents=True)
        with started(AGENT, older / "logs" / "a") as (one, _), started(AGENT, other / "logs" / "a") as (two, _):
            assert end_orphans(tmp_path) == 0  # its driver lives
            driver.kill()  # and nobody waits for it: it is dead when /proc says so
            end = time.monotonic() + 10
            while born(driver.pid):
                assert time.monotonic() < end
            assert end_orphans(tmp_path) == 1
            assert agent.wait(10) == -9
            assert one.poll() is None
            assert two.poll() is None
        assert end_orphans(tmp_path) == 0
        assert not list(tmp_path.glob("mmdistill-*/*"))


def test_a_session_that_ends_as_it_should_leaves_no_note(tmp_path):
    with started(DRIVER, tmp_path) as (driver, _):
        assert len(list(tmp_path.glob("mmdistill-*/*.json"))) == 1
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert driver.wait(10) == 0
        assert not list(tmp_path.glob("mmdistill-*/*.json"))


def test_a_note_of_other_processes_numbers_says_nothing(tmp_path):
    """As of a container that shares the folder."""
    with noted(tmp_path):
        (note,) = tmp_path.glob("mmdistill-*/*.json")
        about = json.loads(note.read_text())
        for change in ({"among": "elsewhere", "born": "1"}, {"driver": "x"}):
            note.write_text(json.dumps(about | change))
            assert end_orphans(tmp_path) == 0
            assert note.exists()
        note.write_text("{")
        assert end_orphans(tmp_path) == 0


def test_processes_are_known_by_their_logs(tmp_path):
    (tmp_path / "logs").mkdir()
    assert list(processes_of(tmp_path)) == []
    with (tmp_path / "logs" / "x").open("w"):
        assert list(processes_of(tmp_path)) == [os.getpid()]
