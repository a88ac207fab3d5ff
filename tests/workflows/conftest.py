"""Ray and a finished pipeline, shared by the tests of this folder."""

from __future__ import annotations

import pytest
from small import Runner


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray for all tests of this process: starting it takes seconds."""
    from workflows.runtime.cluster import ray_session

    with ray_session(cpus=2) as resources:
        yield resources


@pytest.fixture
def runner(tmp_path, ray_cluster):
    return Runner(tmp_path / "workspace")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, ray_cluster):
    """(runner, summary) of a pipeline that ran to its end. Tests may read it, and run it again."""
    runner = Runner(tmp_path_factory.mktemp("finished"))
    return runner, runner()
