"""Whatever the units' size and the limit, all units together are the source: every key once."""

import tarfile
import zipfile
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import png, read
from test_tars import tarred

from workflows.dataset.readers import list_source
from workflows.dataset.readers.spread import evenly, grouped

SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=60)


@given(st.integers(1, 200), st.integers(1, 200), st.lists(st.integers(0, 200), max_size=5))
def test_parts_of_what_is_taken_are_all_of_it(n, limit, cuts):
    whole = evenly(n, limit).tolist()
    assert whole == [i * n // min(limit, n) for i in range(min(limit, n))]
    ends = sorted({0, n, *(cut for cut in cuts if cut < n)})
    parts = [evenly(n, limit, first=a, last=b).tolist() for a, b in pairwise(ends)]
    assert [i for part in parts for i in part] == whole
    assert all(a <= i < b for part, a, b in zip(parts, ends, ends[1:], strict=False) for i in part)


@given(SIZES, st.integers(1, 100), st.none() | st.integers(1, 10))
def test_groups_are_all_neighbours_in_order(sizes, most, count):
    groups = grouped(sizes, most, count=count)
    assert [i for a, b in groups for i in range(a, b)] == list(range(len(sizes)))
    for a, b in groups[:-1]:
        assert sum(sizes[a:b]) >= most or b - a == count
        assert sum(sizes[a : b - 1]) < most


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Each kind of source, of 37 images in a few files; with the keys it has."""
    root = tmp_path_factory.mktemp("sources")
    (root / "images").mkdir()
    for i in range(37):
        (root / "images" / f"{i:02}.png").write_bytes(png(i, width=i + 1))
    for kind in ("zip", "parquet", "tar", "arrow"):
        (root / kind).mkdir()
    ends = [0, 5, 6, 20, 37]
    for part, (a, b) in enumerate(pairwise(ends)):
        with zipfile.ZipFile(root / "zip" / f"{part}.zip", "w") as archive:
            for i in range(a, b):
                archive.writestr(f"{i:02}.png", png(i, width=i + 1))
        table = pa.table({"image": [png(i, width=i + 1) for i in range(a, b)]})
        pq.write_table(table, root / "parquet" / f"{part}.parquet", row_group_size=3)
        tarred(root / "tar" / f"{part}.tar", [(f"{i:02}.png", png(i, width=i + 1)) for i in range(a, b)])
        with pa.ipc.new_stream(str(root / "arrow" / f"{part}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    return root


@pytest.mark.parametrize("kind", ["images", "zip", "parquet", "tar", "arrow"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(unit_bytes=st.integers(1, 60_000), limit=st.none() | st.integers(1, 50))
def test_every_key_exactly_once(sources, kind, unit_bytes, limit):
    listing = list_source(str(sources / kind), unit_bytes=unit_bytes, limit=limit, labels="none")
    items = read(listing)
    assert all(item.error is None for item in items)
    keys = [item.key for item in items]
    assert len(set(keys)) == len(keys)
    evened = kind not in ("tar", "arrow")
    expected = evenly(37, limit).tolist() if evened else list(range(min(37, limit or 37)))
    assert [item.image for item in items] == [png(i, width=i + 1) for i in expected]
    assert listing.count == (len(items) if evened or limit else None)


@pytest.mark.parametrize("kind", ["images", "zip", "parquet", "tar", "arrow"])
def test_a_listing_is_the_same_every_time(sources, kind):
    first, second = (list_source(str(sources / kind), unit_bytes=5000, limit=30) for _ in range(2))
    assert first == second
    assert len(first.units) > 2
    assert first.fingerprint == list_source(str(sources / kind)).fingerprint


def test_nothing_is_unpacked(sources, tmp_path, monkeypatch):
    """No file is opened for writing, and no archive is extracted."""
    import builtins

    opened = builtins.open

    def reading(file, mode="r", *args, **options):
        assert not set(mode) & set("wax+"), file
        return opened(file, mode, *args, **options)

    monkeypatch.setattr(builtins, "open", reading)
    for archive in (tarfile.TarFile, zipfile.ZipFile):
        for name in ("extract", "extractall"):
            monkeypatch.setattr(archive, name, lambda *args, **options: pytest.fail("extracted"))
    for kind in Path(sources).iterdir():
        assert len(read(list_source(str(kind)))) == 37
