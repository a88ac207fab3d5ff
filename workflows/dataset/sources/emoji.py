"""Twitter's emoji as images, from the npm package emoji-datasource-twitter. (Twemoji, by Twitter and contributors, CC-BY 4.0.)

The package is kept in the user's cache: ~/.cache/mmdistill, or $XDG_CACHE_HOME/mmdistill. If it is not there, npm is asked for it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mmdistill_core.files import sha256_of
from workflows.dataset.readers.decode import square
from workflows.errors import UserError

if TYPE_CHECKING:
    import numpy as np

PACKAGE = "emoji-datasource-twitter@16.0.0"
ARCHIVE = PACKAGE.replace("@", "-") + ".tgz"
SHA256 = "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
LEFT_OUT = ("Component",)
"""Five swatches of skin."""


def twemoji(*, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns 3,781 emoji over white, with skin tones as images of their own. The label is the category. Raises UserError."""
    import numpy as np
    from PIL import Image

    listing = _listing()
    rows = {one["image"]: i for i, one in enumerate(listing)}
    images = np.empty((len(listing), 3, size, size), np.float32)
    with tarfile.open(archive()) as package:
        for member in package:  # in the order of the file, which is compressed
            folder, _, name = member.name.rpartition("/")
            if folder != "package/img/twitter/64" or name not in rows:
                continue
            file = package.extractfile(member)
            assert file is not None
            with Image.open(io.BytesIO(file.read())) as opened:
                drawn = opened.convert("RGBA")
            whole = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
            images[rows[name]] = square(whole, size, (0, 0, *whole.size)).astype(np.float32) / 255
    return images, np.array([CATEGORIES.index(one["category"]) for one in listing])


def emoji_groups() -> list[str]:
    """Returns the base emoji of each image. Those that differ in the tone of skin alone have the same."""
    return [str(one["base"]) for one in _listing()]


def _listing() -> list[dict[str, Any]]:
    """The images, in the order of the package: file, category and base emoji. Raises UserError for an unknown category."""
    with tarfile.open(archive()) as package:
        file = package.extractfile("package/emoji.json")
        assert file is not None
        entries = json.load(file)
    listing = []
    for entry in entries:
        category = entry["category"]
        if category in LEFT_OUT:
            continue
        if category not in CATEGORIES:
            raise UserError(f"emoji: {entry['name']} is of the category {category!r}, which is none of those known")
        for one in (entry, *entry.get("skin_variations", {}).values()):
            if one.get("has_img_twitter"):
                listing.append({"image": one["image"], "category": category, "base": entry["unified"]})
    return listing


def kept() -> Path:
    """Where the package's file is in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmdistill" / ARCHIVE


def archive() -> Path:
    """Returns the package's file, which npm downloads if it is not in the cache (62 MB). Raises UserError."""
    path, cache = kept(), kept().parent
    by_hand = f"npm pack {PACKAGE} --pack-destination {cache}"
    if not path.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise UserError(f"the emoji come from the npm package {PACKAGE}, and npm is not here", hint=by_hand)
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as scratch:
            words = [npm, "pack", PACKAGE, "--pack-destination", scratch]
            done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if done.returncode or not (Path(scratch) / ARCHIVE).exists():
                why = (done.stderr.strip().splitlines() or ["npm wrote no file"])[-1]
                raise UserError(f"the emoji: npm can't download {PACKAGE}: {why}", hint=by_hand)
            os.replace(Path(scratch) / ARCHIVE, path)
    if (found := sha256_of(path)) != SHA256:
        raise UserError(f"{path}: not the file of {PACKAGE} (SHA-256 {found[:12]}...)", hint="remove it")
    return path
