"""sample: images from a registered model or a model folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from workflows.config import ConfigError
from workflows.runtime.errors import UserError
from workflows.runtime.intact import check_model


def draw(
    *,
    model: str,
    n: int,
    labels: str | None,
    seed: int,
    steps: int | None,
    out: Path,
    columns: int | None,
    guidance: float | None,
    workspace: str,
    tracking_uri: str | None,
) -> str:
    """Writes the samples to `out`; returns a line that says what was written."""
    import numpy as np
    import torch

    from mmdistill_core.artifact import NotAModel, load_model
    from workflows.images import image_grid

    if out.suffix not in (".png", ".npy"):
        raise ConfigError(f"--out: {out} should end in .png (a grid) or .npy (the images)")
    wanted = _labels(labels, n)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            diffusion = load_model(_folder(model, Path(scratch), workspace, tracking_uri))
        except NotAModel as error:
            raise UserError(str(error)) from error
        if wanted is not None and not diffusion.network.num_classes:
            raise ConfigError(f"--labels: {labels}: the model is unconditional")
        if wanted is None and diffusion.network.num_classes:
            wanted = torch.arange(n) % diffusion.network.num_classes
        try:
            images = diffusion.sample(n, label=wanted, seed=seed, k=steps, guidance=guidance)
        except ValueError as error:
            raise ConfigError(f"--{error}") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npy":
        np.save(out, images.numpy(), allow_pickle=False)
    else:
        columns = columns or (diffusion.network.num_classes if wanted is not None and labels is None else 0)
        image_grid(images.numpy(), columns=columns or max(1, round(n**0.5))).save(out)
    steps_taken = steps or diffusion.k
    return f"{n} samples of {steps_taken} step{'s' if steps_taken > 1 else ''}: {out}"


def _labels(text: str | None, n: int):  # type: ignore[no-untyped-def]
    import torch

    if text is None:
        return None
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--labels: {text!r} should be whole numbers with commas between, such as 3,5") from None
    return torch.tensor(classes)[torch.arange(n) % len(classes)]


def _folder(model: str, scratch: Path, workspace: str, tracking_uri: str | None) -> Path:
    if "://" not in model and not model.startswith(("models:/", "runs:/")):
        return check_model(Path(model))
    from workflows.runtime.registry import Registry
    from workflows.runtime.tracking import Tracker
    from workflows.runtime.workspace import Workspace

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    space = Workspace(workspace)
    return Registry(Tracker(uri or space.default_tracking_uri, artifacts=space.default_artifacts)).download(
        model, scratch
    )
