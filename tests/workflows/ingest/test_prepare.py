"""`mmdistill prepare`: images become a data set, once, whole or not at all, whatever happens on the way; and runs train on it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from small import ROOT, SMALL, Runner
from stores import bucket, use

from workflows.config.loading import load_config
from workflows.dataset.manifest import is_data_set, read_manifest
from workflows.dataset.readers.decode import decode
from workflows.dataset.shards import decode as decode_shard
from workflows.dataset.shards import held_out, load_shard, read_all
from workflows.errors import ConfigError, UserError
from workflows.ingest import prepare as ingest
from workflows.ingest.options import Preparation, parse_share, parse_split
from workflows.ingest.prepare import prepare_data_set
from workflows.rendering.screen import Screen
from workflows.storage.store import listing, write
from workflows.storage.uri import join

pytestmark = pytest.mark.ray


def pictures(folder, n=240, classes=3, width=12, height=10):
    """n pictures of noise in a subfolder a class; gives their bytes by key."""
    out = {}
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG")
        out[f"class{i % classes}/{i:04d}.png"] = sink.getvalue()
    for name, content in out.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return folder, pictures(folder)


class Prepare:
    def __init__(self, text=""):
        self.text = text

    def __call__(self, source, dest, **options):
        shown = io.StringIO()
        try:
            chosen = {"size": 8, "shard_mb": 0.01} | options
            return prepare_data_set(
                Preparation(str(source), str(dest), **chosen), Screen(Console(file=shown, width=200, highlight=False))
            )
        finally:
            self.text = shown.getvalue()


@pytest.fixture(scope="module")
def prepare(ray_cluster):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "UNIT", 4000)
        patch.setattr(ingest, "SMALL", 20)
        yield Prepare()


# Prepared once for all tests that look at them, or change a copy of them


@pytest.fixture(scope="module")
def plain(source, prepare, tmp_path_factory):
    """(folder, manifest) of the source as it is prepared without options."""
    folder = tmp_path_factory.mktemp("plain") / "set"
    return folder, prepare(source[0], folder)


@pytest.fixture(scope="module")
def grey(source, prepare, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grey") / "set"
    return folder, prepare(source[0], folder, channels=1)


@pytest.fixture(scope="module")
def measured(source, prepare, grey, tmp_path_factory):
    """`grey` with statistics in features of pixels."""
    folder = shutil.copytree(grey[0], tmp_path_factory.mktemp("measured") / "set")
    return folder, prepare(source[0], folder, channels=1, extractor="pixels")


@pytest.fixture(scope="module")
def classified(source, prepare, grey, tmp_path_factory):
    """`grey` with a classifier, and statistics in its features."""
    folder = shutil.copytree(grey[0], tmp_path_factory.mktemp("classified") / "set")
    return folder, prepare(source[0], folder, channels=1, extractor="classifier")


@pytest.fixture
def copied(tmp_path):
    """A copy of one of these, for a test to change."""
    return lambda made, name="set": shutil.copytree(made[0], tmp_path / name)


def all_rows(dest, *names):
    manifest, out = read_manifest(dest), {name: [] for name in names}
    for shard in manifest.shards:
        got = decode_shard(load_shard(dest, shard), manifest, names)
        for name in names:
            out[name] += list(got[name])
    return out


@pytest.mark.parametrize("encoding", ["png", "uint8"])
def test_every_image_is_there_once_as_decoding_gives_it(source, prepare, plain, tmp_path, encoding):
    _, content = source
    if encoding == "png":
        there, manifest = plain
    else:
        there, manifest = tmp_path / "set", prepare(source[0], tmp_path / "set", encoding=encoding)
        assert manifest.fingerprint == plain[1].fingerprint
    rows = all_rows(there, "key", "image", "label", "holdout")
    assert sorted(rows["key"]) == sorted(content)
    for key, image, label in zip(rows["key"], rows["image"], rows["label"], strict=True):
        assert np.array_equal(image, decode(content[key], size=8, channels=3))
        assert label == int(key[5])
    assert np.array_equal(rows["holdout"], held_out(rows["key"], 0.1))
    assert (manifest.count, manifest.held_out) == (240, sum(rows["holdout"]))
    assert manifest.classes == ("class0", "class1", "class2")
    assert manifest.labels == {"0": 80, "1": 80, "2": 80}
    assert len(manifest.shards) > 5
    assert manifest.skipped == {"count": 0, "listed": []}
    assert {"python", "mmdistill", "pillow"} <= manifest.versions.keys()
    left = {name.split("/")[0] for name in listing(there)}
    assert left == {"shards", "manifest.json"}


def test_prepared_again_it_is_left_and_anything_else_refused(source, prepare, plain):
    there, first = plain
    times = {p: p.stat().st_mtime_ns for p in there.rglob("*")}
    said = "labels: 3 classes by folders (class0, class1, class2); captions: none; left out: nothing"
    for touched in (False, True):
        if touched:
            for key in source[1]:
                os.utime(source[0] / key)
        assert prepare(source[0], there) == first
        assert "already holds this data set" in prepare.text
        assert prepare.text.splitlines()[-1].strip() == first.taken["said"] == said
        assert {p: p.stat().st_mtime_ns for p in there.rglob("*")} == times
    with pytest.raises(UserError, match="holds another data set, of 240 images"):
        prepare(source[0], there, size=4)


def test_a_picture_and_its_mirror(source, prepare, tmp_path):
    manifest = prepare(source[0], tmp_path / "set", flip=True, crop="random", holdout=0.4)
    rows = all_rows(tmp_path / "set", "key", "image", "label", "holdout")
    by_key = {key: (image, held) for key, image, held in zip(rows["key"], rows["image"], rows["holdout"], strict=True)}
    assert manifest.count == len(by_key) == 480
    for key in source[1]:
        (image, held), (mirror, also) = by_key[key], by_key[f"{key} mirrored"]
        assert np.array_equal(image[:, :, ::-1], mirror)
        assert held == also, "a picture is not trained on while its mirror is held out"
    assert 0 < manifest.held_out < 480


def test_captions_and_a_share_of_the_source(source, prepare, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({key: f"a picture, {key}" for key in source[1]}))
    manifest = prepare(source[0], tmp_path / "set", captions=str(tmp_path / "captions.json"), limit=120, holdout=0.0)
    rows = all_rows(tmp_path / "set", "key", "caption")
    assert rows["caption"] == [f"a picture, {key}" for key in rows["key"]]
    assert (manifest.count, manifest.held_out) == (120, 0)
    assert "caption" in manifest.columns


def test_latents_and_embeddings_beside_the_images(source, prepare, tmp_path):
    from tiny_models import save_models

    from workflows.ingest.encoders import Latents, TextEmbeddings

    models = save_models(tmp_path / "models")
    (tmp_path / "captions.json").write_text(json.dumps({key: f"a {key[:6]} cat" for key in source[1]}))
    chosen = {"latents": str(models / "vae"), "text_encoder": str(models / "t5"), "limit": 120}
    manifest = prepare(source[0], tmp_path / "set", captions=str(tmp_path / "captions.json"), **chosen)
    rows = all_rows(tmp_path / "set", "key", "image", "caption", "latent", "text", "text_mask")
    vae, text = Latents(chosen["latents"]), TextEmbeddings(chosen["text_encoder"])
    latents = vae(np.stack(rows["image"]), rows["key"])
    np.testing.assert_allclose(np.stack(rows["latent"]), latents, atol=2e-3)
    embedded = text(rows["caption"])
    np.testing.assert_allclose(np.stack(rows["text"]), embedded["embedding"], atol=2e-3)
    assert np.array_equal(np.stack(rows["text_mask"]), embedded["mask"])
    assert manifest.columns["latent"] == {"shape": [4, 4, 4], "dtype": "float16", "of": vae.fingerprint}
    with pytest.raises(UserError, match="has no captions"):
        prepare(source[0], tmp_path / "none", **chosen)
    with pytest.raises(UserError, match="multiple of 2"):
        prepare(source[0], tmp_path / "odd", size=9, latents=chosen["latents"])


def test_what_can_not_be_read_is_counted_named_and_bounded(prepare, tmp_path):
    pictures(tmp_path / "source")
    for i in range(3):
        (tmp_path / f"source/class1/broken{i}.png").write_bytes(b"not an image")
    with pytest.raises(
        UserError, match=r"3 of 243 images can't be read, more than 1.000%; such as class1/broken"
    ) as caught:
        prepare(tmp_path / "source", tmp_path / "set")
    assert "--max-bad" in caught.value.hint
    assert not is_data_set(tmp_path / "set")
    manifest = prepare(tmp_path / "source", tmp_path / "set", max_bad=0.02)
    assert "continues:" in prepare.text, "what was done is kept: the bound is no part of it"
    assert manifest.count == 240
    assert manifest.skipped["count"] == 3
    assert [entry["path"] for entry in manifest.skipped["listed"]] == [f"class1/broken{i}.png" for i in range(3)]
    assert all("not an image" in entry["reason"] for entry in manifest.skipped["listed"])


def test_too_few_images_are_refused(prepare, tmp_path):
    pictures(tmp_path / "source", n=60)
    with pytest.raises(UserError, match="only 60 images can be read; at least 100 are needed"):
        prepare(tmp_path / "source", tmp_path / "set")


def test_a_part_whose_shard_is_gone_is_made_again(source, prepare, plain, tmp_path, monkeypatch):
    """The notes of parts say that they are whole; what they say is looked at."""
    expected = plain[1]
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prepare(source[0], tmp_path / "set")
    made = sorted((tmp_path / "set/shards").iterdir())
    made[0].unlink()
    made[1].write_bytes(made[1].read_bytes()[:-1])
    (tmp_path / "set/shards/litter-of-before.parquet").write_bytes(b"x")
    again = prepare(source[0], tmp_path / "set")
    assert again.fingerprint == expected.fingerprint
    assert prepare.text.splitlines()[-1].strip() == expected.taken["said"]
    assert len(read_all(tmp_path / "set").labels) == 240
    assert not (tmp_path / "set/shards/litter-of-before.parquet").exists()


@pytest.mark.slow
def test_killed_and_started_again_it_goes_on(tmp_path, prepare):
    """SIGKILL in the middle: no manifest; again: the parts that were there are not made again, and the result is the same."""
    source = tmp_path / "source"
    pictures(source, n=600, width=300, height=300)
    words = [sys.executable, "-c", "import sys; from workflows.ingest import prepare as ingest; ingest.UNIT = 200_000; "
             "ingest.SMALL = 20; from workflows.cli.main import main; main(sys.argv[1:])",
             "prepare", str(source), str(tmp_path / "set"), "--size", "32", "--shard-mb", "0.1"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    driver = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              start_new_session=True)  # fmt: skip
    notes = tmp_path / "set/.parts"
    until = time.monotonic() + 180
    while len(list(notes.rglob("*.json"))) < 3:
        assert time.monotonic() < until
        assert driver.poll() is None
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not is_data_set(tmp_path / "set")
    kept = {p.name: p.stat().st_mtime_ns for p in notes.rglob("*.json")}
    assert kept
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "continues:" in done.stdout + done.stderr
    manifest = read_manifest(tmp_path / "set")
    assert manifest.count == 600
    assert manifest.fingerprint == prepare(source, tmp_path / "whole", size=32).fingerprint


def test_options_that_can_not_be():
    assert (parse_share("--max-bad", "1%"), parse_share("--max-bad", "0.01")) == (0.01, 0.01)
    assert (parse_split("train"), parse_split("train,holdout"), parse_split("train, holdout=5%")) == (0.0, 0.1, 0.05)
    for text in ("two", "-1%", "100%", "nan"):
        with pytest.raises(ConfigError, match="is not a share"):
            parse_share("--max-bad", text)
    for text in ("test", "train=0.5", "holdout=2"):
        with pytest.raises(ConfigError, match="--split"):
            parse_split(text)
    for field, value in (("channels", 2), ("crop", "left"), ("encoding", "jpeg")):
        with pytest.raises(ConfigError, match=f"--{field}: {value!r} is not one of"):
            Preparation("a", "b", 8, **{field: value})


# Trained on


def test_a_run_on_a_data_set_held_in_memory_and_streamed(grey, tmp_path, ray_cluster):
    """From the manifest alone: shape and classes are its own. Streamed, two workers each decode what they are to see."""
    short = ["distill.k=[1]", "distill.images=1280", "teacher.images=3840", "evaluate.teacher_steps=[1]"]
    data = [f"data.source=dataset://{grey[0]}", "data.extractor=pixels", "data.reporting=[random]", *short]
    runner = Runner(tmp_path / "workspace")
    summary = runner(*data, until="evaluate")
    assert summary["counts"] == f"100 samples against {grey[1].held_out} images"
    prepared = next((runner.workspace / "stages").glob("prepare-*"))
    assert json.loads((prepared / "result.json").read_text())["classes"] == ["class0", "class1", "class2"]
    assert not (prepared / "data").exists(), "the data set is used where it is"
    held = json.loads(next((runner.workspace / "stages").glob("teacher-*/result.json")).read_text())
    streamed = runner(*data, "data.memory_gib=0", "data.window=2", until="distill", workers=2)
    stages = {s["name"]: s["reused"] for s in streamed["stages"]}
    assert stages == {"prepare": True, "teacher": False, "distill-k1": False}
    results = [json.loads(p.read_text()) for p in (runner.workspace / "stages").glob("teacher-*/result.json")]
    assert len({r["identity"] for r in results}) == 2
    assert {r["images"] for r in results} == {held["images"]} == {3840}


def test_a_run_on_data_of_which_nothing_is_held_out(source, prepare, tmp_path, ray_cluster):
    """Nothing tells how accurate the classifier is, and the report does not say it."""
    prepare(source[0], tmp_path / "set", holdout=0.0, channels=1)
    runner = Runner(tmp_path / "workspace")
    with pytest.raises(UserError, match="holdout has 0 images, too few to measure against"):
        runner(f"data.source=dataset://{tmp_path / 'set'}", until="prepare")
    short = [
        "data.reference=all",
        "distill.k=[1]",
        "teacher.images=1280",
        "distill.images=640",
        "evaluate.teacher_steps=[1]",
    ]
    runner(f"data.source=dataset://{tmp_path / 'set'}", *short)
    page = (runner.workspace / "reports/digits/report.html").read_text()
    assert "those of a small classifier, trained on" in page
    assert "right on" not in page


def test_statistics_of_a_data_set_are_those_that_a_run_would_build(
    source, prepare, grey, measured, copied, tmp_path, ray_cluster
):
    """Asked for later, the shards are left; runs take them as they are, and refuse others than the manifest names."""
    assert grey[1].statistics == {}
    there, manifest = measured
    shards = [{p.name: p.read_bytes() for p in (folder / "shards").iterdir()} for folder in (grey[0], there)]
    assert shards[0] == shards[1]
    assert manifest == read_manifest(there)
    assert {name: about["count"] for name, about in manifest.statistics["rows"].items()} == {
        "all": 240, "holdout": manifest.held_out, "rest": 240 - manifest.held_out,
    }  # fmt: skip
    identities = []
    for name, folder in (("bare", grey[0]), ("set", there)):
        runner = Runner(tmp_path / f"runs-{name}")
        runner(f"data.source=dataset://{folder}", "data.extractor=pixels", until="prepare")
        result = json.loads(next((runner.workspace / "stages").glob("prepare-*/result.json")).read_text())
        identities.append(result["choosing"]["statistics"]["rest"]["identity"])
    assert identities == [manifest.statistics["rows"]["rest"]["identity"]] * 2
    there = copied(measured)
    path = there / "statistics/rest/statistics.safetensors"
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-1] + b"x"), path.unlink):
        damage()
        with pytest.raises(UserError, match="statistics differ from the manifest"):
            Runner(tmp_path / "again")(f"data.source=dataset://{there}", "data.extractor=pixels", until="prepare")


def test_runs_on_a_data_set_measure_in_its_own_features(source, prepare, classified, tmp_path, ray_cluster):
    there, manifest = classified
    assert 0 <= manifest.statistics["accuracy"] <= 1
    runner = Runner(tmp_path / "runs")
    runner(f"data.source=dataset://{there}", "seed=5", until="prepare")
    result = json.loads(next((runner.workspace / "stages").glob("prepare-*/result.json")).read_text())
    choosing = result["choosing"]
    assert choosing["weights"] == manifest.statistics["weights"]
    assert choosing["statistics"]["rest"]["identity"] == manifest.statistics["rows"]["rest"]["identity"]
    assert [one["kind"] for one in result["reporting"]] == ["classifier", "random", "pixels"]
    assert result["reporting"][0]["weights"] != choosing["weights"], "it reports nothing that it chose"
    with pytest.raises(UserError, match="needs labels"):
        prepare(source[0], tmp_path / "none", labels="none", extractor="mixture")
    with pytest.raises(ConfigError, match="belong together"):
        Preparation("a", "b", 8, extractor="inception")


def test_a_data_set_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no data set: there is no manifest\.json"):
        load_config("digits", [f"data.source=dataset://{tmp_path}/none"])
    with pytest.raises(ConfigError, match="needs its path"):
        load_config("digits", ["data.source=dataset"])
    assert SMALL


def test_a_folder_of_classes_is_mixed_over_the_shards(plain):
    """Names are in the order of classes; who reads a few shards at a time sees all of them."""
    there, manifest = plain
    for shard in manifest.shards:
        labels = decode_shard(load_shard(there, shard), manifest, ["label"])["label"]
        assert len(set(labels.tolist())) > 1, shard.file


def test_paths_of_here_mean_the_same_elsewhere(source, prepare, tmp_path, monkeypatch):
    """Tasks of a cluster run in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").symlink_to(source[0])
    manifest = prepare("pictures", "set")
    assert all((tmp_path / "set" / shard.file).exists() for shard in manifest.shards)
    assert prepare("~/pictures", f"file://{tmp_path}/set") == manifest
    for dest in (source[0] / "set", source[0], source[0].parent):
        with pytest.raises(UserError, match="lies in"):
            prepare(source[0], dest)


