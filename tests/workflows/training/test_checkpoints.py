"""The checkpoints of a training: written beside it, whole or not there, the newest kept."""

import os
import threading

import pytest
import torch
from stores import bucket, use

from mmdistill_core.engine import checkpoint
from workflows.errors import UserError
from workflows.storage import store as storage
from workflows.training.checkpoints import Checkpoints, complete, name_of


@pytest.fixture(params=["folder", "bucket"])
def uri(request, tmp_path, monkeypatch):
    if request.param == "folder":
        return str(tmp_path / "training")
    server = request.getfixturevalue("moto_server")
    use(monkeypatch, server)
    return f"{bucket(server, 'checkpoints')}/{os.path.basename(tmp_path)}/training"


def values(n):
    return {"weights": torch.full((4,), float(n)), "n": n, "rows": [{"loss": 0.5}]}


def test_the_newest_come_back_and_older_ones_go(uri):
    checkpoints = Checkpoints(uri)
    assert checkpoints.newest() is None
    assert checkpoints.images() == -1
    for n in (100, 200, 300):
        checkpoints.save(n, values(n))
    assert checkpoints.settle()
    assert complete(list(storage.listing(uri))) == [300, 200]
    n, found = checkpoints.newest()
    assert (n, found["n"], found["weights"].tolist()) == (300, 300, [300.0] * 4)
    assert checkpoints.load(200)["n"] == 200


def test_what_is_saved_is_what_was_when_it_was_asked_for(uri, monkeypatch):
    """Training goes on, in place, while it is written."""
    go, write = threading.Event(), checkpoint.Snapshot.write
    monkeypatch.setattr(checkpoint.Snapshot, "write", lambda self, to: go.wait(30) and write(self, to))
    checkpoints, given = Checkpoints(uri), values(1)
    checkpoints.save(1, given)
    given["weights"].fill_(7)
    given["rows"].append({"loss": 0.1})
    assert checkpoints.images() == -1
    go.set()
    assert checkpoints.settle()
    assert checkpoints.load(1)["weights"].tolist() == [1.0] * 4
    assert checkpoints.load(1)["rows"] == [{"loss": 0.5}]


def test_one_without_its_manifest_is_not_there_and_a_damaged_one_is_passed_over(uri):
    notes = []
    checkpoints = Checkpoints(uri, notes.append)
    for n in (100, 200):
        checkpoints.save(n, values(n))
    checkpoints.settle()
    storage.write(f"{uri}/{name_of(250)}/state.json", b"{}")  # as a kill leaves it
    assert checkpoints.images() == 200
    storage.write(f"{uri}/{name_of(200)}/state.safetensors", b"nonsense")
    assert checkpoints.newest()[0] == 100
    assert len(notes) == 1
    assert f"{name_of(200)} is damaged" in notes[0]
    checkpoints.save(300, values(300))
    checkpoints.settle()
    assert {name.split("/")[0] for name in storage.listing(uri)} == {name_of(100), name_of(300)}
    storage.write(f"{uri}/{name_of(100)}/state.json", b"{")
    storage.write(f"{uri}/{name_of(300)}/state.json", b"{")
    assert checkpoints.newest() is None
    assert "training starts again" in notes[-1]
    for n in (30, 60, 90):
        checkpoints.save(n, values(n))
    checkpoints.settle()
    assert checkpoints.newest()[0] == 90, (
        "those of a training that starts again are not taken for older than the damaged"
    )
    assert checkpoints.load(60)["n"] == 60
    for n in (100, 300):
        checkpoints.save(n, values(n))
        assert checkpoints.settle(), "one that was damaged is written anew"
    assert checkpoints.newest()[0] == 300
    assert {name.split("/")[0] for name in storage.listing(uri)} == {name_of(100), name_of(300)}


def test_what_a_kill_left_half_written_goes(tmp_path):
    for n in (100, 300):
        (tmp_path / f".{name_of(n)}.abc.partial").mkdir()
        (tmp_path / f".{name_of(n)}.abc.partial" / "state.safetensors").write_bytes(b"half")
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(200, values(200))
    checkpoints.settle()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{name_of(300)}.abc.partial", name_of(200)]


@pytest.mark.parametrize("error", [UserError("it could not be deleted"), OSError(39, "Directory not empty")])
def test_one_is_written_though_older_ones_can_not_be_removed(tmp_path, monkeypatch, error):
    def refused(uri):
        raise error

    monkeypatch.setattr(storage, "delete", refused)
    notes = []
    checkpoints = Checkpoints(str(tmp_path), notes.append)
    for n in (100, 200, 300):
        checkpoints.save(n, values(n))
        assert checkpoints.settle()
    assert len(notes) == 1
    assert f"checkpoints before {name_of(300)} could not be removed" in notes[0]


def test_a_store_that_is_away_is_told_and_training_goes_on(uri, monkeypatch):
    notes, publish = [], checkpoint.Snapshot.write

    def away(self, to):
        raise UserError("s3://there: nothing answers")

    monkeypatch.setattr(checkpoint.Snapshot, "write", away)
    checkpoints = Checkpoints(uri, notes.append)
    checkpoints.save(100, values(100))
    assert not checkpoints.settle()
    assert notes == ["a checkpoint could not be written: s3://there: nothing answers"]
    monkeypatch.setattr(checkpoint.Snapshot, "write", publish)
    checkpoints.save(200, values(200))
    assert checkpoints.settle()
    assert checkpoints.images() == 200


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(self, to):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Snapshot, "write", full)
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(100, values(100))
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(200, values(200))
