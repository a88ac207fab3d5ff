"""Checkpoints and models: reading gives what was written, and damage is detected."""

import json

import pytest
import torch

from mmdistill_core.artifact import DiffusionModel, NotAModel, load_model, save_model
from mmdistill_core.diffusion.schedules import SCHEDULES
from mmdistill_core.engine.checkpoint import DamagedCheckpoint, load_checkpoint, save_checkpoint
from mmdistill_core.networks.classifier import Classifier, ClassifierConfig
from mmdistill_core.networks.denoiser import Denoiser
from mmdistill_core.networks.dit import DiT, DiTConfig

VALUES = {
    "tensor": torch.arange(6).reshape(2, 3),
    "nested": {0: {"a": torch.ones(2, dtype=torch.bfloat16), "b": None}, "list": [1, 2.5, "three", True]},
    "empty": {},
    "shared": [torch.zeros(3)] * 2,
}


def test_checkpoint_round_trip(tmp_path):
    save_checkpoint(tmp_path / "c", VALUES)
    got = load_checkpoint(tmp_path / "c")
    assert torch.equal(got["tensor"], VALUES["tensor"])
    assert torch.equal(got["nested"][0]["a"], VALUES["nested"][0]["a"])
    assert got["nested"][0]["b"] is None
    assert got["nested"]["list"] == [1, 2.5, "three", True]
    assert got["empty"] == {}
    assert not list(tmp_path.glob(".*"))


def test_checkpoint_replaces_the_one_before(tmp_path):
    save_checkpoint(tmp_path / "c", {"n": 1})
    save_checkpoint(tmp_path / "c", {"n": 2})
    assert load_checkpoint(tmp_path / "c") == {"n": 2}


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_is_seen(tmp_path, name, how):
    save_checkpoint(tmp_path / "c", VALUES)
    path = tmp_path / "c" / name
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    with pytest.raises(DamagedCheckpoint, match=name.split(".")[0]):
        load_checkpoint(tmp_path / "c")


def test_nothing_but_plain_values_goes_in(tmp_path):
    with pytest.raises(TypeError, match="x/f"):
        save_checkpoint(tmp_path / "c", {"x": {"f": print}})


def model(schedule, num_classes=3, prediction="v"):
    torch.manual_seed(0)
    config = DiTConfig(image_size=8, channels=1, num_classes=num_classes, patch=4, width=16, depth=1, heads=2)
    denoiser = Denoiser(backbone=DiT(config), schedule=schedule, prediction=prediction)
    torch.nn.init.normal_(denoiser.backbone.out.weight)
    return DiffusionModel(denoiser, k=3, provenance={"recipe": "test"})


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", ["x", "eps", "v", "flow"])
def test_a_model_samples_the_same_after_a_round_trip(tmp_path, name, prediction):
    before = model(SCHEDULES[name](), prediction=prediction)
    save_model(tmp_path / "m", before)
    after = load_model(tmp_path / "m")
    assert after.provenance == {"recipe": "test"}
    assert torch.equal(before.sample(6, seed=1), after.sample(6, seed=1))
    assert not torch.equal(before.sample(6, seed=1), after.sample(6, seed=2))
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"weights.safetensors", "model.json"}


def test_an_image_depends_on_the_seed_its_number_and_its_label_alone():
    """Up to rounding, an image does not depend on its neighbours or on their number."""
    one = model(SCHEDULES["cosine"]())
    for parameter in one.denoiser.parameters():  # in a new network, labels change nothing
        torch.nn.init.normal_(parameter, std=0.2)
    many = one.sample(300, seed=5)
    for n in (1, 8, 16):
        torch.testing.assert_close(one.sample(n, seed=5), many[:n], rtol=0, atol=1e-5)
    torch.testing.assert_close(one.sample(4, seed=5, first=7, batch=3), many[7:11], rtol=0, atol=1e-5)
    beside = [one.sample(3, seed=5, label=torch.tensor([a, 1, b])) for a, b in ((1, 1), (0, 2))]
    torch.testing.assert_close(beside[0][1], beside[1][1], rtol=0, atol=1e-5)
    torch.testing.assert_close(beside[0][1], many[1], rtol=0, atol=1e-5)
    assert (beside[0][0] - beside[1][0]).abs().max() > 0.01, "the label matters"


def test_labels_are_checked():
    student = model(SCHEDULES["cosine"]())
    with pytest.raises(ValueError, match="0 to 2"):
        student.sample(2, label=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="unconditional"):
        model(SCHEDULES["cosine"](), num_classes=0).sample(2, label=torch.tensor([0, 0]))
    assert model(SCHEDULES["cosine"](), num_classes=0).sample(2).shape == (2, 1, 8, 8)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(NotAModel, match=r"model\.json"):
        load_model(tmp_path)
    save_model(tmp_path / "m", model(SCHEDULES["cosine"]()))
    description = json.loads((tmp_path / "m" / "model.json").read_text())
    (tmp_path / "m" / "model.json").write_text(json.dumps(description | {"format": 99}))
    with pytest.raises(NotAModel, match="99"):
        load_model(tmp_path / "m")


def test_the_classifiers_features_have_unit_deviation_on_the_data():
    torch.manual_seed(0)
    images = torch.randn(40, 1, 8, 8)
    classifier = Classifier(ClassifierConfig(8, 1, 10)).eval()
    classifier.fit_scale(images)
    torch.testing.assert_close(classifier.extract(images).std(0), torch.ones(32))
    torch.testing.assert_close(classifier.logits(images), classifier(images))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"patch: 3 does not divide the image size 8"):
        DiTConfig(image_size=8, channels=1, patch=3)
    with pytest.raises(ValueError, match=r"heads: 5 does not divide"):
        DiTConfig(image_size=8, channels=1, width=96, heads=5)
