"""sample: what it writes, and what it refuses before anything is drawn. Models are folders: no store is asked."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mmdistill_core.artifact import DiffusionModel, build_denoiser, save_model
from mmdistill_core.networks.dit import DiTConfig
from workflows.cli.main import main
from workflows.errors import UserError
from workflows.tools import sample as stage

NAMES = ["bird", "cat", "dog"]


def tiny(folder, num_classes=3, **options):
    torch.manual_seed(0)
    network = DiTConfig(image_size=4, channels=1, num_classes=num_classes, patch=4, width=8, depth=1, heads=1)
    denoiser = build_denoiser(network=network, prediction="v", schedule={"name": "cosine"})
    for parameter in denoiser.parameters():  # of a new one labels change nothing
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(folder, DiffusionModel(denoiser, k=2, **options))
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of three classes with names, of three without, and of none."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "named": tiny(folder / "named", provenance={"classes": NAMES}),
        "plain": tiny(folder / "plain"),
        "bare": tiny(folder / "bare", num_classes=0),
    }


def called(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["sample", *map(str, arguments)])
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def drawn(capsys, tmp_path, *arguments):
    code, _, err = called(capsys, *arguments, "--out", tmp_path / "x.npy")
    assert code == 0, err
    return np.load(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("out", "code", "said"),
    [
        (".", 2, "should end in .png"),
        ("folder.png", 2, "Is a directory"),
        ("file/below.png", 2, "can't be written: its folder is a file"),
        ("file/far/below.npy", 2, "can't be written: its folder is a file"),
        ("x" * 300 + ".png", 2, "File name too long"),
        ("y" * 300 + "/x.npy", 2, "File name too long"),
        ("grid.gif", 2, "should end in .png"),
        ("s3://bucket/x.npy", 2, "is an address, and should be a path on this machine"),
        ("s3:/bucket/x.png", 2, "is an address, and should be a path on this machine"),
        ("~nobody-of-that-name/x.png", 2, "there is no such home"),
        ("pipe.png", 2, "is neither a file nor a folder"),
        ("./", 2, "has files in it; name a new folder, or an empty one"),
        ("file/", 2, "can't be written: its folder is a file"),
    ],
)
def test_a_place_that_can_t_be_is_refused_before_anything_is_drawn(capsys, tmp_path, monkeypatch, out, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe.png")
    got, text, err = called(capsys, "/nowhere", "--out", out)
    assert (got, text, err.count("\n")) == (code, "", 1)
    assert said in err
    assert "not a model folder" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"folder.png", "file", "pipe.png"}
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_left_of_a_file_that_was_not_there_and_nothing_changed_of_one_that_was(capsys, tmp_path):
    (tmp_path / "old.png").write_text("old")
    for out in ("new.png", "old.png"):
        assert called(capsys, "/nowhere", "--out", tmp_path / out)[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]
    assert (tmp_path / "old.png").read_text() == "old"


def test_a_link_leads_to_where_it_leads(capsys, tmp_path, models, monkeypatch):
    (tmp_path / "link.png").symlink_to(tmp_path / "there" / "x.png")
    assert called(capsys, "/nowhere", "--out", tmp_path / "link.png")[0] == 1
    assert list((tmp_path / "there").iterdir()) == []
    assert called(capsys, models["plain"], "--n", 2, "--out", tmp_path / "link.png")[0] == 0
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "there" / "x.png").is_file()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert called(capsys, models["plain"], "--n", 2, "--out", "~/home.png")[0] == 0
    assert (tmp_path / "home.png").is_file()


def test_a_folder_gets_a_picture_of_each(capsys, tmp_path, models, monkeypatch):
    whole = drawn(capsys, tmp_path, models["plain"], "--n", 8)
    monkeypatch.setattr(stage, "AT_ONCE", 3)
    code, text, err = called(capsys, models["plain"], "--n", 8, "--out", f"{tmp_path}/new/folder/")
    assert (code, err) == (0, "")
    assert text == f"8 samples of 2 steps: {tmp_path}/new/folder/\n"
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:06}.png" for i in range(8)]
    for i in range(8):
        with Image.open(folder / f"{i:06}.png") as picture:
            assert (picture.mode, picture.size) == ("L", (4, 4))
            assert np.abs(np.asarray(picture) / 127.5 - 1 - whole[i, 0]).max() <= 1 / 127
    code, _, err = called(capsys, models["plain"], "--out", f"{folder}/")
    assert (code, err.count("\n")) == (2, 1)
    assert "has files in it" in err
    code, _, err = called(capsys, models["plain"], "--columns", 2, "--out", f"{tmp_path}/other/")
    assert code == 2
    assert "--columns: 2 applies to a grid (.png) only" in err


def test_an_error_half_way_leaves_a_folder_empty(capsys, tmp_path, models, monkeypatch):
    monkeypatch.setattr(stage, "AT_ONCE", 2)
    save, saved = Image.Image.save, []

    def full(picture, path):
        saved.append(path)
        save(picture, path)
        if len(saved) == 5:
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = called(capsys, models["plain"], "--n", 8, "--out", f"{tmp_path}/folder/")
    assert code == 1
    assert "the disk is full" in err
    assert len(saved) == 5
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_name_that_is_a_number_is_told(capsys, tmp_path):
    """As of folders 0 to 10, which stand in the order of their names: 10 is the third."""
    model = tiny(tmp_path / "numbers", provenance={"classes": ["0", "1", "10"]})
    code, _, err = called(capsys, model, "--n", 1, "--labels", "1,2", "--out", tmp_path / "x.npy")
    assert (code, err.count("\n")) == (0, 0)
    model = tiny(tmp_path / "more", provenance={"classes": ["0", "2", "10"]})
    code, _, err = called(capsys, model, "--n", 1, "--labels", "2", "--out", tmp_path / "x.npy")
    assert code == 0
    assert "label 2 is taken as a number, of the class named 10; the class named 2 has the number 1" in err
    model = tiny(tmp_path / "twice", provenance={"classes": ["cat", "dog", "cat"]})
    code, _, err = called(capsys, model, "--n", 1, "--labels", "cat", "--out", tmp_path / "x.npy")
    assert (code, err.count("\n")) == (2, 1)
    assert "'cat' is the name of several classes; give the number: 0, 2" in err


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("http://127.0.0.1:9/model", "http://"),
        ("zip://model", "zip://"),
        ("nosuch://model", "nosuch://"),
        ("~nobody-of-that-name/model", "there is no such home"),
    ],
)
def test_an_address_that_is_no_registrys_is_not_asked_of_one(capsys, tmp_path, model, said):
    code, _, err = called(capsys, model, "--out", tmp_path / "x.npy", "--workspace", tmp_path)
    assert code in (1, 2)
    assert said in err.splitlines()[0]
    assert "nothing is registered" not in err


def test_a_folder_by_its_address(capsys, tmp_path, models):
    assert called(capsys, f"file://{models['plain']}", "--n", 1, "--out", tmp_path / "x.npy")[0] == 0


def test_a_disk_without_room_is_told_before_anything_is_drawn(capsys, tmp_path, models, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1000))
    code, _, err = called(capsys, models["plain"], "--n", 100, "--out", tmp_path / "x.npy")
    assert code == 1
    assert "100 images take 0.0 GB, and 0.0 GB are free" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "labels", "said"),
    [
        ("plain", "3", "--labels: [3] given; the model's classes are 0 to 2"),
        ("plain", "-1", "--labels: [-1] given"),
        ("plain", "99999999999999999", "--labels: [99999999999999999] given"),
        ("plain", 10**20, "'100000000000000000000' is not a class of the model; its classes have no names"),
        ("plain", "cat", "its classes have no names: give whole numbers from 0 to 2"),
        ("plain", "1.5", "'1.5' is not a class"),
        ("plain", "1,,2", "'1,,2' should be classes with commas between"),
        ("plain", "", "'' should be classes with commas between"),
        (
            "named",
            "cta",
            "'cta' is not a class of the model; did you mean cat? there are: bird, cat, dog; or whole numbers",
        ),
        ("bare", "0", "the model is unconditional"),
    ],
)
def test_labels_that_can_t_be(capsys, tmp_path, models, model, labels, said):
    code, _, err = called(capsys, models[model], f"--labels={labels}", "--out", tmp_path / "x.npy")
    assert (code, err.count("\n")) == (2, 1)
    assert said in err


@pytest.mark.parametrize(
    "option", ["--seed=100000000000000000000000", "--steps=0", "--guidance=nan", "--guidance=inf", "--n=0"]
)
def test_numbers_that_can_t_be(capsys, models, option, tmp_path):
    assert called(capsys, models["plain"], option, "--out", tmp_path / "x.npy")[0] == 2
    assert not list(tmp_path.iterdir())


def test_classes_go_by_number_or_by_the_name_that_the_data_had(capsys, tmp_path, models):
    by_number = drawn(capsys, tmp_path, models["named"], "--n", 5, "--labels", "1,2")
    by_name = drawn(capsys, tmp_path, models["named"], "--n", 5, "--labels", "cat, dog")
    assert (by_number == by_name).all()
    assert (by_number == drawn(capsys, tmp_path, models["plain"], "--n", 5, "--labels", "1,2")).all()
    assert (by_number != drawn(capsys, tmp_path, models["plain"], "--n", 5, "--labels", "2,1")).any()


def test_more_images_than_are_drawn_at_once(capsys, tmp_path, models, monkeypatch):
    whole = drawn(capsys, tmp_path, models["plain"], "--n", 600)
    assert whole.shape == (600, 1, 4, 4)
    assert whole.dtype == np.float32
    assert np.abs(whole).max() <= 1
    assert len(np.unique(whole.reshape(600, -1), axis=0)) > 590
    for n in (1, 8, 16, 300):
        assert drawn(capsys, tmp_path, models["plain"], "--n", n) == pytest.approx(whole[:n], abs=1e-5)
    monkeypatch.setattr(stage, "AT_ONCE", 7)
    assert drawn(capsys, tmp_path, models["plain"], "--n", 30) == pytest.approx(whole[:30], abs=1e-5)


def test_a_grid_holds_what_fits_and_says_so(capsys, tmp_path, models, monkeypatch):
    monkeypatch.setattr(stage, "SIDE", 500)  # ten images of 48 pixels and a gap
    for n, rest, size, columns in ((9, (), 9, 3), (64, (), 64, 9), (1000, (), 90, 9), (1000, ("--columns", 2), 20, 2)):
        code, text, err = called(capsys, models["plain"], "--n", n, *rest, "--out", tmp_path / "x.png")
        assert code == 0, err
        assert text.startswith(f"{size} samples of 2 steps")
        assert (f"{size} of 1,000 images fit into a grid of 500 pixels a side; a .npy takes all" in err) == (size < n)
        with Image.open(tmp_path / "x.png") as picture:
            assert picture.size == (columns * 50 + 2, -(-size // columns) * 50 + 2)
    code, _, err = called(capsys, models["plain"], "--columns", 11, "--out", tmp_path / "x.png")
    assert code == 2
    assert "--columns: 11 are more than the 10" in err


def test_an_error_half_way_leaves_the_file_as_it_was(capsys, tmp_path, models, monkeypatch):
    before = drawn(capsys, tmp_path, models["plain"], "--n", 3)

    def full(*_):
        raise OSError(28, "No space left on device", "x.npy")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    assert called(capsys, models["plain"], "--n", 4, "--out", tmp_path / "x.npy")[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
    assert (np.load(tmp_path / "x.npy") == before).all()


def test_a_workspace_is_only_read(tmp_path, monkeypatch):
    """By those who may not write to it too: no folder is made, no probe is written."""
    from workflows.storage.workspace import Workspace

    def refuse(*_, **__):
        raise UserError("nothing may be written")

    for name in ("check", "write", "upload"):
        monkeypatch.setattr(f"workflows.storage.store.{name}", refuse)
    monkeypatch.setenv("MMDISTILL_CACHE", str(tmp_path / "cache"))
    for root in ("s3://bucket/runs", str(tmp_path / "none")):
        assert Workspace(root, read_only=True).default_tracking_uri.startswith("sqlite:///")
        with pytest.raises(UserError, match=r"nothing is registered|the file does not exist"):
            stage.fetch_model("models:/any/1", tmp_path / "scratch", root, None)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="nothing may be written"):
        Workspace("s3://bucket/runs")


def test_the_names_of_classes_go_with_the_model(models):
    from workflows.stages.teacher import data_provenance

    prepared = {"fingerprint": "f", "classes": NAMES}
    assert data_provenance(prepared) == {"data_fingerprint": "f", "classes": NAMES}
    assert (
        data_provenance(prepared | {"classes": []})
        == data_provenance({"fingerprint": "f"})
        == {"data_fingerprint": "f"}
    )
    with open(f"{models['named']}/model.json") as file:
        assert json.load(file)["provenance"]["classes"] == NAMES


def test_a_predict_of_no_rows_is_no_images(models):
    import pandas as pd

    predict = predictor(models["plain"])
    assert predict(pd.DataFrame({"label": []})).shape == (0, 1, 4, 4)
    assert predict(pd.DataFrame({"label": [1, 2]})).shape == (2, 1, 4, 4)
    assert predictor(models["bare"])(pd.DataFrame({"label": []})).shape == (0, 1, 4, 4)


def test_a_predicted_image_does_not_change_with_its_neighbours(models):
    import pandas as pd

    predict = predictor(models["plain"])

    def images(*labels, **params):
        return predict(pd.DataFrame({"label": labels}), params)

    alone = images(1, seed=4)
    for rest in ((0,), (2, 2, 0), (1,) * 20):
        assert images(1, *rest, seed=4)[:1] == pytest.approx(alone, abs=1e-5)
    assert images(0, 1, 2)[1] == pytest.approx(images(2, 1)[1], abs=1e-5)
    assert np.abs(images(0, 1)[1] - images(0, 2)[1]).max() > 0.01
    assert np.abs(images(1, 1)[0] - images(1, 1)[1]).max() > 0.01


def predictor(folder):
    """The registered model's predict, without a registry."""
    from types import SimpleNamespace

    from workflows.registry.pyfunc_model import DiffusionPyfunc

    model = DiffusionPyfunc()
    model.load_context(SimpleNamespace(artifacts={"model": folder}))
    return lambda rows, params=None: model.predict(None, rows, params)
