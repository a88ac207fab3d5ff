"""Lineage from the registry alone: the tree, JSON, the drawing, exports, and what is said where something is missing."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from registered import STUDENT, TEACHER, Shelf
from rich.console import Console
from small import ROOT

from workflows.cli.main import main
from workflows.errors import UserError
from workflows.registry import lineage as stage
from workflows.registry.drawing import draw
from workflows.registry.leftovers import leftovers
from workflows.registry.promote import promote
from workflows.registry.versions import Export, now
from workflows.storage.uri import shown
from workflows.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A teacher; students of 8 and 4 steps, the latter started from the former; champions, and an export."""
    shelf = Shelf(tmp_path_factory.mktemp("shelf"))
    shelf.teacher()
    eight = shelf.student(8)
    four = shelf.student(4, frechet=0.2, whole=True)
    shelf.registry.set_tags(four, {"start_name": STUDENT, "start_version": eight.version})
    promote(shelf.registry, eight, "k8-champion", who="ada", why="the first [of all]")
    promote(shelf.registry, shelf.student(8, frechet=0.9), "k8-champion", who="bob", why="a demonstration", force=True)
    shelf.registry.record_export(eight, Export("onnx", "s3://there/it", "0" * 64, now(), "ada"))
    return shelf


def command(shelf, tmp_path, *words):
    words = [sys.executable, "-m", "workflows", *words, "--tracking-uri", shelf.uri]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tree_has_all_of_it_and_needs_no_workspace(shelf, tmp_path):
    shown = command(shelf, tmp_path, "lineage", STUDENT)
    at = 0
    for text in (
        "data feed  digits  240 images", f"teacher {TEACHER} v1", f"evaluation run {'e' * 32}", "distance 0.04",
        f"student {STUDENT} v1  k = 8", "distance 0.1 ± 0.01, recall 0.8 in 8 steps", "0.2 of the teacher's 0.5 at the same steps",
        "1,000 samples, 3 seeds, reference beef (240 images)", "export onnx  s3://there/it",
        f"student {STUDENT} v2  k = 4  from models:/{STUDENT}/1", f"student {STUDENT} v3  k = 8  @k8-champion", "aliases",
        f"{STUDENT}@k8-champion  none → 1  ada, gate  the first [of all]",
        f"{STUDENT}@k8-champion  1 → 3  bob, forced  a demonstration; against: distance 0.9",
    ):  # fmt: skip
        at = shown.index(text, at)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "students"),
    [(STUDENT, ["1", "2", "3"]), (f"models:/{STUDENT}/2", ["2"]), (f"models:/{STUDENT}@k8-champion", ["3"]),
     (TEACHER, ["1", "2", "3"]), (f"models:/{TEACHER}/1", ["1", "2", "3"])],
)  # fmt: skip
def test_what_is_asked_for(shelf, model, students):
    (data,) = stage.lineage(shelf.registry, model)["data"]
    (teacher,) = data["teachers"]
    assert (data["fingerprint"], teacher["uri"], teacher["registered"]) == ("feed", f"models:/{TEACHER}/1", True)
    assert [s["version"] for s in teacher["students"]] == students


def test_json_is_the_same(shelf, tmp_path):
    found = json.loads(command(shelf, tmp_path, "lineage", f"models:/{STUDENT}/1", "--json"))
    assert found == stage.lineage(shelf.registry, f"models:/{STUDENT}/1")
    (student,) = found["data"][0]["teachers"][0]["students"]
    assert student["evaluation"]["teacher_frechet"] == 0.5
    assert student["evaluation"]["samples"] == 1000
    assert student["exports"][0]["where"] == "s3://there/it"
    assert [m["version"] for m in found["moves"]] == ["1"]  # of another version: not asked for


def test_a_sample_reads_the_store_and_writes_nothing_to_it(shelf, tmp_path, capsys):
    """As somebody does who may not write there; a model that is not there is told with those that are."""
    store = shelf.folder / "mlflow.db"
    before, files = store.read_bytes(), sorted(shelf.folder.rglob("*"))
    for model, code in ((f"models:/{STUDENT}/2", 0), ("models:/nothing@k8-champion", 1)):
        with pytest.raises(SystemExit) as caught:
            main(["sample", model, "--n", "2", "--out", str(tmp_path / "x.npy"), "--workspace", str(shelf.folder)])
        err = capsys.readouterr().err
        assert (caught.value.code or 0) == code, err
    assert f"models in sqlite:///{store}: {STUDENT}, {TEACHER}" in err
    assert np.load(tmp_path / "x.npy").shape == (2, 1, 4, 4)
    assert (store.read_bytes(), sorted(shelf.folder.rglob("*"))) == (before, files)


