"""Shared by all tests: one thread a process (small tensors), and a marker for what starts Ray."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MPLBACKEND", "Agg")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Tests that run in the background have Ctrl-C ignored, and would pass that on to what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as under nohup
sys.path.insert(0, str(Path(__file__).parent / "outside"))
sys.path.insert(0, str(Path(__file__).parent))

from services import in_stack, server, stack  # noqa: F401  the fixtures of the marker `services`
from small import Runner
from stores import KEYS, PLANTED, moto

OUTSIDE = str(Path(__file__).parent / "outside")
"""A package that is not mmdistill, as pip would install it: these tests and the workers of their Ray find it."""

# By their minutes, of all tiers: the order in which streams of files end together.
LONGEST = [
    "test_nodes", "test_ray_up", "test_team", "test_sweep", "test_recovery", "test_outage", "test_upgrade",
    "test_jobs", "test_terraform", "test_cluster", "test_backup", "test_moment_matching", "test_stack", "test_crew",
    "test_prepare", "test_compose", "test_together", "test_recipes", "test_plan",
    "test_promote", "test_tracking", "test_outside_method", "test_pipeline", "test_remote", "test_reference",
    "test_storage",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first; all others as they were found."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _own_tracking_store(monkeypatch):
    """MLflow writes its store's address to the environment; the next test must not find it there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(autouse=True)
def _nothing_is_left_running():
    """A test that failed half way must not take the machine from those after it."""
    from interruptions import STARTED

    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def moto_server():
    """The address of an object store in memory; each test makes its own buckets."""
    with moto() as address:
        yield address


@pytest.fixture(scope="session")
def ray_cluster(moto_server):
    """One Ray for all tests of this process: starting it takes seconds. Its workers know the store in memory, with the planted key:
    they inherit the environment of now.
    """
    from workflows.cluster.session import ray_session

    with ExitStack() as held:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (KEYS | {"AWS_ENDPOINT_URL": moto_server, "AWS_SECRET_ACCESS_KEY": PLANTED}).items():
                patch.setenv(name, value)
            patch.setenv("PYTHONPATH", OUTSIDE, prepend=os.pathsep)
            resources = held.enter_context(ray_session(cpus=2))
        yield resources


@pytest.fixture
def runner(tmp_path, ray_cluster):
    return Runner(tmp_path / "workspace")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, ray_cluster):
    """(runner, summary) of a pipeline that ran to its end. Tests may read it, and run it again."""
    runner = Runner(tmp_path_factory.mktemp("finished"))
    return runner, runner()
