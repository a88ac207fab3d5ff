"""The classifier in whose features distances are measured: which rows it is fitted to, and what it sees of them."""

from functools import partial

import numpy as np
import pytest
import torch

from workflows.dataset import extractors
from workflows.dataset.readers.spread import evenly
from workflows.dataset.shards import read_all, write_shards
from workflows.errors import UserError


def test_a_classifier_is_fitted_to_rows_of_all_shards(tmp_path, monkeypatch):
    images, labels = np.random.default_rng(0).random((200, 1, 4, 4), np.float32), np.arange(200) // 20
    manifest = write_shards(tmp_path, source="x", images=images, labels=labels, num_classes=10, holdout=0.1, rows=20)
    monkeypatch.setattr(extractors, "CLASSIFIED", 50)
    some = extractors.some_rows(str(tmp_path), manifest)
    assert (len(some.labels), set(some.labels.tolist())) == (50, set(range(10)))
    assert np.array_equal(some.images, read_all(tmp_path).images[evenly(200, 50)])
    monkeypatch.setattr(extractors, "MEMORY", 30 * manifest.image_bytes)
    assert len(extractors.some_rows(str(tmp_path), manifest).labels) == 30


def test_a_classifier_sees_bytes_as_it_sees_floats_and_knows_when_it_can_not_be_tested():
    values = np.random.default_rng(0).integers(0, 256, (120, 1, 8, 8), np.uint8)
    labels, held = np.arange(120) % 3, np.arange(120) < 30
    fit = partial(extractors.train_classifier, num_classes=3, epochs=1, seed=0, tick=lambda *_: None)
    bytes_, floats = torch.from_numpy(values), torch.from_numpy(values).float() / 127.5 - 1
    assert fit(bytes_, labels, held)[0].fingerprint() == fit(floats, labels, held)[0].fingerprint()
    assert fit(bytes_, labels, held & False)[1] is None
    with pytest.raises(UserError, match="all are held out"):
        fit(bytes_, labels, held | True)
