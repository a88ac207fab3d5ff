"""Sources in S3, through a server of S3's interface: folders, tars and Parquet, and what a store refuses."""

import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import Faults
from pictures import errors, good, load, png, read
from stores import moto, use
from test_tars import samples, tarred

from workflows.dataset.readers import list_source, read_unit
from workflows.errors import UserError
from workflows.storage import s3

OPTIONS = {"key": "testing", "secret": "hidden-secret"}


def unreachable():
    """A filesystem whose server is away."""
    import s3fs

    quick = {"connect_timeout": 1, "retries": {"max_attempts": 0}}
    away = s3fs.S3FileSystem(
        endpoint_url="http://127.0.0.1:9", config_kwargs=quick, skip_instance_cache=True, **OPTIONS
    )
    away.retries = 1
    return away


@pytest.fixture
def bucket(moto_server, request):
    """(filesystem, name of a bucket of this test's own)."""
    import s3fs

    filesystem = s3fs.S3FileSystem(endpoint_url=moto_server, skip_instance_cache=True, **OPTIONS)
    name = request.node.name.replace("_", "-")[:60].strip("-")
    filesystem.mkdir(name)
    return filesystem, name


def test_a_prefix_of_images(bucket, tmp_path):
    filesystem, name = bucket
    for c in ("cats", "dogs"):
        filesystem.pipe({f"{name}/deep/{c}/{i} [x]*.png": png(i) for i in range(20)})
    source = f"s3://{name}/deep"
    listing, items = load(source, filesystem, unit_bytes=2000)
    assert (listing.kind, listing.count, listing.classes) == ("images", 40, ("cats", "dogs"))
    assert {item.key: item.image for item in items} == {
        f"{c}/{i} [x]*.png": png(i) for c in ("cats", "dogs") for i in range(20)
    }
    assert "hidden-secret" not in str(listing)
    filesystem.pipe(f"{name}/deep/cats/0 [x]*.png", png(99))
    assert list_source(source, filesystem=filesystem).fingerprint != listing.fingerprint
    filesystem.rm_file(f"{name}/deep/cats/1 [x]*.png")
    filesystem.pipe(f"{name}/deep/cats/empty.png", b"")
    filesystem.pipe(f"{name}/deep/cats/3 [x]*.png", b"shorter")
    found = errors(read(listing, filesystem))
    assert found.pop("cats/1 [x]*.png") == "it is no longer there"
    assert found.pop("cats/3 [x]*.png").startswith("changed since it was listed: ")
    assert not found.keys() - {"cats/0 [x]*.png"}  # another image now, of the same number of bytes or not
    assert b"" in {item.image for item in load(source, filesystem)[1]}  # decode says what is wrong with it
    filesystem.pipe(f"{name}/deep/labels.json", b'{"cats/2 [x]*.png": "a"}')
    with pytest.raises(UserError, match="no label for 39 of 40 images"):
        list_source(source, filesystem=filesystem, labels="labels.json")
    with pytest.raises(UserError, match="no label for 39 of 40 images"):
        list_source(source, filesystem=filesystem, labels=f"s3://{name}/deep/labels.json")


def test_files_beside_images_and_without_suffixes(bucket):
    filesystem, name = bucket
    for i in range(40):
        filesystem.pipe({f"{name}/{i:02}.png": png(i), f"{name}/{i:02}.txt": f"number {i}".encode()})
    for i in range(3):
        filesystem.pipe({f"{name}/raw{i}": png(50 + i), f"{name}/x{i}.unknown": b"x", f"{name}/e{i}": b""})
    listing, items = load(f"s3://{name}", filesystem, unit_bytes=2000)
    assert {item.key: item.caption for item in items} == {f"{i:02}.png": f"number {i}" for i in range(40)} | {
        f"raw{i}": None for i in range(3)
    }
    assert listing.left_out == ((".unknown", "not images", 3), ("no suffix", "not images", 3))


