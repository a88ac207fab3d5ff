"""Images from where they are: folders, object stores, zips, Parquet, WebDataset tars, Hugging Face data sets.

`list_source` tells what there is and divides it into units; `read_unit` streams the undecoded images of one; `decode` makes
pixels. All files are read through fsspec, and nothing is unpacked to a disk or run.
"""

from __future__ import annotations

from workflows.dataset.readers.detect import list_source, read_unit
from workflows.dataset.readers.listing import Item, Listing, Unit

__all__ = ["Item", "Listing", "Unit", "list_source", "read_unit"]