def test_what_is_gone_is_made_again(source, prepare, measured, copied, tmp_path):
    first = measured[1]
    copied(measured)
    (tmp_path / "set" / first.shards[0].file).unlink()
    again = prepare(source[0], tmp_path / "set", channels=1, extractor="pixels")
    assert "shards are missing, so it is prepared again" in prepare.text
    assert (again.fingerprint, len(read_all(tmp_path / "set").labels)) == (first.fingerprint, 240)
    (tmp_path / "set/statistics/all/statistics.json").unlink()
    assert prepare(source[0], tmp_path / "set", channels=1, extractor="pixels") == again
    assert (tmp_path / "set/statistics/all/statistics.json").exists()


def test_notes_that_are_half_or_lacked_rights_do_not_count(tmp_path):
    note = {"number": 1, "made": [], "images": 0, "bad": 1, "listed": [], "denied": 0}
    for name, content in (("00001.json", note), ("00002.json", note | {"number": 2, "denied": 1})):
        write(tmp_path / "notes" / name, json.dumps(content).encode())
    (tmp_path / "notes/.00003.json.17.partial").write_text("{")
    assert list(ingest._finished_parts(str(tmp_path / "notes"), str(tmp_path))) == [1]


def test_an_extractor_that_is_not_the_manifests_is_refused(measured, classified, copied, tmp_path):
    copied(classified)
    shutil.rmtree(tmp_path / "set/extractor")
    data = f"data.source=dataset://{tmp_path}/set"
    with pytest.raises(UserError, match="extractor: "):
        Runner(tmp_path / "runs")(data, until="prepare")
    shutil.copytree(measured[0] / "extractor", tmp_path / "set/extractor")
    with pytest.raises(UserError, match="not the extractor that the manifest names"):
        Runner(tmp_path / "runs")(data, until="prepare")


