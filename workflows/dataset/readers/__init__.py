"""Readers of image sources: folders, object stores, zips, Parquet, WebDataset tars, Hugging Face data sets.

`list_source` lists a source and divides it into units. `read_unit` streams the undecoded images of a unit. `decode` turns an image
into pixels. All files are read through fsspec; nothing is unpacked to disk or executed.
"""

from __future__ import annotations

from workflows.dataset.readers.detect import list_source, read_unit
from workflows.dataset.readers.listing import Item, Listing, Unit

__all__ = ["Item", "Listing", "Unit", "list_source", "read_unit"]
