"""A password in the address of the tracking store is used, and is nowhere to be read: no file, no line, no error."""

import os

import pytest
from small import Runner
from tracking_reads import log_steps

from workflows.errors import UserError
from workflows.registry.versions import Registry
from workflows.storage import uri as uris
from workflows.tracking import tracker as tracking

PASSWORD = "s3cret/Word"


def planted(uri):
    return uri.replace("://", "://alice:s3cret%2FWord@")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://alice:pw@host:5000/path", "http://host:5000/path"),
        ("postgresql://u:p%40w@db/name", "postgresql://db/name"),
        ("sqlite:////tmp/a@b/m.db", "sqlite:////tmp/a@b/m.db"),
        ("https://host", "https://host"),
        ("postgresql://u:pa/ss@host/db", "postgresql://host/db"),
        ("postgresql+psycopg2://u:12/34@host:5432/db", "postgresql+psycopg2://host:5432/db"),
        ("postgresql://u:p/a@ss@host/db?x=a@b", "postgresql://host/db?x=a@b"),
        ("http://u:pa/ss@host/x", "http://host/x"),
        ("postgresql:/u:pw@host/db:", "postgresql:/host/db:"),
        ("postgresql://host/db?user=u&password=SECRET", "postgresql://host/db?user=***&password=***"),
        (
            "postgresql://host/db?sslmode=require&Password=S%26T&x=1",
            "postgresql://host/db?sslmode=require&Password=***&x=1",
        ),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("http://[::1]:5000/a@b", "http://[::1]:5000/a@b"),
        ("postgresql://host:5432/db", "postgresql://host:5432/db"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("sqlite:////home/a:b/c@d/m.db", "sqlite:////home/a:b/c@d/m.db"),
        ("/home/a:b/c@d", "/home/a:b/c@d"),
        ("file:///home/a:b@c", "file:///home/a:b@c"),
    ],
)
def test_an_address_without_its_secrets(uri, shown):
    assert uris.shown(uri) == shown
    assert uris.shown(f"no {uri} and s3://k:pw@h/x: a@b") == f"no {shown} and s3://h/x: a@b"
    hidden = [secret.rstrip("@") for secret in tracking._secrets(uri)]
    assert bool(hidden) == (uri != shown)
    assert not any(secret in shown for secret in hidden)


def test_forms_of_a_password_that_errors_may_show():
    assert {"pa/ss", "u:pa/ss@"} <= set(tracking._secrets("postgresql://u:pa/ss@host/db"))
    assert {"S%26+T", "S&+T", "S& T"} == set(tracking._secrets("postgresql://host/db?user=u&password=S%26+T"))


def test_a_password_in_the_address_is_used_and_is_nowhere(tmp_path, opened, proxy, said, monkeypatch, capfd):
    import base64

    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    tracker = opened(planted(proxy.uri))
    told = [tracker.uri]
    run = tracker.start_run("secret")
    tracker.log_params(run, {"tracking": tracker.uri})
    assert tracker.settle(20)
    proxy.gone = True
    log_steps(tracker, run, range(3))
    assert not tracker.settle(0.3)
    told += [str(tracker.unreachable()), tracker.unreachable().hint, *said]
    for attempt in (lambda: opened(planted(proxy.uri)), lambda: Registry(tracker).find_version("m", {})):
        with pytest.raises(UserError) as caught:
            attempt()
        told += [str(caught.value), caught.value.hint]
        assert caught.value.__cause__ is None
    proxy.gone, proxy.status = False, 403
    with pytest.raises(UserError) as caught:
        tracker.settle(20)
    told.append(str(caught.value))
    proxy.status = None
    tracker.close()
    again = opened(planted(proxy.uri))
    assert again.settle(20)
    told += [str(again.client.get_run(run).data), *capfd.readouterr()]
    told += [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (PASSWORD, "s3cret%2FWord", "alice"):
        assert not [text for text in told if secret in text]
    wanted = "Basic " + base64.b64encode(f"alice:{PASSWORD}".encode()).decode()
    assert {headers.get("Authorization") for _, _, headers in proxy.seen} == {wanted}
    opened(proxy.uri)  # another store of this process does not get them
    assert "Authorization" not in proxy.seen[-1][2]


@pytest.mark.ray
def test_a_run_leaves_no_password_in_its_workspace(tmp_path, runner: Runner, proxy, monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    runner(tracking_uri=planted(proxy.uri), until="prepare")
    assert proxy.uri in "".join(path.read_text() for path in runner.workspace.rglob("runs.json"))
    assert "s3cret" not in runner.text
    for path in runner.workspace.rglob("*"):
        if path.is_file():
            assert b"s3cret" not in path.read_bytes(), path
    assert os.environ["MLFLOW_TRACKING_URI"] == ""
