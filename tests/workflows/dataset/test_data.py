"""Data sets of shards: what goes in comes out, damage is found, and a stream is a function of its position."""

import hashlib
import json
import time
from dataclasses import replace

import numpy as np
import pytest

import workflows.dataset.manifest as manifests
from workflows.config.loading import load_config, recipe_names
from workflows.dataset.manifest import MANIFEST, Shard, is_data_set, read_manifest, write_manifest
from workflows.dataset.shards import (
    Rows,
    decode,
    held_out,
    label_pool,
    load_shard,
    manifest_of,
    read_all,
    save_shard,
    write_shards,
)
from workflows.dataset.streaming import Ahead, Plan, StreamedBatches, spread
from workflows.errors import ConfigError, UserError

SHAPE = (3, 4, 4)


def rows(n=12, encoding="uint8", start=0):
    """Rows whose label is their number, so that each can be told from the others."""
    rng = np.random.default_rng(start)
    images = rng.integers(0, 256, (n, *SHAPE), dtype=np.uint8)
    if encoding == "float32":
        images = (images / 127.5 - 1).astype(np.float32)
    keys = [f"image-{start + i}" for i in range(n)]
    captions = [None if i % 3 else f"a caption, ü {i}" for i in range(n)]
    return Rows(images, np.arange(start, start + n), held_out(keys, 0.3), keys, captions)


def data_set(root, counts=(30, 20, 40, 10, 25), encoding="uint8"):
    made, first = [], 0
    for i, n in enumerate(counts):
        made.append(save_shard(root, f"shards/{i}.parquet", rows(n, encoding, first), encoding))
        first += n
    manifest = manifest_of(made, source="test", shape=SHAPE, encoding=encoding, num_classes=first)
    write_manifest(root, manifest)
    return manifest


@pytest.mark.parametrize("encoding", ["float32", "uint8", "png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_rows_come_back(tmp_path, encoding, channels):
    given = rows(12, "float32" if encoding == "float32" else "uint8")
    given = replace(given, images=given.images[:, :channels], columns={"latent": np.ones((12, 2, 3), np.float16)})
    made = save_shard(tmp_path, "a.parquet", given, encoding)
    manifest = manifest_of([made], source="t", shape=(channels, 4, 4), encoding=encoding, num_classes=12,
                           columns={"latent": {"shape": [2, 3], "dtype": "float16"}})  # fmt: skip
    names = ("image", "label", "holdout", "key", "caption", "latent")
    got = decode(load_shard(tmp_path, manifest.shards[0]), manifest, names)
    assert np.array_equal(got["image"], given.images)
    assert got["image"].dtype == given.images.dtype
    assert np.array_equal(got["label"], given.labels)
    assert np.array_equal(got["holdout"], given.holdout)
    assert (got["key"], got["caption"]) == (list(given.keys), list(given.captions))
    assert np.array_equal(got["latent"], given.columns["latent"])


def test_the_fingerprint_is_of_the_rows_not_of_their_cut(tmp_path):
    whole, parts = rows(60), [rows(60)]
    order = np.random.default_rng(1).permutation(60)

    def some(index):
        pick = lambda values: [values[i] for i in index]  # noqa: E731
        return Rows(
            whole.images[index], whole.labels[index], whole.holdout[index], pick(whole.keys), pick(whole.captions)
        )

    def fingerprints(parts, encoding="uint8"):
        made = [save_shard(tmp_path, f"{i}.parquet", part, encoding) for i, part in enumerate(parts)]
        manifest = manifest_of(made, source="t", shape=SHAPE, encoding=encoding, num_classes=60)
        return manifest.fingerprint, manifest.held_fingerprint

    expected = fingerprints(parts)
    assert fingerprints([some(order[:25]), some(order[25:])]) == expected
    assert fingerprints(parts, "png") == expected
    assert fingerprints([some(order[:59])])[0] != expected[0]
    assert fingerprints([replace(whole, labels=whole.labels[::-1])])[0] != expected[0]
    changed = whole.images.copy()
    changed[7, 0, 0, 0] ^= 1
    assert fingerprints([replace(whole, images=changed)])[0] != expected[0]
    held = replace(whole, holdout=~whole.holdout)
    assert fingerprints([held])[0] == expected[0]
    assert fingerprints([held])[1] != expected[1]


def test_a_folder_without_its_manifest_is_no_data_set(tmp_path):
    data_set(tmp_path)
    assert is_data_set(tmp_path)
    assert read_manifest(f"{tmp_path}/{MANIFEST}") == read_manifest(tmp_path)
    (tmp_path / MANIFEST).unlink()
    assert not is_data_set(tmp_path)
    with pytest.raises(UserError, match=r"no data set: there is no manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: "[]", "format None, this version reads 2"),
        (lambda text: json.dumps(json.loads(text) | {"format": 1}), "format 1, this version reads 2"),
        (lambda text: json.dumps(json.loads(text) | {"surprise": 1}), "has missing or unknown fields"),
        (
            lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "shape"}),
            "has missing or unknown",
        ),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path, change, said):
    data_set(tmp_path)
    file = tmp_path / MANIFEST
    file.write_text(change(file.read_text()))
    with pytest.raises(UserError, match=said) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_shard_is_named(tmp_path):
    data_set(tmp_path)
    file = tmp_path / "shards/2.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"shards/2.parquet: the shard differs from its manifest"):
        read_all(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"shards/2.parquet: the shard is missing"):
        read_all(tmp_path)