def test_the_drawing_is_svg_and_nothing_else(shelf):
    drawn = draw(stage.lineage(shelf.registry, STUDENT))
    root = ET.fromstring(drawn)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert {e.tag.removeprefix(space) for e in root.iter()} == {"svg", "text", "g", "title", "rect", "path"}
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "")
    boxes = [(r.get("x"), float(r.get("y")), float(r.get("height"))) for r in root.iter(f"{space}rect")]
    assert len(boxes) == 1 + 1 + 3 + 3 + 1  # data, teacher, students, evaluations, export
    height = float(root.get("viewBox").split()[3])
    assert all(0 < y < y + tall < height for _, y, tall in boxes)
    for column in {x for x, _, _ in boxes}:  # none lies on another
        stacked = sorted((y, tall) for x, y, tall in boxes if x == column)
        assert all(y + tall < below for (y, tall), (below, _) in itertools.pairwise(stacked))
    assert len(list(root.iter(f"{space}path"))) == 8
    assert "@k8-champion" in drawn


def test_words_of_users_stay_words(tmp_path):
    shelf = Shelf(tmp_path)
    student = shelf.student(data_source="<script>[bold]x")
    shelf.registry.record_export(student, Export("<b>", "[red]&", "0" * 64, now(), "x"))
    found = stage.lineage(shelf.registry, STUDENT)
    drawn = draw(found)
    assert "<script" not in drawn
    assert "<b>" not in drawn
    console = Console(width=300, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(stage.tree(found))
    shown = console.export_text()
    assert "<script>[bold]x" in shown
    assert "[red]&" in shown
    (teacher,) = found["data"][0]["teachers"]  # which this store has not
    assert not teacher["registered"]
    assert "no longer in the registry" in shown
    assert "no longer in the registry" in drawn


def test_an_alias_moved_past_the_records_is_told(tmp_path):
    shelf = Shelf(tmp_path)
    first, second = shelf.student(), shelf.student()
    promote(shelf.registry, first, "k8-champion", who="ada", why="")
    shelf.tracker.client.set_registered_model_alias(STUDENT, "k8-champion", second.version)
    shelf.tracker.client.set_registered_model_alias(STUDENT, "mine", first.version)
    notes = stage.lineage(shelf.registry, STUDENT)["notes"]
    assert notes == [
        f"{STUDENT}@k8-champion is version 2, and its last recorded move was to version 1: moved by other means",
        f"{STUDENT}@mine: no move is recorded",
    ]
    shelf.tracker.client.delete_registered_model_alias(STUDENT, "k8-champion")
    assert (
        f"{STUDENT}@k8-champion was removed, or its version deleted" in stage.lineage(shelf.registry, STUDENT)["notes"]
    )


def test_a_mover_that_died_halfway_is_told(tmp_path, monkeypatch):
    shelf = Shelf(tmp_path)
    student = shelf.student()

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shelf.registry, "set_alias", dies)
    with pytest.raises(KeyboardInterrupt):
        promote(shelf.registry, student, "k8-champion", who="ada", why="")
    found = stage.lineage(shelf.registry, STUDENT)
    assert [move["done"] for move in found["moves"]] == [False]
    assert found["notes"] == []  # the alias may never have been there
    monkeypatch.undo()
    other, third = shelf.student(), shelf.student()
    promote(shelf.registry, student, "k8-champion", who="ada", why="")
    monkeypatch.setattr(shelf.registry, "set_alias", dies)
    with pytest.raises(KeyboardInterrupt):
        promote(shelf.registry, other, "k8-champion", who="ada", why="")
    client = shelf.tracker.client
    for version, notes in ((student.version, 0), (other.version, 0), (third.version, 1)):
        client.set_registered_model_alias(STUDENT, "k8-champion", version)
        assert len(stage.lineage(shelf.registry, STUDENT)["notes"]) == notes
    client.delete_registered_model_alias(STUDENT, "k8-champion")
    assert "was removed" in stage.lineage(shelf.registry, STUDENT)["notes"][0]


@pytest.mark.parametrize(
    ("model", "said", "hint"),
    [
        ("nothing", "there is no model nothing", f"{STUDENT}, {TEACHER}"),
        ("mmdistill-tiny-studnt", "there is no model mmdistill-tiny-studnt", f"did you mean {STUDENT}?"),
        (f"models:/{STUDENT}/17", "has no version 17", "its versions: 1, 2, 3; its aliases: k8-champion (version 3)"),
        (f"models:/{STUDENT}@k7-champion", "has no alias k7-champion", "its aliases: k8-champion (version 3)"),
        ("runs:/abc/model", "not a reference to a registered model", "models:/NAME/VERSION"),
    ],
)
def test_unknown_models_have_one_line(shelf, capsys, model, said, hint):
    with pytest.raises(SystemExit) as caught:
        main(["lineage", model, "--tracking-uri", shelf.uri])
    assert caught.value.code == 1
    error, told = capsys.readouterr().err.splitlines()
    assert said in error
    assert hint in told


