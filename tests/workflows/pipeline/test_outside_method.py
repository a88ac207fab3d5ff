"""A method from outside: this file declares one, and the commands take it from a run to a sweep.

It has what moment matching has not: a role that is trained beside the student to no end but its own, an average whose decay follows
the training's progress, a curriculum, a round whose student is the next round's teacher, a student of several k, and a sampler of
its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest

from mmdistill_core.diffusion.process import ddim
from mmdistill_core.methods.base import (
    Average,
    Copy,
    Curve,
    Given,
    Losses,
    Method,
    Phase,
    Role,
    Round,
    Sampler,
)
from mmdistill_core.methods.parts import denoising_loss, noisy
from mmdistill_core.options import option
from mmdistill_core.rng import uniform

HERE = Path(__file__).parent


def twice(*, denoiser, schedule, z, times, rng, label):
    """DDIM, whose last step asks the network twice."""
    for t, s in pairwise(times):
        t, s = t.expand(len(z)), s.expand(len(z))
        x_hat = denoiser(z, t, label)
        z = ddim(schedule=schedule, z_t=z, x=x_hat, t=t, s=s) if s[0] > 0 else z
    return (x_hat + denoiser(z, t, label)) / 2


twice.evaluations = lambda k: k + 1


@dataclass(frozen=True)
class Mimic(Method):
    """The pupil learns the master's x_hat, at first at low noise alone; a rival learns the pupil's."""

    strength: float = option(1.0, "weight of the pupil's loss", gt=0)
    rival: bool = option(True, "train a rival beside the pupil")
    name: ClassVar[str] = "mimic"
    learners: ClassVar[tuple[str, ...]] = ("pupil", "rival")

    @property
    def roles(self):
        roles = [Role("master", Given("teacher")), Role("pupil", Copy("master"), trained=True)]
        if self.rival:
            roles.append(Role("rival", Copy("master"), trained=True, optimiser={"weight_decay": 0.01}))
        return (*roles, Role("pupil_mean", Average("pupil", decay=lambda progress: 0.9 * progress.share)))

    @property
    def result(self):
        return "pupil_mean"

    def phases(self, progress):
        """The rival learns in the first half of the training."""
        pupil = Phase(("pupil",), self._pupil_loss)
        return (Phase(("rival",), self._rival_loss), pupil) if self.rival and progress.share < 0.5 else (pupil,)

    def rounds(self, methods, *, warm=()):
        """One step by itself. All other numbers of steps share a student, whose teacher is a rough one."""
        most, several = max(methods), tuple(k for k in methods if k > 1)
        alone = [Round("k1", (1,), replace(methods[1], k=1))] if 1 in methods else []
        rough = Round("rough-start", (), replace(methods[most], k=most, rival=False), like=most)
        return (
            *alone,
            rough,
            Round("of-several", several, replace(methods[most], k=most), teacher=rough.name, like=most),
        )

    def sampler(self, k):
        return Sampler("test_outside_method:twice", times=tuple((1 - i / k) ** 2 for i in range(k + 1)))

    @property
    def curves(self):
        return (Curve("agreement", "agreement", "How far the pupil is from its master."),)

    def _drawn(self, batch, rng, progress):
        t = uniform(len(batch), rng=rng) * min(1.0, 0.5 + progress.share)
        return t, noisy(schedule=self.schedule, x=batch.x, t=t, rng=rng)

    def _pupil_loss(self, nets, batch, rng, progress):
        t, z = self._drawn(batch, rng, progress)
        loss = denoising_loss(
            x=nets["master"](z, t, batch.label), x_hat=nets["pupil"](z, t, batch.label), weight=1 + 0 * t
        )
        logs = {"agreement": loss.detach()}
        return Losses({"pupil": self.strength * loss}, logs, logs, self.schedule.logsnr(t), forwards=2)

    def _rival_loss(self, nets, batch, rng, progress):
        t, z = self._drawn(batch, rng, progress)
        x = nets["pupil"](z, t, batch.label).detach()
        loss = denoising_loss(x=x, x_hat=nets["rival"](z, t, batch.label), weight=1 + 0 * t)
        return Losses({"rival": loss}, forwards=2)


RECIPE = """
network: {width: 16, depth: 1, heads: 2}
data: {classifier_epochs: 1}
teacher: {images: 640, batch: 64, log_every: 320, optimiser: {warmup_images: 64}}
distill:
  method: mimic
  k: [1, 2, 3]
  images: 640
  batch: 64
  log_every: 128
  validate_every: 320
  validate_samples: 40
  strength: 2.0
  optimisers: {rival: {lr: 1.0e-4}}
  overrides: {3: {images: 320}}