def test_all_rows_are_read_in_order(tmp_path):
    manifest = data_set(tmp_path)
    everything = read_all(tmp_path)
    assert np.array_equal(everything.labels, np.arange(125))
    held = read_all(tmp_path, "holdout")
    assert np.array_equal(held.labels, everything.labels[everything.holdout])
    assert manifest.rows("holdout") == len(held.labels) > 0
    assert manifest.rows("rest") == len(read_all(tmp_path, "rest").labels) == 125 - len(held.labels)


def test_labels_to_draw_from(tmp_path):
    images = np.random.default_rng(0).random((200, 1, 2, 2))
    labels = np.repeat([0, 2], [150, 50])
    write_shards(tmp_path, source="t", images=images, labels=labels, num_classes=3, holdout=0.2, rows=70)
    assert np.array_equal(label_pool(tmp_path, "all", most=10**6), labels)
    counted = np.bincount(label_pool(tmp_path, "all", most=0), minlength=3)
    assert counted.tolist() == [150, 0, 50]


@pytest.mark.parametrize("which", ["all", "holdout", "rest"])
def test_labels_to_draw_from_a_large_data_set_are_those_of_the_rows(tmp_path, monkeypatch, which):
    images, labels = np.zeros((400, 1, 2, 2)), np.repeat([0, 1], [300, 100])
    labels[held_out([str(i) for i in range(400)], 0.2)] = 2  # a class of which all rows are held out
    write_shards(tmp_path, source="t", images=images, labels=labels, num_classes=3, holdout=0.2, rows=70)
    expected = np.bincount(read_all(tmp_path, which).labels, minlength=3)
    assert np.bincount(label_pool(tmp_path, which, most=0), minlength=3).tolist() == expected.tolist()
    monkeypatch.setattr("workflows.dataset.shards.POOL", 50)
    few = np.bincount(label_pool(tmp_path, which, most=0), minlength=3)
    assert few == pytest.approx(expected * min(1, 50 / expected.sum()), abs=1)


@pytest.mark.parametrize("which", ["all", "rest"])
def test_a_large_data_set_without_classes_has_the_label_0_to_draw(tmp_path, which):
    labels = np.zeros(200, int)
    write_shards(
        tmp_path, source="t", images=np.zeros((200, 1, 2, 2)), labels=labels, num_classes=0, holdout=0.2, rows=70
    )
    assert np.array_equal(label_pool(tmp_path, which, most=0), read_all(tmp_path, which).labels)


# The plan of a stream


