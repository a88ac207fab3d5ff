"""Files by path or URI: whole or not at all, verified, tried again; errors in a line; no secret in them."""

import itertools
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faults import Faults
from stores import bucket, free_port, use

from workflows.errors import ConfigError, UserError
from workflows.storage import s3
from workflows.storage import store as storage
from workflows.storage.lease import Lease
from workflows.storage.uri import is_remote, join, shown

names = itertools.count()


@pytest.fixture
def place(request, moto_server, monkeypatch, tmp_path):
    """A new bucket, or a folder."""
    monkeypatch.setenv("MMDISTILL_CACHE", str(tmp_path / "cache"))
    use(monkeypatch, moto_server)
    if getattr(request, "param", "bucket") == "folder":
        return str(tmp_path / "folder")
    return bucket(moto_server, f"bucket-{next(names)}")


both = pytest.mark.parametrize("place", ["folder", "bucket"], indirect=True)


@both
def test_bytes_come_back(place, tmp_path):
    for content in (b"", b"hello", os.urandom(100_000)):
        storage.write(join(place, "a", "b"), content)
        assert storage.read(join(place, "a", "b")) == content
        (tmp_path / "file").write_bytes(content)
        storage.upload(tmp_path / "file", join(place, "a", "c"))
        storage.download(join(place, "a", "c"), tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content
    found = storage.listing(place)
    assert {name: entry.size for name, entry in found.items()} == {"a/b": 100_000, "a/c": 100_000}
    assert storage.exists(join(place, "a", "b"))
    assert not storage.exists(join(place, "a"))
    before = found["a/b"]
    storage.write(join(place, "a", "b"), b"other")
    assert storage.listing(place)["a/b"] != before
    storage.delete(join(place, "a", "b"))
    storage.delete(join(place, "never there"))
    assert set(storage.listing(place)) == {"a/c"}
    storage.delete(join(place, "a"))
    assert storage.listing(place) == {}


@both
def test_what_is_missing_is_a_missing_file(place):
    with pytest.raises(FileNotFoundError):
        storage.read(join(place, "nothing"))
    assert storage.listing(join(place, "nothing")) == {}
    assert not storage.exists(join(place, "nothing"))


def test_a_large_object_goes_in_parts_and_its_tag_is_known(place, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PART", 5 * 2**20)
    content = np.random.default_rng(0).bytes(23 * 2**20)
    (tmp_path / "large").write_bytes(content)
    storage.upload(tmp_path / "large", join(place, "large"))
    storage.write(join(place, "written"), content)
    tags = {name: entry.tag for name, entry in storage.listing(place).items()}
    assert tags["large"] == tags["written"]
    assert tags["large"].endswith("-5")
    storage.download(join(place, "large"), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_other_bytes_than_were_written_are_found(place, monkeypatch):
    """A store that lost something on the way: the write is tried again, and given up with an error."""
    monkeypatch.setattr(s3, "TRIES", 2)
    fs, _ = s3.filesystem(place)
    whole = fs.pipe_file
    monkeypatch.setattr(fs, "pipe_file", lambda path, data, **options: whole(path, b"x" + data[1:], **options))
    with pytest.raises(UserError, match="the stored content differs from what was written"):
        storage.write(join(place, "a"), b"hello")
    monkeypatch.setattr(fs, "pipe_file", lambda path, data, **options: whole(path, data[1:], **options))
    with pytest.raises(UserError, match="5 bytes were written, the store has 4"):
        storage.write(join(place, "a"), b"hello")


def test_an_access_key_is_believed_unknown_only_after_some_calls(monkeypatch):
    """Ceph answers so too while it can't read the account."""
    from botocore.exceptions import ClientError

    monkeypatch.setattr(s3.time, "sleep", lambda seconds: None)
    refused = ClientError(
        {"Error": {"Code": "InvalidAccessKeyId"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "PutObject"
    )
    answers = [refused, refused, "done"]

    def call():
        answer = answers.pop(0)
        if answer is refused:
            raise refused
        return answer

    assert s3.retry(call, "s3://bucket/key") == "done"
    answers = [refused] * 10
    with pytest.raises(UserError, match="does not know the access key"):
        s3.retry(call, "s3://bucket/key")
    assert len(answers) == 10 - s3.TRIES_OF_A_KEY


def test_a_folder_goes_there_and_back(place, tmp_path):
    for name in ("a", "deep/er/b", "result.json", ".c.1.partial"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text(name)
    order = []
    keep = storage.upload
    storage_upload = lambda path, uri: (order.append(path.name), keep(path, uri))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "upload", storage_upload)
        storage.publish(tmp_path / "from", join(place, "stage"), last="result.json")
    assert order[-1] == "result.json"
    assert set(storage.listing(join(place, "stage"))) == {"a", "deep/er/b", "result.json"}
    copy = storage.fetch(join(place, "stage"))
    assert (copy / "deep/er/b").read_text() == "deep/er/b"
    assert storage.fetch(join(place, "stage")) == copy, "one copy for what it holds"
    storage.write(join(place, "stage", "a"), b"new")
    again = storage.fetch(join(place, "stage"))
    assert again != copy
    assert (again / "a").read_bytes() == b"new"
    assert storage.fetch(tmp_path) == tmp_path


def test_names_do_not_lead_out_of_their_folder(tmp_path):
    for name in ("../x", "a/../../x", "/etc/passwd"):
        with pytest.raises(UserError, match="leads out of its folder"):
            storage._within(tmp_path / "folder", name)
    assert storage._within(tmp_path, "a/../b") == tmp_path / "b"


def test_errors_say_what_to_do_in_a_line(place, monkeypatch, moto_server):
    with pytest.raises(UserError, match="there is no such bucket") as caught:
        storage.check("s3://never-made/prefix")
    assert "--s3-endpoint-url" in caught.value.hint
    with pytest.raises(UserError, match="there is no such bucket"):
        storage.listing("s3://never-made/prefix")
    with pytest.raises(UserError, match="names no bucket"):
        storage.check("s3:///prefix")
    with pytest.raises(UserError, match=r"nosuch://"):
        storage.read("nosuch://a/b")
    monkeypatch.setenv("MMDISTILL_S3_ADDRESSING", "sideways")
    with pytest.raises(ConfigError, match="'sideways' is not one of auto, path, virtual"):
        storage.check(place)
    monkeypatch.delenv("MMDISTILL_S3_ADDRESSING")
    for seconds in ("soon", "nan", "inf", "-1", "0"):
        monkeypatch.setenv("MMDISTILL_S3_TIMEOUT", seconds)
        with pytest.raises(ConfigError, match=f"MMDISTILL_S3_TIMEOUT: '{seconds}' is not a number of seconds"):
            storage.check(place)
    monkeypatch.delenv("MMDISTILL_S3_TIMEOUT")
    with pytest.raises(UserError, match="zip://: "):
        storage.read("zip://a/b")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such/file")
    with pytest.raises(UserError, match="AWS_CA_BUNDLE: /no/such/file is not a file"):
        storage.check(place)
    monkeypatch.delenv("AWS_CA_BUNDLE")
    for endpoint in ("http://user:hunter2@127.0.0.1:9000", "127.0.0.1:9000"):
        use(monkeypatch, endpoint)
        with pytest.raises(ConfigError, match="should be http://HOST or https://HOST") as caught:
            storage.check(place)
        assert "hunter2" not in str(caught.value)
    use(monkeypatch, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"nothing answers at http://127\.0\.0\.1"):
        storage.check(place)
    use(monkeypatch, moto_server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(UserError, match="no credentials found"):
        storage.check(place)


def test_an_unreliable_network_loses_nothing_and_doubles_nothing(place, moto_server, monkeypatch, tmp_path):
    """A tenth of the requests refused, answers cut in the middle or lost, some late: every file is there once, as it was."""
    content = {f"{i:02d}": np.random.default_rng(i).bytes(1 + 5000 * i) for i in range(40)}
    with Faults(moto_server, refused=0.1, cut=0.05, lost=0.03, delayed=0.01, delay=3.0) as faults:
        use(monkeypatch, faults.url, MMDISTILL_S3_TIMEOUT="2")
        storage.check(place)
        for name, data in content.items():
            storage.write(join(place, "all", name), data)
        copy = storage.fetch(join(place, "all"))
        assert set(storage.listing(join(place, "all"))) == set(content)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == content
    assert min(faults.counts[kind] for kind in ("refused", "cut", "lost", "delayed")) >= 1
    use(monkeypatch, moto_server)
    assert {name: storage.read(join(place, "all", name)) for name in content} == content


def test_nothing_secret_is_told_to_others(place, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "PLANTEDSECRET")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "PLANTEDTOKEN")
    told = str(s3.shared_environment())
    assert "PLANTED" not in told
    assert "AWS_ENDPOINT_URL" in told
    assert shown("s3://key:PLANTED@host/x and https://a:PLANTED@b/c") == "s3://host/x and https://b/c"


# Leases


def test_one_holder_at_a_time(place):
    uri = join(place, ".lock")
    with Lease(uri, "workspace").held() as lease:
        with pytest.raises(UserError, match="is in use by another run") as caught, Lease(uri, "workspace").held():
            pass
        assert "runs out in" in caught.value.hint
        assert not lease.lost
    with Lease(uri, "workspace").held():
        pass
    (body, _) = storage.read_tagged(uri)
    assert json.loads(body)["until"] == 0, "nobody's"


def test_of_many_who_want_it_one_gets_it(place):
    uri, got, refused, all_tried = join(place, ".lock"), [], [], threading.Barrier(6)

    def want():
        try:
            with Lease(uri, "workspace").held():
                got.append(1)
                all_tried.wait(20)
        except UserError:
            refused.append(1)
            all_tried.wait(20)

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)


def test_a_dead_holders_lease_runs_out_and_is_taken_once(place):
    uri = join(place, ".lock")
    dead = Lease(uri, "workspace", seconds=1)
    dead._id = "dead"
    assert dead._take()
    with pytest.raises(UserError, match="in use"), Lease(uri, "workspace").held():
        pass
    threading.Event().wait(1.2)
    with Lease(uri, "workspace").held() as lease, pytest.raises(UserError), Lease(uri, "workspace").held():
        assert not lease.lost


def test_a_holder_notices_that_it_was_taken_over(place):
    uri = join(place, ".lock")
    with Lease(uri, "workspace", seconds=1).held() as lease:
        other = replace(lease, holder="other", _id="other")
        storage.write(uri, other._body(time.time() + 9))
        for _ in range(50):
            threading.Event().wait(0.1)
            if lease.lost:
                break
        assert lease.lost
    assert storage.read_tagged(uri) is not None, "the other's is left"


def test_who_takes_it_at_the_very_end_keeps_it(place, monkeypatch):
    """Between the holder's last look and its release another may have taken over what had run out."""
    uri = join(place, ".lock")
    with Lease(uri, "workspace").held() as lease:
        theirs = replace(lease, holder="other", _id="other")._body(time.time() + 9)

        def late(at, data, tag, put_if=storage.put_if):
            storage.write(uri, theirs)
            return put_if(at, data, tag)

        monkeypatch.setattr("workflows.storage.lease.put_if", late)
    assert storage.read_tagged(uri)[0] == theirs


def test_a_hold_that_was_not_renewed_in_time_is_lost(place, monkeypatch):
    """A put that takes long, or a machine that slept: others may have it by now."""
    with Lease(join(place, ".lock"), "workspace", seconds=1).held() as lease:
        monkeypatch.setattr("workflows.storage.lease.put_if", lambda *_: threading.Event().wait(3) and None)
        assert not lease.lost
        threading.Event().wait(1.1)
        assert lease.lost


def test_what_the_store_keeps_was_not_deleted(place, monkeypatch):
    """Refused object by object, as without the right to delete: s3fs says nothing."""
    storage.write(join(place, "a", "b"), b"x")
    fs, _ = s3.filesystem(place)
    monkeypatch.setattr(s3, "TRIES", 2)
    monkeypatch.setattr(fs, "rm", lambda *_, **__: [])
    with pytest.raises(UserError, match="could not be deleted"):
        storage.delete(join(place, "a"))


def test_a_skeleton_has_names_sizes_and_dates(place, tmp_path):
    storage.write(join(place, "a", "large"), b"x" * 5000)
    storage.write(join(place, "a", "note.json"), b"{}")
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.utime(tmp_path / "real", (1, 1))
    storage.skeleton(place, tmp_path / "link" / "deep", whole=lambda name: name.endswith(".json"))
    large, note = tmp_path / "real/deep/a/large", tmp_path / "real/deep/a/note.json"
    assert (large.stat().st_size, large.read_bytes()[:3], note.read_bytes()) == (5000, b"\0\0\0", b"{}")
    assert (tmp_path / "real").stat().st_mtime == 1, "nothing above is touched"


def test_an_answer_that_was_lost_is_no_other_holder(place, moto_server, monkeypatch):
    with Faults(moto_server, lost=0.3, seed=3) as faults:
        use(monkeypatch, faults.url, MMDISTILL_S3_TIMEOUT="2")
        for i in range(5):
            with Lease(join(place, f"{i}.lock"), "workspace").held():
                pass
    assert faults.counts["lost"] >= 3


def test_a_store_that_is_silent_blocks_a_lease_for_seconds(place, moto_server, monkeypatch):
    """Not for the 30 s that any other request waits, 14 times: a lease must be renewed before it expires."""
    monkeypatch.setattr(storage, "LOCK_TIMEOUT", 0.3)
    monkeypatch.setattr(storage, "LOCK_TRIES", 2)
    with Faults(moto_server, delayed=1.0, delay=60) as faults:
        use(monkeypatch, faults.url)
        monkeypatch.delenv("MMDISTILL_S3_TIMEOUT", raising=False)
        for call in (storage.read_tagged, lambda uri: storage.put_if(uri, b"x", None)):
            began = time.monotonic()
            with pytest.raises(UserError):
                call(join(place, ".lock"))
            assert time.monotonic() - began < 15
    assert faults.counts["delayed"] == 4


def test_a_folder_takes_no_lease():
    with pytest.raises(UserError, match="only folders and s3://"), Lease("memory://a/b", "workspace").held():
        pass


def test_paths_of_uris():
    assert join("s3://a/b/", "c", "d") == "s3://a/b/c/d"
    assert is_remote("s3://a")
    assert not is_remote("file:///a")
    assert not is_remote(Path("a/b"))
