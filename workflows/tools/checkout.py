"""Loads the benchmarks, which are in a checkout but not in the installed package."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from workflows.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def benchmark(name: str) -> Any:
    """Imports and returns the module `benchmarks.NAME`. Ray workers can import it too. Raises UserError outside a checkout."""
    if not (ROOT / "benchmarks" / f"{name}.py").is_file():
        raise UserError("the benchmarks are not installed with the package", hint="run this command from a checkout")
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([path for path in (*paths, str(ROOT)) if path])
    return importlib.import_module(f"benchmarks.{name}")
