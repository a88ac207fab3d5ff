"""Collects the files that are sent with a job: the source of this program, and nothing else in the checkout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmdistill_core", "workflows", "benchmarks")
KINDS = {".py", ".yaml", ".html", ".css", ".j2"}
PRIVATE = re.compile(r"secret|token|credential|passw|(^|/)\.", re.IGNORECASE)
"""Files whose path matches are never sent."""


def checkout() -> Path | None:
    """The root of the checkout. None for an installation from a wheel: then the head needs its own installation."""
    return ROOT if (ROOT / "pyproject.toml").is_file() else None


def source_files(root: Path) -> list[str]:
    """The source files that a job needs, as paths relative to `root`."""
    found = ["pyproject.toml"]
    for package in PACKAGES:
        files = (path for path in (root / package).rglob("*") if path.suffix in KINDS and path.is_file())
        found += [name for path in files if not PRIVATE.search(name := path.relative_to(root).as_posix())]
    return sorted(found)


@contextmanager
def working_directory(given: dict[str, bytes]) -> Iterator[Path | None]:
    """A temporary folder with the source and the `given` files (path -> content). None if there is nothing to send."""
    root = checkout()
    if root is None and not given:
        yield None
        return
    with TemporaryDirectory() as scratch:
        files = {name: (root / name).read_bytes() for name in source_files(root)} if root else {}
        for name, content in (files | given).items():
            (Path(scratch) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(scratch) / name).write_bytes(content)
        yield Path(scratch)