def test_a_workspace_without_anything(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["lineage", "x", "--workspace", str(tmp_path / "none")])
    assert caught.value.code == 1
    assert "nothing is registered in this workspace" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_mistyped_store_is_a_line_and_nothing_is_made(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["lineage", "x", "--tracking-uri", f"sqlite:///{tmp_path}/there/typo.db"])
    assert caught.value.code == 1
    assert "typo.db: the file does not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_who_looks_makes_no_experiment(tmp_path):
    uri = f"sqlite:///{tmp_path}/others.db"
    Tracker(uri, experiment="others", artifacts=tmp_path / "artifacts")
    registry = stage.open_registry(tmp_path, uri)
    assert registry.versions() == []
    assert {e.name for e in registry.client.search_experiments()} <= {"Default", "others"}
    with pytest.raises(UserError, match="models:/x/1"):
        registry.download("models:/x/1", tmp_path)


def test_an_address_is_shown_without_its_password():
    assert shown("postgresql://ada:secret@host:5432/db") == "postgresql://host:5432/db"
    assert shown("sqlite:////home/a@b/mlflow.db") == "sqlite:////home/a@b/mlflow.db"


def test_an_export_is_whole_hashed_and_recorded(shelf, tmp_path, capsys):
    from mmdistill_core.artifact import load_model

    uri, there = f"models:/{STUDENT}/2", tmp_path / "out"
    before = len(shelf.registry.one(uri).tags)
    for code in (0, 1):  # the second time the folder is not empty
        with pytest.raises(SystemExit) as caught:
            main(["export", uri, str(there), "--tracking-uri", shelf.uri, "--who", "ada"])
        assert caught.value.code == code
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert sorted(p.name for p in there.iterdir()) == ["README.md", "SHA256SUMS", "model.json", "weights.safetensors"]
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=there, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert load_model(there).k == 4
    shown = (there / "README.md").read_text()
    assert "samples in 4 steps: images of" in shown
    assert "{{" not in shown
    (teacher,) = stage.lineage(shelf.registry, uri)["data"][0]["teachers"]
    (recorded,) = teacher["students"][0]["exports"]
    assert recorded["sha256"] == hashlib.sha256((there / "SHA256SUMS").read_bytes()).hexdigest()
    assert (recorded["format"], recorded["who"]) == ("mmdistill", "ada")
    assert recorded["where"].endswith(f":{there}")
    assert len(shelf.registry.one(uri).tags) == before + 1


def test_a_format_that_is_not_known_or_can_not_say_it_leaves_no_folder(shelf, tmp_path, capsys):
    for form, code, said in (
        ("onyx", 2, "'onyx' is not one of mmdistill, diffusers"),
        ("diffusers", 1, "dit is no network of"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(
                ["export", f"models:/{STUDENT}/2", str(tmp_path / "out"), "--format", form, "--tracking-uri", shelf.uri]
            )
        assert caught.value.code == code
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("there", "code", "said"),
    [
        ("s3://bucket/folder", 2, "is an address, and should be a path on this machine"),
        ("file:///folder", 2, "is an address, and should be a path on this machine"),
        ("file/below", 1, "can't be made: Not a directory"),
        ("x" * 300, 1, "File name too long"),
    ],
)
def test_an_export_to_where_none_can_be(shelf, tmp_path, monkeypatch, capsys, there, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        main(["export", f"models:/{STUDENT}/2", there, "--tracking-uri", shelf.uri])
    assert caught.value.code == code
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_fetching_for_samples_is_no_export(shelf, tmp_path):
    before = shelf.registry.one(f"models:/{STUDENT}/2").tags
    shelf.registry.download(f"models:/{STUDENT}/2", tmp_path)
    assert shelf.registry.one(f"models:/{STUDENT}/2").tags == before


def test_a_model_that_a_copied_version_needs_is_no_leftover(tmp_path):
    """MLflow's copy of a version names that version, not the model, and has the model's files."""
    shelf = Shelf(tmp_path)
    student, client = shelf.student(whole=True), shelf.tracker.client
    client.copy_model_version(student.uri, "theirs")
    client.delete_model_version(student.name, student.version)
    assert leftovers(shelf.registry) == []
    client.delete_model_version("theirs", "1")
    assert [(found.kind, found.id) for found in leftovers(shelf.registry)] == [
        ("model", student.source.removeprefix("models:/"))
    ]
