"""The extractors that a recipe asks for, and the rows that they are made from."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from workflows.config.schema import Data
from workflows.dataset import extractors
from workflows.dataset.readers.spread import evenly
from workflows.dataset.shards import read_all, write_shards


def test_a_classifier_is_fitted_to_rows_of_all_shards(tmp_path, monkeypatch):
    images, labels = np.random.default_rng(0).random((200, 1, 4, 4), np.float32), np.arange(200) // 20
    manifest = write_shards(tmp_path, source="x", images=images, labels=labels, num_classes=10, holdout=0.1, rows=20)
    monkeypatch.setattr(extractors, "CLASSIFIED", 50)
    some = extractors.some_rows(str(tmp_path), manifest)
    assert (len(some.labels), set(some.labels.tolist())) == (50, set(range(10)))
    assert np.array_equal(some.images, read_all(tmp_path).images[evenly(200, 50)])
    monkeypatch.setattr(extractors, "MEMORY", 30 * manifest.image_bytes)
    assert len(extractors.some_rows(str(tmp_path), manifest).labels) == 30


def test_what_chooses_and_what_reports_learn_from_different_images():
    labels, held = np.arange(101) // 25 - 1, np.arange(101) % 5 == 0  # 25 rows of no label, one of a label of its own
    arrays = SimpleNamespace(images=np.zeros((101, 1, 4, 4), np.uint8), labels=labels, holdout=held)
    chooses, reports = (extractors.examples(arrays, half=half) for half in (0, 1))
    assert not (chooses.learnt & reports.learnt).any()
    assert torch.equal(chooses.learnt | reports.learnt, torch.from_numpy((labels >= 0) & ~held))
    for label in range(3):
        counts = [int(one.learnt[labels == label].sum()) for one in (chooses, reports)]
        assert counts == [10, 10]
    few = SimpleNamespace(images=arrays.images[:9], labels=np.arange(9), holdout=np.zeros(9, bool))
    assert [int(extractors.examples(few, half=half).learnt.sum()) for half in (0, 1)] == [5, 4], (
        "one image of each label"
    )


def wanted(*settings, labels=10, shape=(1, 8, 8)):
    """The kinds: (what chooses, [what reports])."""
    data = Data(**dict(setting.split("=") for setting in settings if "[" not in setting))
    data = data.model_copy(
        update={s.split("=")[0]: tuple(s.split("[")[1][:-1].split(",")) for s in settings if "[" in s}
    )
    chooses, reports = extractors.wanted_in(data, shape=shape, num_classes=labels)
    return chooses.kind, [one.kind for one in reports]


def test_the_usual_features_suit_the_images_and_report_what_others_chose():
    assert wanted() == ("classifier", ["classifier", "random", "pixels"])
    assert wanted(labels=0) == ("random", ["random", "pixels"])
    assert wanted(labels=0, shape=(3, 64, 64)) == ("random", ["random"])
    assert wanted("extractor=pixels") == ("pixels", ["classifier", "random"])
    assert wanted("reporting=[random,mixture]") == ("classifier", ["random", "mixture"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["extractor=pixels", "reporting=[pixels]"], "reporting: pixels chooses already"),
        (["extractor=mixture", "reporting=[random,mixture]"], "reporting: mixture chooses already"),
        (["reporting=[inception]"], "extractor_weights: the file of inception's weights is missing"),
        (["extractor_weights=x.pth"], "extractor_weights: belongs to inception, not to classifier, random, pixels"),
        (["extractor=pixel"], "'pixel' is not one of"),
    ],
)
def test_what_does_not_fit_is_a_line(settings, said):
    with pytest.raises(ValueError, match=said):
        wanted(*settings)


def test_the_two_classifiers_and_the_two_random_networks_are_different_ones(tmp_path):
    labels = np.arange(200) % 4
    images = (
        np.random.default_rng(0).random((200, 1, 8, 8)).astype("f4") * np.float32(1 + labels)[:, None, None, None] / 4
    )
    manifest = write_shards(tmp_path, source="x", images=images, labels=labels, num_classes=4, holdout=0.1, rows=200)
    for kind in ("classifier", "random"):
        made = [
            extractors.make_extractor(
                extractors.Wanted(kind, reports, epochs=1), str(tmp_path), manifest, tick=lambda *_: None
            )[0]
            for reports in (False, True)
        ]
        assert made[0].fingerprint() != made[1].fingerprint()
        features = made[1].extract(torch.from_numpy(images) * 2 - 1).double()
        assert (features.std(0) - 1).abs().median() < 1e-3
