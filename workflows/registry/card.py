"""The model card of an export: what the model is, how it is loaded, how good it is, and where it came from."""

from __future__ import annotations

import json
from pathlib import Path

from workflows.registry.versions import Version
from workflows.rendering import TEMPLATES

FIGURES = {
    "frechet": "Frechet distance",
    "teacher_frechet": "Frechet distance of the teacher in as many steps",
    "precision": "precision",
    "recall": "recall",
}


def card(version: Version, folder: Path, form: str) -> str:
    """README.md, with the metadata that model hubs read. The licence is left open: those of the data and of the teacher decide."""
    from jinja2 import Environment, FileSystemLoader

    model, tags = json.loads((folder / "model.json").read_text()), version.tags
    teacher = f"{tags['teacher_name']} v{tags['teacher_version']}" if "teacher_name" in tags else None
    data = [tags.get("data_source"), tags.get("data_count", "?") + " images", tags.get("data_fingerprint")]
    template = Environment(loader=FileSystemLoader(TEMPLATES), keep_trailing_newline=True).get_template("card.md.j2")
    return template.render(
        form=form,
        title=version.title,
        student=tags.get("role") == "student",
        k=model["k"],
        size="{image_size}x{image_size}x{channels}".format(**model["network"]),
        classes=model["network"]["num_classes"],
        figures={title: tags[name] for name, title in FIGURES.items() if name in tags},
        tags=tags,
        origin={
            "data": ", ".join(filter(None, data)),
            "teacher": teacher,
            "imported from": model["provenance"].get("source"),
            "recipe": tags.get("recipe"),
            "method": tags.get("method", "").replace("_", " "),
        },
    )
