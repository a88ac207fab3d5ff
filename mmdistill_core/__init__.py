"""The mathematics of few-step distillation: torch alone, no Ray, no MLflow, no command line.

from mmdistill_core import distill, load_model, read_diffusers
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdistill_core.artifact import DiffusionModel, load_model, save_model
    from mmdistill_core.exports.diffusers import to_diffusers
    from mmdistill_core.imports import read_diffusers, read_module
    from mmdistill_core.library import distill, teacher_of

HOMES = {
    "DiffusionModel": "artifact",
    "distill": "library",
    "load_model": "artifact",
    "read_diffusers": "imports",
    "read_module": "imports",
    "save_model": "artifact",
    "teacher_of": "library",
    "to_diffusers": "exports.diffusers",
}
"""Where the names of the package live. Each is imported on first use: torch takes a second."""
__all__ = [
    "DiffusionModel",
    "distill",
    "load_model",
    "read_diffusers",
    "read_module",
    "save_model",
    "teacher_of",
    "to_diffusers",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
