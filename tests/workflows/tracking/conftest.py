"""A real MLflow server, a proxy that spoils its answers, and trackers with short pauses."""

import pytest
from servers import Proxy, TrackingServer

from workflows.tracking import outbox
from workflows.tracking import tracker as tracking
from workflows.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = TrackingServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server):
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(outbox, "LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(tracking, "A_MOMENT", 2.0)


@pytest.fixture
def said():
    return []


@pytest.fixture
def opened(tmp_path, said):
    """`opened(uri)`: a tracker with an outbox in `tmp_path`."""
    trackers = []

    def open_(uri):
        trackers.append(Tracker(uri, outbox=tmp_path / "outbox", artifacts=tmp_path / "artifacts", say=said.append))
        return trackers[-1]

    yield open_
    for tracker in trackers:
        tracker.close()
