"""A minute without MLflow's server, or without its PostgreSQL, in the middle of a real training."""

import time

import pytest
from interruptions import Training, assert_same, wait_for
from servers import PostgreSQL, TrackingServer
from test_recovery import uninterrupted  # noqa: F401

pytestmark = [pytest.mark.ray, pytest.mark.services]


@pytest.mark.parametrize("what", ["server", "database"])
def test_a_minute_without(tmp_path, uninterrupted, what):  # noqa: F811
    database = PostgreSQL()
    server = TrackingServer(tmp_path, database.uri)
    command = Training(tmp_path / "workspace", "--tracking-uri", server.uri)
    try:
        server.start()
        process = command.start()
        wait_for(command.workspace, 40_000)
        (server.kill if what == "server" else database.stop)()
        time.sleep(60)
        (server if what == "server" else database).start()
        _, shown = process.communicate(timeout=900)
        assert process.returncode == 0, shown
        assert shown.count(f"tracking: {server.uri} does not answer") == 1
        assert shown.count("answers again, and everything that was queued was delivered") == 1
        assert "queued in the workspace" not in shown
        assert_same(command.workspace, uninterrupted, server.uri)
    finally:
        server.kill()
        database.close()
