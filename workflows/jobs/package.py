"""What a job is sent: this program's own source, and nothing that lies beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmdistill_core", "workflows")
KINDS = {".py", ".yaml", ".html", ".css"}
PRIVATE = re.compile(r"secret|token|credential|passw|(^|/)\.", re.IGNORECASE)
"""Of a file's path: what is not sent, whatever it holds."""


def checkout() -> Path | None:
    """The folder of this program's source, or None where it was installed from a wheel: then the head has to have it too."""
    return ROOT if (ROOT / "pyproject.toml").is_file() else None


def source_files(root: Path) -> list[str]:
    """Relative paths of the packages' files that a job needs."""
    found = ["pyproject.toml"]
    for package in PACKAGES:
        files = (path for path in (root / package).rglob("*") if path.suffix in KINDS and path.is_file())
        found += [name for path in files if not PRIVATE.search(name := path.relative_to(root).as_posix())]
    return sorted(found)


@contextmanager
def working_directory(given: dict[str, bytes]) -> Iterator[Path | None]:
    """A folder with the source and the `given` files, by their names in it; None if there is nothing to send."""
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
