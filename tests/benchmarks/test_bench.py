"""The benchmark of memory: each kind of update in a process of its own."""

import pytest

from benchmarks.memory import bench_memory
from workflows.config.loading import load_config


@pytest.mark.slow
def test_instant_holds_two_networks_where_the_others_hold_three():
    rows = bench_memory(load_config("digits"), 1)["updates"]
    assert {update: row["networks"] for update, row in rows.items()} == {"joint": 3, "alternating": 3, "instant": 2}
    assert rows["instant"]["copies"] < rows["alternating"]["copies"] - 1
    assert rows["instant"]["copies"] < rows["joint"]["copies"] - 1
    assert rows["instant"]["copies"] > 7  # two networks, a gradient, two moments of Adam's, Lambda and nu
