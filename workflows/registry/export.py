"""The `export` command: copies a registered model's files to a folder with their hashes, and records the copy in the registry."""

from __future__ import annotations

import hashlib
import platform
import shutil
import tempfile
from pathlib import Path

from mmdistill_core.files import sha256_of
from workflows.errors import UserError
from workflows.registry.promote import user
from workflows.registry.versions import Export, Registry, now
from workflows.storage.uri import check_here

SUMS = "SHA256SUMS"
FORMAT = "mmdistill"


def run_export(registry: Registry, model: str, destination: Path, *, who: str | None = None) -> str:
    """Writes the model's files and SHA256SUMS (for `sha256sum -c`) to `destination`, and returns a line that says so.

    Raises UserError if `destination` is not a new or empty folder.
    """
    version = registry.one(model)
    check_here("FOLDER", destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} exists and is not an empty folder", hint="name a folder that is new or empty")
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{destination} can't be made: {error.strerror}") from error
    with tempfile.TemporaryDirectory() as scratch:
        folder = registry.download(version.uri, Path(scratch))
        files = sorted(p for p in folder.iterdir() if p.is_file())
        for file in files:
            shutil.copyfile(file, destination / file.name)
    sums = "".join(f"{sha256_of(destination / file.name)}  {file.name}\n" for file in files)
    (destination / SUMS).write_text(sums)
    digest = hashlib.sha256(sums.encode()).hexdigest()
    where = f"{platform.node()}:{destination.resolve()}"
    registry.record_export(version, Export(FORMAT, where, digest, now(), user(who)))
    return f"{version.title}: {len(files)} files and {SUMS} in {destination}, sha256 {digest[:16]}; recorded in the registry"
