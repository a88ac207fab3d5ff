"""The `export` command: writes a registered model to a folder with hashes and a model card, and records it in the registry."""

from __future__ import annotations

import hashlib
import platform
import shutil
import tempfile
from pathlib import Path

from mmdistill_core.files import sha256_of
from workflows.errors import UserError
from workflows.registry.card import card
from workflows.registry.promote import user
from workflows.registry.versions import Export, Registry, now
from workflows.storage.uri import check_here

SUMS = "SHA256SUMS"
FORMATS = ("mmdistill", "diffusers")


def run_export(
    registry: Registry, model: str, destination: Path, *, form: str = FORMATS[0], who: str | None = None
) -> str:
    """Writes the model in this format, README.md and SHA256SUMS (for `sha256sum -c`) to `destination`, and returns a line that says
    so.

    Raises UserError if `destination` is not a new or empty folder, or if the format can't say what the model is.
    """
    version = registry.one(model)
    check_here("FOLDER", destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} exists and is not an empty folder", hint="name a folder that is new or empty")
    with tempfile.TemporaryDirectory() as scratch:
        folder, made = registry.download(version.uri, Path(scratch) / "model"), Path(scratch) / "made"
        made.mkdir()
        _write(folder, made, form)
        (made / "README.md").write_text(card(version, folder, form))
        try:
            destination.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{destination} can't be made: {error.strerror}") from error
        shutil.copytree(made, destination, dirs_exist_ok=True)
    files = sorted(path for path in destination.rglob("*") if path.is_file())
    sums = "".join(f"{sha256_of(file)}  {file.relative_to(destination)}\n" for file in files)
    (destination / SUMS).write_text(sums)
    digest = hashlib.sha256(sums.encode()).hexdigest()
    where = f"{platform.node()}:{destination.resolve()}"
    registry.record_export(version, Export(form, where, digest, now(), user(who)))
    return f"{version.title}: {len(files)} files and {SUMS} in {destination}, sha256 {digest[:16]}; recorded in the registry"


def _write(folder: Path, made: Path, form: str) -> None:
    """The model in `folder` as files of this format."""
    if form == "mmdistill":
        for file in sorted(p for p in folder.iterdir() if p.is_file()):
            shutil.copyfile(file, made / file.name)
        return
    from mmdistill_core.artifact import load_model
    from mmdistill_core.exports.diffusers import NotExportable, to_diffusers

    try:
        to_diffusers(load_model(folder), made)
    except NotExportable as error:
        raise UserError(f"--format {form}: {error}") from error