def test_tars_zips_and_tables(bucket, moto_server, tmp_path, monkeypatch):
    """By the filesystem that everything else here reads stores with."""
    filesystem, name = bucket
    use(monkeypatch, moto_server)
    ours = s3.reading_filesystem(f"s3://{name}")
    tarred(tmp_path / "x.tar.gz", samples(0, 20), "w:gz")
    pq.write_table(pa.table({"image": [png(i) for i in range(20)]}), tmp_path / "x.parquet", row_group_size=7)
    shutil.make_archive(str(tmp_path / "x"), "zip", root_dir=_images(tmp_path / "plain"))
    for file in ("x.tar.gz", "x.parquet", "x.zip"):
        filesystem.put(str(tmp_path / file), f"{name}/{file}")
        _, items = load(f"s3://{name}/{file}", ours, unit_bytes=2000)
        assert sorted(item.image for item in good(items).values()) == sorted(png(i) for i in range(20)), file
    assert sorted(item.key for item in load(f"s3://{name}/*.zip", filesystem)[1])[0] == "x.zip#0.png"


def test_a_bad_network_loses_nothing(bucket, moto_server, tmp_path, monkeypatch):
    """Reading one unit takes many requests. Each is retried by itself."""
    filesystem, name = bucket
    for i in range(60):
        filesystem.pipe(f"{name}/folder/{i}.png", png(i))
    pq.write_table(pa.table({"image": [png(i) for i in range(20)]}), tmp_path / "x.parquet", row_group_size=2)
    filesystem.put(str(tmp_path / "x.parquet"), f"{name}/x.parquet")
    with Faults(moto_server, refused=0.1, cut=0.05, lost=0.02) as faults:
        use(monkeypatch, faults.url)
        patient = s3.reading_filesystem(f"s3://{name}")
        for source, n in (("folder", 60), ("x.parquet", 20)):
            _, items = load(f"s3://{name}/{source}", patient)
            assert sorted(item.image for item in good(items).values()) == sorted(png(i) for i in range(n)), source
    assert faults.counts["refused"] > 3, faults.counts
    assert faults.counts["cut"] + faults.counts["lost"] > 2, faults.counts


def _images(folder):
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.png").write_bytes(png(i))
    return folder


def test_stores_that_can_not_be_used_are_a_line(bucket, moto_server, monkeypatch):
    import s3fs

    filesystem, name = bucket
    for source, said in (
        (f"s3://{name}/nothing", "nothing does not exist"),
        ("s3://no-such-bucket-1/x", "does not exist"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            list_source(source, filesystem=filesystem)
        assert "\n" not in str(caught.value)
    quick = {"connect_timeout": 1, "retries": {"max_attempts": 0}}
    away = s3fs.S3FileSystem(
        endpoint_url="http://127.0.0.1:9", config_kwargs=quick, skip_instance_cache=True, **OPTIONS
    )
    away.retries = 1
    with pytest.raises(UserError, match="can't be listed: Could not connect to the endpoint") as caught:
        list_source(f"s3://{name}/x", filesystem=away)
    assert "hidden-secret" not in str(caught.value)
    for variable in [key for key in os.environ if key.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    nobody = s3fs.S3FileSystem(endpoint_url=moto_server, skip_instance_cache=True)
    with pytest.raises(UserError, match="can't be listed: Unable to locate credentials"):
        list_source(f"s3://{name}/x", filesystem=nobody)


def test_an_outage_is_raised_and_not_blamed_on_an_image(bucket):
    """What a task raises is tried again; an error of an item would be kept for good."""
    filesystem, name = bucket
    filesystem.pipe({f"{name}/{i}.png": png(i) for i in range(3)})
    listing = list_source(f"s3://{name}", filesystem=filesystem)
    with pytest.raises(Exception, match="Could not connect") as caught:
        list(read_unit(listing, listing.units[0], unreachable()))
    assert not isinstance(caught.value, UserError)


def test_a_store_that_refuses_the_credentials_is_a_line():
    import s3fs

    with moto(INITIAL_NO_AUTH_ACTION_COUNT="0") as url:
        stranger = s3fs.S3FileSystem(endpoint_url=url, skip_instance_cache=True, **OPTIONS)
        with pytest.raises(UserError, match="s3://box/x can't be read: ") as caught:
            list_source("s3://box/x", filesystem=stranger)
    assert "hidden-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
