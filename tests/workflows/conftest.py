"""Ray and a finished pipeline, shared by the tests of this folder."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from small import Runner
from stores import KEYS, PLANTED


@pytest.fixture(scope="session")
def ray_cluster(moto_server):
    """One Ray for all tests of this process: starting it takes seconds. Its workers know the store in memory, with the planted key:
    they inherit the environment of now.
    """
    from workflows.cluster.session import ray_session

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (KEYS | {"AWS_ENDPOINT_URL": moto_server, "AWS_SECRET_ACCESS_KEY": PLANTED}).items():
                patch.setenv(name, value)
            resources = stack.enter_context(ray_session(cpus=2))
        yield resources


@pytest.fixture
def runner(tmp_path, ray_cluster):
    return Runner(tmp_path / "workspace")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, ray_cluster):
    """(runner, summary) of a pipeline that ran to its end. Tests may read it, and run it again."""
    runner = Runner(tmp_path_factory.mktemp("finished"))
    return runner, runner()
