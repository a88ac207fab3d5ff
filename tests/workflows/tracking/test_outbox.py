"""The outbox against a receiver made here: order, crashes, what is delivered twice, half a line, writers at once, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from small import ROOT

from workflows.tracking import outbox as module
from workflows.tracking.outbox import JOURNAL, MOST, REFUSED, Away, Outbox, Refused, queued


class Receiver:
    """Takes operations; `trouble(operations)` may raise before they are taken, `lost(operations)` after."""

    def __init__(self):
        self.taken, self.calls, self.said = [], [], []
        self.trouble = self.lost = lambda operations: None

    def deliver(self, operations):
        self.trouble(operations)
        self.calls.append(operations)
        self.taken += operations
        self.lost(operations)

    def open(self, folder):
        return Outbox(folder, self.deliver, name="store", say=self.said.append)


def away(operations):
    raise Away("gone")


def metric(number, values=1):
    return {"kind": "metrics", "run": "a", "values": [[f"m{number}", 0.5, 1, i] for i in range(values)]}


def names(operations):
    return [
        operation["values"][0][0] if operation["kind"] == "metrics" else operation["kind"] for operation in operations
    ]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.05)


@pytest.fixture
def receiver():
    return Receiver()


def test_everything_arrives_once_in_order_and_metrics_together(tmp_path, receiver):
    started, go = threading.Event(), threading.Event()

    def held(operations):
        started.set()
        assert go.wait(20)

    receiver.trouble = held
    box = receiver.open(tmp_path)
    box.put({"kind": "run"})
    assert started.wait(20)
    for i in range(700):
        box.put(metric(i, values=2))
    box.put({"kind": "end"})
    box.put(metric(700))
    go.set()
    assert box.wait(seconds=20)
    assert names(receiver.taken) == ["run", *(f"m{i}" for i in range(700)), "end", "m700"]
    assert [operation["n"] for operation in receiver.taken] == list(range(1, 704))
    assert len(receiver.calls) == 1 + 2 + 1 + 1
    assert max(sum(len(o.get("values", ())) for o in call) for call in receiver.calls) == MOST
    box.close()
    assert (tmp_path / JOURNAL).read_text() == ""


def test_put_waits_for_nobody_and_the_outage_is_told_once(tmp_path, receiver):
    receiver.trouble = away
    box = receiver.open(tmp_path)
    for i in range(50):
        box.put(metric(i))
        time.sleep(0.005)
    assert not box.wait(seconds=0.3)
    assert box.away == "gone"
    assert box.pending == 50
    receiver.trouble = lambda operations: None
    assert box.wait(seconds=20)
    box.close()
    assert names(receiver.taken) == [f"m{i}" for i in range(50)]
    assert len(receiver.said) == 2
    assert "does not answer (gone)" in receiver.said[0]
    assert "answers again, and everything that was queued was delivered" in receiver.said[1]


def test_a_receiver_that_comes_and_goes_is_told_about_once(tmp_path, receiver):
    count = [0]

    def flaky(operations):
        count[0] += 1
        if count[0] % 2:
            raise Away("gone")

    receiver.trouble = flaky
    box = receiver.open(tmp_path)
    for i in range(5):
        box.put({"kind": f"{i}"})
    assert box.wait(seconds=20)
    box.close()
    assert names(receiver.taken) == list("01234")
    assert len(receiver.said) == 2


def test_an_answer_that_was_lost_means_a_second_delivery_of_the_very_same(tmp_path, receiver):
    lost = [True]

    def once(operations):
        if lost.pop() if lost else False:
            raise Away("cut")

    receiver.lost = once
    box = receiver.open(tmp_path)
    box.put(metric(0))
    assert box.wait(seconds=20)
    box.close()
    assert receiver.taken == [{"n": 1} | metric(0)] * 2


def test_what_is_queued_is_delivered_by_the_next_one_with_its_files(tmp_path, receiver):
    receiver.trouble = away
    box = receiver.open(tmp_path / "box")
    file, folder = tmp_path / "grid.png", tmp_path / "model"
    file.write_text("first")
    folder.mkdir()
    (folder / "weights").write_text("w")
    box.put({"kind": "artifact"} | box.keep(file))
    box.put({"kind": "artifact"} | box.keep(folder))
    file.write_text("second")
    (folder / "weights").unlink()
    box.close()
    (tmp_path / "box/files/litter").mkdir()
    assert queued(tmp_path / "box") == 2

    texts = []
    after = Receiver()
    after.trouble = lambda operations: texts.extend(
        (path / "weights").read_text() if path.is_dir() else path.read_text() for path in map(box.kept, operations)
    )
    again = after.open(tmp_path / "box")
    assert again.wait(seconds=20)
    again.close()
    assert texts == ["first", "w"]
    assert not list((tmp_path / "box/files").iterdir())
    assert queued(tmp_path / "box") == 0


def test_a_copy_that_was_lost_is_set_aside_and_holds_up_nothing(tmp_path, receiver, monkeypatch):
    """As after a loss of power; so copies are on the disk before the operation that needs them is."""
    receiver.trouble = away
    box = receiver.open(tmp_path / "box")
    model, synced, sync = tmp_path / "model", [], os.fsync
    (model / "inner").mkdir(parents=True)
    (model / "inner" / "weights").write_text("w")
    monkeypatch.setattr(os, "fsync", lambda at: (synced.append(os.readlink(f"/proc/self/fd/{at}")), sync(at)))
    lost = box.keep(model)
    monkeypatch.undo()
    copy = tmp_path / "box/files" / lost["token"]
    assert {str(p) for p in (copy.parent, copy, *copy.rglob("*"))} <= set(synced)
    box.put({"kind": "artifact"} | lost)
    box.put({"kind": "good"})
    box.close()
    shutil.rmtree(copy)
    receiver.trouble = lambda operations: None
    again = receiver.open(tmp_path / "box")
    assert again.wait(seconds=20)
    again.close()
    assert names(receiver.taken) == ["good"]
    assert "the copy of model is gone" in receiver.said[-1]
    assert "the copy of model is gone" in (tmp_path / "box" / REFUSED).read_text()


CHILD = """
import sys
from pathlib import Path
from workflows.tracking.outbox import Away, Outbox
def deliver(operations):
    if operations[0]["n"] > 40:
        raise Away("gone")
