import pytest
from interruptions import LONG, outcome
from small import Runner


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, ray_cluster):
    """The outcome of the long training with nothing in its way."""
    runner = Runner(tmp_path_factory.mktemp("uninterrupted"))
    runner(*LONG, until="teacher")
    return outcome(runner.workspace)