def shards(*counts):
    return tuple(Shard(f"{i}", n, n // 5, 1, "") for i, n in enumerate(counts))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_the_workers_together_take_every_shard_once_an_epoch(world, window):
    manifest = replace(
        manifest_of([], source="t", shape=SHAPE, encoding="uint8", num_classes=0), shards=shards(*[10] * 7)
    )
    plans = [Plan(manifest, "all", seed=0, rank=r, world=world, window=window) for r in range(world)]
    each, epochs = plans[0].each, 3 * world
    seen = [plans[number % world][number // world] for number in range(epochs * each)]
    orders = []
    for epoch in range(epochs):
        files = [shard.file for w in seen[epoch * each : (epoch + 1) * each] for shard in w.shards]
        assert sorted(files) == [str(i) for i in range(7)]
        orders.append(tuple(files))
    assert len(set(orders)) > 1, "each epoch has its own order"
    assert len({w.seed for w in seen}) == len(seen)


def test_a_position_is_found():
    manifest = replace(
        manifest_of([], source="t", shape=SHAPE, encoding="uint8", num_classes=0), shards=shards(10, 20, 5)
    )
    plan = Plan(manifest, "rest", seed=0, rank=0, world=1, window=2)
    sizes = [plan.rows(m) for m in range(4)]
    assert sum(sizes[:2]) == 35 - 7
    flat = [(m, i) for m, n in enumerate(sizes) for i in range(n)]
    assert [plan.find(position) for position in range(len(flat))] == flat


# The stream


def stream(root, manifest, *, rank=0, world=1, window=2, batch=8, which="all", seed=0):
    return StreamedBatches(root=str(root), manifest=manifest, which=which, global_batch=batch, seed=seed, rank=rank, world=world,
                           window=window)  # fmt: skip


def take(batches, first, n, batch=8):
    """The labels of n batches from image `first` on."""
    out = [batches(first + i * batch).label.tolist() for i in range(n)]
    batches.close()
    return out


def flat(parts):
    return [value for part in parts for value in part]


def test_a_stream_sees_every_image_once_an_epoch(tmp_path):
    manifest = data_set(tmp_path)
    got = flat(take(stream(tmp_path, manifest, batch=5), 0, 75, batch=5))
    for epoch in range(3):
        assert sorted(got[epoch * 125 : (epoch + 1) * 125]) == list(range(125))
    assert got[:125] != got[125:250]
    assert got[:125] != sorted(got[:125])
    other = flat(take(stream(tmp_path, manifest, batch=5, seed=1), 0, 25, batch=5))
    assert other != got[:125]


def test_a_streams_images_belong_to_their_labels(tmp_path):
    manifest, whole = data_set(tmp_path), None
    whole = read_all(tmp_path)
    batches = stream(tmp_path, manifest, which="rest")
    batch = batches(0)
    batches.close()
    assert batch.x.min() >= -1
    assert batch.x.max() <= 1
    for x, label in zip(batch.x.numpy(), batch.label.tolist(), strict=True):
        assert not whole.holdout[label]
        assert np.allclose(x, whole.images[label] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_resumed_stream_goes_on_where_it_was(tmp_path, world):
    manifest, batch = data_set(tmp_path), 6
    for rank in range(world):
        whole = take(stream(tmp_path, manifest, rank=rank, world=world, batch=batch), 0, 60, batch=batch)
        for start in (1, 17, 41):
            again = stream(tmp_path, manifest, rank=rank, world=world, batch=batch)
            assert take(again, start * batch, 60 - start, batch=batch) == whole[start:]


def test_a_stream_that_goes_on_with_other_workers_stays_within_its_bound(tmp_path):
    """Two workers, then three: what is seen twice or not at all in that epoch is at most the five windows that were open."""
    counts, window, batch = [12] * 40, 1, 6
    manifest = data_set(tmp_path, counts)
    position = 240  # images, half an epoch

    def seen(world, first, last):
        n = (last - first) // batch
        parts = [take(stream(tmp_path, manifest, rank=r, world=world, batch=batch, window=window), first, n, batch=batch)
                 for r in range(world)]  # fmt: skip
        return flat(flat(parts))

    got = seen(2, 0, position) + seen(3, position, 480)
    times = np.bincount(got, minlength=480)
    assert len(got) == 480
    twice, never = int((times > 1).sum()), int((times == 0).sum())
    assert twice == never <= (2 + 3) * window * 12


@pytest.mark.ray
def test_decoded_by_tasks_the_stream_is_the_same(tmp_path, ray_cluster):
    png, raw = data_set(tmp_path / "png", encoding="png"), data_set(tmp_path / "raw")
    decoded = take(stream(tmp_path / "png", png), 0, 30)
    assert decoded == take(stream(tmp_path / "raw", raw), 0, 30)
    again = stream(tmp_path / "png", png)
    assert take(again, 19 * 8, 11) == decoded[19:]


def test_an_error_is_raised_where_it_is_met(tmp_path):
    manifest = data_set(tmp_path)
    (tmp_path / "shards/3.parquet").unlink()
    batches = stream(tmp_path, manifest)
    with pytest.raises(UserError, match=r"shards/3.parquet: the shard is missing"):
        take(batches, 0, 60)
    batches.close()


def test_reading_ahead_ends_when_it_is_closed():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield np.zeros(1), np.zeros(1)

    ahead = Ahead(endless())
    next(ahead)
    ahead.close()
    n = len(taken)
    assert n <= 4
    assert not any(thread.is_alive() for thread in ahead._pool._threads)
    assert len(taken) == n


@pytest.mark.ray
def test_work_is_spread_and_all_of_it_comes(ray_cluster):
    def work(item):
        for i in range(item):
            yield {"item": item, "i": i}

    got = list(spread(list(range(9)), work, at_once=2, options={"num_cpus": 1}))
    assert sorted((row["item"], row["i"]) for row in got) == [(n, i) for n in range(9) for i in range(n)]


def test_who_is_held_out_is_as_fine_as_the_share_and_stays_for_whole_256ths():
    keys = [f"image {i}" for i in range(40_000)]
    first = np.array([hashlib.blake2b(key.encode(), digest_size=4).digest()[0] for key in keys])
    for k in (1, 26, 52, 128, 255):
        assert np.array_equal(held_out(keys, k / 256), first < k)
    assert not held_out(keys, 0.0).any()
    before = held_out(keys, 0.0)
    for share in (0.0005, 0.001, 0.003, 0.01, 0.1, 0.35):
        now = held_out(keys, share)
        assert now.mean() == pytest.approx(share, abs=4 * np.sqrt(share / len(keys)))
        assert now[before].all(), "who is held out with a smaller share is so with a larger one"
        before = now


def test_the_default_holds_out_the_images_that_figures_were_made_with():
    """Before, a share was rounded up to whole 1/256, and the default was .2."""
    keys = [str(i) for i in range(2000)]
    first = np.array([hashlib.blake2b(key.encode(), digest_size=4).digest()[0] for key in keys])
    assert np.array_equal(held_out(keys, load_config("digits").data.holdout), first / 256 < 0.2)


@pytest.mark.parametrize("encoding", ["float32", "png"])
@pytest.mark.parametrize("which", ["all", "holdout", "rest"])
def test_labels_to_draw_come_from_their_column_alone(tmp_path, monkeypatch, encoding, which):
    manifest = data_set(tmp_path, encoding=encoding)
    expected = read_all(tmp_path, which).labels
    monkeypatch.setattr("workflows.dataset.shards.decode", pytest.fail)
    monkeypatch.setattr("workflows.dataset.shards.load_shard", pytest.fail)
    assert label_pool(tmp_path, which, most=2**30).tolist() == expected.tolist()
    (tmp_path / manifest.shards[1].file).write_bytes(b"no Parquet")
    with pytest.raises(UserError, match=r"1\.parquet: the shard differs from its manifest"):
        label_pool(tmp_path, which, most=2**30)
    (tmp_path / manifest.shards[1].file).unlink()
    with pytest.raises(UserError, match=r"1\.parquet: the shard is missing"):
        label_pool(tmp_path, which, most=2**30)


@pytest.mark.parametrize("place", ["here", "memory://known/set"])
def test_a_manifest_is_read_once_for_a_configuration_and_again_when_it_is_another(tmp_path, monkeypatch, place):
    root = str(tmp_path) if place == "here" else place
    manifest = data_set(root)
    reads = []
    read = manifests.read
    monkeypatch.setattr(manifests, "read", lambda uri: reads.append(uri) or read(uri))
    asked = [f"data.source=dataset://{root}", "data.extractor=pixels"]
    for _ in range(3):
        assert load_config("digits", asked).data.source == "dataset"
    assert len(reads) == 1
    write_manifest(root, replace(manifest, num_classes=0))
    assert manifests.known_manifest(root).num_classes == 0
    assert len(reads) == 2
    if place == "here":  # by another process
        path = tmp_path / MANIFEST
        path.write_text(path.read_text().replace('"num_classes": 0', '"num_classes": 125'))
    else:
        clock = time.monotonic() + 2 * manifests.KNOWN
        monkeypatch.setattr(manifests.time, "monotonic", lambda: clock)
    assert manifests.known_manifest(root) == read_manifest(root)
    assert len(reads) == 4


def test_a_data_set_serves_any_recipe_in_small(tmp_path):
    """What a recipe says of its own data says nothing of it, and nobody set a limit."""
    images = np.random.default_rng(0).random((120, 3, 24, 24))
    write_shards(tmp_path, source="x", images=images, labels=np.arange(120) % 4, num_classes=4, holdout=0.1, rows=60)
    for recipe in recipe_names():
        config = load_config(recipe, [f"data.source=dataset://{tmp_path}"], smoke=True)
        assert (config.data.source, config.data.limit, config.data.image_size) == ("dataset", None, None)
        assert config.data.extractor is None
    with pytest.raises(ConfigError, match="limit: belongs to the preparation"):
        load_config("digits", [f"data.source=dataset://{tmp_path}", "data.limit=100"], smoke=True)
    with pytest.raises(ConfigError, match="exact is not known for dataset"):
        load_config("gmm", [f"data.source=dataset://{tmp_path}", "teacher.kind=exact"])


def test_a_configuration_is_shown_without_its_data_set(monkeypatch, capsys):
    from workflows.cli.main import main

    monkeypatch.setattr(manifests, "read", pytest.fail)
    for recipe in recipe_names():
        with pytest.raises(SystemExit) as ended:
            main(["config", "-r", recipe, "--set", "data.source=dataset://s3://nowhere/set"])
        assert ended.value.code == 0
        assert "path: s3://nowhere/set" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["config", "--set", "data.source=dataset://s3://nowhere/set", "--set", "network.heads=5"])
    assert (ended.value.code, "network.heads: 5 does not divide" in capsys.readouterr().err) == (2, True)
