"""A pipeline small enough for tests: every stage runs for real, on a network and on counts of a few seconds."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "network.width=16",
    "network.depth=1",
    "network.heads=2",
    "data.classifier_epochs=1",
    "teacher.images=19200",
    "teacher.log_every=1280",
    "teacher.checkpoint_every=3840",
    "teacher.optimiser.warmup_images=1280",
    "distill.k=[1,2]",
    "distill.z_t=data",  # goes with every pairing
    "distill.w_s=flat",
    "distill.images=6400",
    "distill.log_every=1280",
    "distill.checkpoint_every=1280",
    "distill.validate_every=3200",
    "distill.validate_samples=100",
    "distill.optimiser.warmup_images=640",
    "evaluate.samples=100",
    "gate.recall=0.1",  # trainings this short stand at the recipe's own, 0.3
    "evaluate.seeds=2",
    "evaluate.teacher_steps=[1,2,4]",
]


class Runner:
    """`runner(...)` runs the pipeline in a workspace; `text` is what it showed."""

    def __init__(self, workspace: Path) -> None:
        self.workspace, self.text = workspace, ""

    def __call__(self, *overrides: str, **options):
        from workflows.config.loading import load_config
        from workflows.pipeline.run import run_pipeline
        from workflows.rendering.screen import Screen
        from workflows.session.options import RunOptions

        shown = io.StringIO()
        screen = Screen(Console(file=shown, width=200, highlight=False))
        try:
            return run_pipeline(
                load_config("digits", [*SMALL, *overrides]), RunOptions(workspace=self.workspace, **options), screen
            )
        finally:
            self.text = shown.getvalue()
