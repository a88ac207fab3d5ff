"""A network trained and saved by diffusers, without any code of ours, as the teacher of a run."""

import json

import pytest
import torch

from workflows.errors import UserError

diffusers = pytest.importorskip("diffusers")
ONE_STUDENT = ["distill.k=[2]", "distill.overrides={}", "evaluate.seeds=1", "data.reporting=[random]"]
UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "num_class_embeds": 10,
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A pipeline folder, from the objective that diffusers' own examples train: the mean squared error of the noise."""
    from workflows.dataset.sources.packaged import digits

    torch.set_num_threads(1)  # other tests run beside it
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(part) for part in digits())
    network, scheduler = diffusers.UNet2DModel(**UNET), diffusers.DDPMScheduler()
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(200):
        rows = torch.randint(0, len(images), (64,))
        x, i = 2 * images[rows].float() - 1, torch.randint(0, 1000, (64,))
        eps = torch.randn_like(x)
        out = network(scheduler.add_noise(x, eps, i), i, class_labels=labels[rows]).sample
        optimiser.zero_grad()
        (out - eps).square().mean().backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("theirs") / "pipeline"
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(folder)
    return folder


def test_a_run_with_it_from_its_import_to_a_registered_student(theirs, runner):
    summary = runner(*ONE_STUDENT, f"teacher={theirs}")
    (student,) = summary["students"]
    assert student["frechet"] > 0
    assert "read as eps of betas; its error is 0." in runner.text
    (model,) = (runner.workspace / "stages").glob("teacher-*/model/model.json")
    stored = json.loads(model.read_text())
    assert (stored["prediction"], stored["schedule"]["name"], stored["network"]["kind"]) == (
        "eps",
        "betas",
        "diffusers",
    )
    assert len(stored["provenance"]["proof"]) == 16
    again = runner(*ONE_STUDENT, f"teacher={theirs}")
    assert all(stage["reused"] for stage in again["stages"])


def test_read_wrongly_it_is_refused_with_the_reading_that_fits(theirs, runner):
    wrong = "teacher.read={prediction: v, schedule: {name: betas}, time: index}"
    with pytest.raises(UserError, match="does not denoise these images: at logsnr") as caught:
        runner(*ONE_STUDENT, f"teacher={{model: {theirs}}}", wrong, until="teacher")
    assert caught.value.hint == "it does with --set teacher.read.prediction=eps"
