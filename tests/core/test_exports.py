"""Students in diffusers: stock classes make our samples of our noise, with no code of ours."""

import json

import numpy as np
import pytest
import torch

from mmdistill_core.artifact import DiffusionModel
from mmdistill_core.diffusion.schedules import Betas, Cosine, Linear, ShiftedCosine
from mmdistill_core.exports.diffusers import NotExportable, to_diffusers
from mmdistill_core.imports import Reading, read_diffusers
from mmdistill_core.methods.base import Sampler
from mmdistill_core.networks.unet import UNetConfig
from mmdistill_core.rng import Numbered

diffusers = pytest.importorskip("diffusers")
OURS = {"image_size": 8, "channels": 3, "width": 8, "levels": (1, 2), "attention": 4}


def trained(schedule, prediction, k, **changes):
    """Our U-Net as after a training: no weight is 0."""
    torch.manual_seed(0)
    denoiser = UNetConfig(**OURS | changes).denoiser(schedule=schedule, prediction=prediction).eval()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return DiffusionModel(denoiser.requires_grad_(False), k=k)


def sampled_by_diffusers(pipeline, monkeypatch, n, seed, **options):
    """In [-1, 1], from the draws of our samples `seed`."""
    draws = Numbered(seed, first=0, count=n)

    def ours(shape, generator=None, device=None, dtype=None, layout=None):
        return draws.normal_like(torch.empty(shape))

    for module in ("pipelines.ddpm.pipeline_ddpm", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", ours)
    if type(pipeline).__name__ == "FewStepPipeline":
        monkeypatch.setitem(type(pipeline).__call__.__wrapped__.__globals__, "randn_tensor", ours)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(output_type="np", **options).images
    return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2) * 2 - 1


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("prediction", ["v", "x"])
@pytest.mark.parametrize("schedule", [Cosine(), ShiftedCosine(64, 32), Betas()], ids=lambda one: one.name)
def test_an_unconditional_student_is_stock_in_every_part(schedule, prediction, k, tmp_path, monkeypatch):
    model = trained(schedule, prediction, k)
    to_diffusers(model, tmp_path)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    theirs = sampled_by_diffusers(pipeline, monkeypatch, 6, 3, batch_size=6, num_inference_steps=k)
    torch.testing.assert_close(theirs, model.sample(6, seed=3), rtol=0, atol=1e-4)


def test_a_student_with_classes_brings_its_pipeline(tmp_path, monkeypatch):
    model = trained(Cosine(), "v", 4, num_classes=5)
    to_diffusers(model, tmp_path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True
    )
    labels = [4, 0, 2, 2]
    theirs = sampled_by_diffusers(pipeline, monkeypatch, 4, 1, labels=labels)
    torch.testing.assert_close(theirs, model.sample(4, label=torch.tensor(labels), seed=1), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="labels: 5 is not one of 0 to 4"):
        pipeline(labels=[5])


def test_what_came_from_diffusers_goes_back_and_in_again(tmp_path, monkeypatch):
    """eps with linear betas, as most of its models are."""
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    model = read_diffusers(tmp_path / "theirs")
    student = DiffusionModel(model.denoiser, k=8)
    to_diffusers(student, tmp_path / "ours")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    theirs = sampled_by_diffusers(pipeline, monkeypatch, 4, 0, batch_size=4, num_inference_steps=8)
    torch.testing.assert_close(theirs, student.sample(4), rtol=0, atol=1e-4)
    again = read_diffusers(tmp_path / "ours")
    assert (again.schedule, again.denoiser.prediction) == (model.schedule, "eps")
    assert torch.equal(again.sample(4, k=8), student.sample(4))


def test_our_own_folder_is_read_back_as_the_same_function(tmp_path):
    """Ours told t = (i + 1) / 1000, and stock told i: the first layer of the time is turned by one step."""
    model = trained(Cosine(), "v", 8, num_classes=5)
    to_diffusers(model, tmp_path)
    reading = Reading(Cosine(), "v", {"time": "index"})
    again = read_diffusers(tmp_path / "unet", reading=reading, classes=5)
    torch.manual_seed(1)
    z, t, label = torch.randn(6, 3, 8, 8), torch.arange(1, 7) / 7, torch.tensor([0, 4, -1, 2, 3, 1])
    torch.testing.assert_close(again.denoiser(z, t, label), model.denoiser(z, t, label), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": Linear()}, "prediction v of the schedule linear"),
        ({"prediction": "flow"}, "prediction flow of the schedule cosine"),
        ({"k": 3}, "k: 3 steps are no whole number of 1000 timesteps"),
        ({"patch": 2}, "neither patches nor conditions"),
        ({"sampler": Sampler("ddim")}, "sampler: ddim"),
        ({"sampler": Sampler(options={"eta": 0.5})}, "sampler: ancestral {'eta': 0.5}"),
        ({"sampler": Sampler(times=(1.0, 0.3, 0.0))}, "its times or conditions are its own"),
    ],
)
def test_what_stock_classes_can_not_say_is_a_line(changes, said, tmp_path):
    made = {"schedule": Cosine(), "prediction": "v", "k": 2} | changes
    sampler = made.pop("sampler", None)
    model = trained(**made)
    if sampler is not None:
        model.samplers = {model.k: sampler}
    with pytest.raises(NotExportable, match=said):
        to_diffusers(model, tmp_path)
    assert not json.loads(
        (tmp_path / "model_index.json").read_text() if (tmp_path / "model_index.json").exists() else "{}"
    )