box = Outbox(Path(sys.argv[1]), deliver, name="store", say=lambda text: None)
for i in range(10**6):
    box.put({"kind": f"{i}"})
    if i == 40:
        assert box.wait(40, seconds=20)
    if i == 100:
        print("there", flush=True)
"""


def test_a_killed_process_loses_nothing_that_it_had_put(tmp_path, receiver):
    """SIGKILL while it writes as fast as it can."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"there\n"
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    whole = [line for line in (tmp_path / JOURNAL).read_bytes().split(b"\n")[:-1]]
    last = json.loads(whole[-1])["n"]
    assert last > 101
    box = receiver.open(tmp_path)
    assert box.wait(seconds=60)
    box.close()
    assert names(receiver.taken) == [str(i) for i in range(40, last)]


@pytest.mark.parametrize("half", [b'{"n": 3, "kind": "x", "val', b"\0\0\0\0", b'{"n": 3, "kind": "x"}'])
def test_half_a_line_is_dropped_and_the_journal_goes_on(tmp_path, receiver, half):
    receiver.trouble = away
    box = receiver.open(tmp_path)
    box.put({"kind": "a"})
    box.put({"kind": "b"})
    box.close()
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(half)
    receiver.trouble = lambda operations: None
    again = receiver.open(tmp_path)
    again.put({"kind": "c"})
    assert again.wait(seconds=20)
    again.close()
    assert names(receiver.taken) == ["a", "b", "c"]


def test_a_lost_note_of_arrival_brings_the_operations_again(tmp_path, receiver):
    box = receiver.open(tmp_path)
    started = threading.Event()

    def until_end(operations):
        if operations[0]["kind"] == "b":
            started.set()
            raise Away("gone")

    receiver.trouble = until_end
    box.put({"kind": "a"})
    box.put({"kind": "b"})
    assert started.wait(20)
    box.close()
    (tmp_path / "delivered.json").unlink()
    receiver.trouble = lambda operations: None
    again = receiver.open(tmp_path)
    assert again.wait(seconds=20)
    again.close()
    assert names(receiver.taken) == ["a", "a", "b"]


