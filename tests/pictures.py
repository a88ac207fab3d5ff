"""Images, and what a source of them gives, for the tests of this folder."""

from __future__ import annotations

import dataclasses
import io
import pickle

import numpy as np
from PIL import Image

from workflows.dataset.readers import list_source, read_unit


def array(value, width=12, height=8, channels=3):
    rng = np.random.default_rng(value)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def png(value, **shape):
    """Noise of its own for each value, some 300 bytes."""
    return encoded(array(value, **shape))


def read(listing, filesystem=None):
    """All items, as tasks would read them: the listing without units and each unit are pickled."""
    bare, units = pickle.loads(pickle.dumps((dataclasses.replace(listing, units=()), listing.units)))
    return [item for unit in units for item in read_unit(bare, unit, filesystem)]


def load(source, filesystem=None, **options):
    """(listing, items), and what every source promises: keys that are there once, one-line errors, an image or an error."""
    listing = list_source(str(source), filesystem=filesystem, **options)
    items = read(listing, filesystem)
    assert len({item.key for item in items}) == len(items)
    for item in items:
        assert (item.image is None) == (item.error is not None), item
        assert "\n" not in item.key + (item.error or "")
        assert item.label is None or not listing.classes or 0 <= item.label < len(listing.classes)
    return listing, items


def good(items):
    return {item.key: item for item in items if item.error is None}


def errors(items):
    return {item.key: item.error for item in items if item.error is not None}