def test_few_rows_held_out_have_no_statistics_of_their_own(source, prepare, tmp_path):
    bare = prepare(source[0], tmp_path / "bare", channels=1, holdout=0.0, extractor="classifier")
    assert (bare.statistics["accuracy"], set(bare.statistics["rows"])) == (None, {"all"})
    json.loads((tmp_path / "bare/manifest.json").read_text(), parse_constant=pytest.fail)
    with pytest.raises(UserError, match="--extractor: classifier needs labels"):
        prepare(source[0], tmp_path / "unlabelled", labels="none", extractor="classifier")
    with pytest.raises(UserError, match="--extractor: pixels is for at most 4,096"):
        prepare(source[0], tmp_path / "large", size=64, extractor="pixels")
    (tmp_path / "weights.pth").write_text("no tensors")
    with pytest.raises(UserError, match="--extractor-weights: "):
        prepare(source[0], tmp_path / "odd", extractor="inception", extractor_weights=str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("kind", ["moto"])
def test_from_a_bucket_to_a_bucket(source, prepare, plain, tmp_path, moto_server, monkeypatch, kind):
    monkeypatch.setenv("MMDISTILL_CACHE", str(tmp_path / "cache"))
    use(monkeypatch, moto_server)
    place = bucket(moto_server, "prepare-there")
    for key, content in source[1].items():
        write(join(place, "raw", key), content)
    manifest = prepare(join(place, "raw"), join(place, "set"))
    assert manifest.fingerprint == plain[1].fingerprint
    assert np.array_equal(np.sort(read_all(join(place, "set")).labels), np.sort(read_all(plain[0]).labels))