def test_writers_at_once(tmp_path, receiver):
    box = receiver.open(tmp_path)

    def write(who):
        for i in range(300):
            box.put({"kind": "x", "who": who, "i": i})

    threads = [threading.Thread(target=write, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert box.wait(seconds=60)
    box.close()
    assert [operation["n"] for operation in receiver.taken] == list(range(1, 2401))
    for who in range(8):
        assert [o["i"] for o in receiver.taken if o["who"] == who] == list(range(300))


def test_one_bad_operation_is_set_aside_raised_and_holds_up_nothing(tmp_path, receiver):
    started, go = threading.Event(), threading.Event()

    def picky(operations):
        started.set()
        assert go.wait(20)
        if "m3" in names(operations):
            raise Refused("no m3", stays=False)

    receiver.trouble = picky
    box = receiver.open(tmp_path)
    box.put({"kind": "run"})
    assert started.wait(20)
    for i in range(6):
        box.put(metric(i))
    go.set()
    with pytest.raises(Refused, match="no m3"):
        box.wait(seconds=20)
    with pytest.raises(Refused, match="no m3"):
        box.put(metric(6))
    end = time.monotonic() + 20
    while box.pending and time.monotonic() < end:
        time.sleep(0.02)
    box.close()
    assert names(receiver.taken) == ["run", "m0", "m1", "m2", "m4", "m5", "m6"]
    assert [json.loads(line)["refused"] for line in (tmp_path / REFUSED).read_text().splitlines()] == ["no m3"]


def test_what_an_earlier_process_left_and_is_refused_fails_nobody(tmp_path, receiver):
    receiver.trouble = away
    box = receiver.open(tmp_path)
    box.put({"kind": "bad"})
    box.close()

    def picky(operations):
        if operations[0]["kind"] == "bad":
            raise Refused("no", stays=False)

    receiver.trouble = picky
    again = receiver.open(tmp_path)
    again.put({"kind": "good"})
    assert again.wait(seconds=20)
    again.close()
    assert names(receiver.taken) == ["good"]
    assert "refused what an earlier run had left" in receiver.said[-1]


def test_wrong_credentials_are_raised_and_everything_stays_queued(tmp_path, receiver):
    def denied(operations):
        raise Refused("who are you", stays=True)

    receiver.trouble = denied
    box = receiver.open(tmp_path)
    box.put(metric(0))
    with pytest.raises(Refused, match="who are you"):
        box.wait(seconds=20)
    with pytest.raises(Refused):
        box.put(metric(1))
    box.close()
    receiver.trouble = lambda operations: None
    again = receiver.open(tmp_path)
    assert again.wait(seconds=20)
    again.close()
    assert names(receiver.taken) == ["m0", "m1"]


def test_a_full_disk_leaves_no_half_line(tmp_path, receiver, monkeypatch):
    """The journal's own file, limited by the kernel."""
    import resource

    receiver.trouble = away
    box = receiver.open(tmp_path)
    box.put({"kind": "a"})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(tmp_path / JOURNAL) + 10, hard))
        with pytest.raises(OSError, match="too large"):
            box.put({"kind": "b"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    box.put({"kind": "c"})
    receiver.trouble = lambda operations: None
    assert box.wait(seconds=20)
    box.close()
    assert names(receiver.taken) == ["a", "c"]


@pytest.mark.parametrize("where", ["say", "set aside", "deliver"])
def test_an_error_of_our_own_is_raised_and_waits_for_no_one(tmp_path, receiver, where):
    def fails(*_):
        raise RuntimeError("ours")

    def trouble(operations):
        raise {"say": Away("gone"), "set aside": Refused("no", stays=False), "deliver": RuntimeError("ours")}[where]

    receiver.trouble, receiver.said = trouble, SimpleNamespace(append=fails)
    box = receiver.open(tmp_path)
    box._set_aside = fails
    box.put({"kind": "a"})
    with pytest.raises(RuntimeError, match="ours"):
        box.wait(seconds=20)
    with pytest.raises(RuntimeError, match="ours"):
        box.put({"kind": "b"})
    box.close()
    assert queued(tmp_path) == 2
