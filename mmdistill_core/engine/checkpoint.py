"""Checkpoints without pickle: tensors in safetensors, everything else in JSON, a manifest of hashes written last.

A checkpoint is a folder. Only a complete one counts: `load_checkpoint` verifies every file against the manifest.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdistill_core.files import sha256_of

TENSORS, TREE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT = 1


class DamagedCheckpoint(ValueError):
    """A file is missing or differs from the manifest."""


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON tree of `value`, its tensors moved to `tensors` under their path. Dictionary keys may be integers."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"items": [[key, _split(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_split(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{path}: a checkpoint cannot hold a {type(value).__name__}")


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "items" in tree:
        return {key: _join(item, tensors) for key, item in tree["items"]}
    if "list" in tree:
        return [_join(item, tensors) for item in tree["list"]]
    return tree["value"]


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Snapshot:
    """A copy of values: tensors on the CPU, and the rest as JSON. It can be written while training continues."""

    tensors: dict[str, Tensor]
    tree: str

    @classmethod
    def of(cls, values: dict[str, Any]) -> Snapshot:
        """`values`: nested dictionaries and lists of tensors, numbers, strings."""
        tensors: dict[str, Tensor] = {}
        return cls(tensors, json.dumps(_split(values, "", tensors)))

    def write(self, directory: str | Path) -> None:
        """Writes a checkpoint to `directory`. It replaces an existing one in a single rename."""
        directory = Path(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
        try:
            save_file(self.tensors, partial / TENSORS)
            (partial / TREE).write_text(self.tree)
            hashes = {name: sha256_of(partial / name) for name in (TENSORS, TREE)}
            for name in (TENSORS, TREE):
                _sync(partial / name)
            (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": hashes}))
            _sync(partial / MANIFEST)
            shutil.rmtree(directory, ignore_errors=True)
            partial.chmod(0o755)  # mkdtemp lets only the owner in
            partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def save_checkpoint(directory: str | Path, values: dict[str, Any]) -> None:
    """Writes `values` to `directory`, in place of an existing checkpoint."""
    Snapshot.of(values).write(directory)


def verify_checkpoint(directory: str | Path) -> None:
    """Raises DamagedCheckpoint, naming the file."""
    directory = Path(directory)
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        expected = manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{directory / MANIFEST}: {error}") from error
    if manifest.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{directory / MANIFEST}: format {manifest.get('format')}, this version reads {FORMAT}")
    for name, digest in expected.items():
        if not (directory / name).is_file():
            raise DamagedCheckpoint(f"{directory / name}: missing")
        if sha256_of(directory / name) != digest:
            raise DamagedCheckpoint(f"{directory / name}: differs from its manifest")


def load_checkpoint(directory: str | Path) -> dict[str, Any]:
    """The `values` given to `save_checkpoint`, verified. Tuples come back as lists. Raises DamagedCheckpoint."""
    verify_checkpoint(directory)
    directory = Path(directory)
    tensors = load_file(directory / TENSORS)
    values = _join(json.loads((directory / TREE).read_text()), tensors)
    assert isinstance(values, dict)
    return values
