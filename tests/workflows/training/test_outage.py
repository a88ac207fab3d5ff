"""A minute without MLflow's server, or without its PostgreSQL, in the middle of a real training."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from interruptions import LONG, assert_same, wait_for
from servers import PostgreSQL, TrackingServer

pytestmark = [pytest.mark.ray, pytest.mark.services]


@pytest.mark.parametrize("what", ["server", "database"])
def test_a_minute_without(runner, uninterrupted, tmp_path, what):
    database = PostgreSQL()
    server = TrackingServer(tmp_path, database.uri)
    try:
        server.start()
        with ThreadPoolExecutor(1) as beside:
            run = beside.submit(runner, *LONG, until="teacher", tracking_uri=server.uri)
            wait_for(runner.workspace, 40_000)
            (server.kill if what == "server" else database.stop)()
            time.sleep(60)
            (server if what == "server" else database).start()
            run.result(timeout=900)
        assert runner.text.count(f"tracking: {server.uri} does not answer") == 1
        assert runner.text.count("answers again, and everything that was queued was delivered") == 1
        assert "queued in the workspace" not in runner.text
        assert_same(runner.workspace, uninterrupted, server.uri)
    finally:
        server.kill()
        database.close()