evaluate: {samples: 40, seeds: 1, teacher_steps: [1, 4], samplers: [ddim]}
gate: {teacher_ratio: null, recall: 0.0}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe, and with what a package that brings the method would have installed."""
    folder = tmp_path_factory.mktemp("outside")
    about = folder / "installed" / "mimics-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mimics\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[mmdistill.methods]\nmimic = test_outside_method:Mimic\n")
    (folder / "mimics.yaml").write_text(RECIPE)
    return folder


def python(place, *words):
    """Runs Python in the folder, with the package installed."""
    paths = [str(place / "installed"), str(HERE), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *words], cwd=place, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "MLFLOW_TRACKING_URI": ""},
    )  # fmt: skip


COMMANDS = [
    "run -r mimics.yaml",
    "sample models:/mmdistill-mimics-student/3 --n 4 --out grid.png",
    "sweep -r mimics.yaml -k 3 --space strength=0.5,2.0 --no-register",
]
ONE_AFTER_ANOTHER = """
import sys
from workflows.cli.main import main
from workflows.cluster.session import ray_session

with ray_session():  # one for all of them
    for line in sys.argv[1:]:
        try:
            main(line.split())
        except SystemExit as end:
            assert end.code == 0, line
"""


@pytest.fixture(scope="module")
def finished(place):
    """(the workspace after the commands, what they said)."""
    done = python(place, "-c", ONE_AFTER_ANOTHER, *COMMANDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / ".mmdistill", done.stdout + done.stderr


def stage(workspace, name):
    (found,) = (workspace / "stages").glob(f"{name}-*")
    return found


@pytest.mark.ray
def test_its_rounds_are_stages_and_its_sampler_is_in_the_model(finished):
    workspace, _ = finished
    rough, student = stage(workspace, "distill-rough-start"), stage(workspace, "distill-of-several")
    model = json.loads((student / "model/model.json").read_text())
    assert model["provenance"]["teacher"] == json.loads((rough / "result.json").read_text())["identity"]
    assert model["samplers"].keys() == {"2", "3"}
    assert model["samplers"]["3"]["name"] == "test_outside_method:twice"
    assert model["samplers"]["3"]["times"] == pytest.approx([1, 4 / 9, 1 / 9, 0])
    rows = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert "loss/rival" in rows[0]
    assert "loss/rival" not in rows[-1], "the curriculum"
    assert not any("loss/rival" in line for line in (rough / "metrics.jsonl").read_text().splitlines())
    assert rows[-1]["n_images"] == 320, "its own images"


@pytest.mark.ray
def test_it_is_evaluated_registered_and_reported(finished):
    workspace, _ = finished
    table = json.loads((stage(workspace, "evaluate") / "table.json").read_text())
    students = {r["k"]: (r["sampler"], r["nfe"]) for r in table["rows"] if r["who"] == "student"}
    assert students == {k: ("test_outside_method:twice", k + 1) for k in (1, 2, 3)}
    page = (workspace / "reports/mimics/report.html").read_text()
    assert "How far the pupil is from its master." in page
    assert "few-step students by mimic" in page
    registered = json.loads((stage(workspace, "register") / "result.json").read_text())
    assert registered["students"] == {k: f"models:/mmdistill-mimics-student/{k}" for k in "123"}


@pytest.mark.ray
def test_its_student_is_sampled_and_its_options_are_swept(finished):
    workspace, said = finished
    assert "4 samples of 3 steps" in said
    assert (workspace.parent / "grid.png").exists()
    trials = json.loads((workspace / "reports/mimics-sweep/trials.json").read_text())["trials"]
    assert {(t["point"]["strength"], t["outcome"], t["images"]) for t in trials} == {
        (0.5, "finished", 640),
        (2.0, "finished", 640),
    }


def test_a_wrong_option_of_its_is_a_line(place):
    for setting, said in (
        ("strenght=1", "distill.strenght: no such option; did you mean strength?"),
        ("strength=0", "distill.strength: 0 should be greater than 0"),
        ("optimisers={critic: {lr: 1}}", "'critic' is none of the networks that mimic trains: pupil, rival"),
    ):
        done = python(place, "-m", "workflows", "run", "-r", "mimics.yaml", "-s", f"distill.{setting}")
        assert done.returncode == 2
        assert said in done.stderr
