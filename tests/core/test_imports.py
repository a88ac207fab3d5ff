"""Teachers from elsewhere: x_hat is what diffusers computes of the same output, and what can't be read is a line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mmdistill_core.artifact import extractor_class, load_model, save_model
from mmdistill_core.diffusion.schedules import Betas
from mmdistill_core.imports import NotATeacher, Reading, read_diffusers, read_module, reading_of
from mmdistill_core.networks.config import network_config
from mmdistill_core.networks.foreign import DiffusersConfig

diffusers = pytest.importorskip("diffusers")
SMALL = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


def unet(**changes):
    """With weights as after a training: none is 0."""
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**SMALL | changes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def saved(folder, scheduler, **changes):
    diffusers.DDPMPipeline(unet(**changes), scheduler).save_pretrained(folder)
    return folder


def states(n=4):
    torch.manual_seed(1)
    return torch.randn(n, 3, 8, 8)


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero terminal"])
@pytest.mark.parametrize("betas", BETAS)
def test_betas_are_those_of_diffusers(betas, zero):
    scheduler = diffusers.DDPMScheduler(beta_schedule=betas, rescale_betas_zero_snr=zero)
    t = torch.arange(1, 1001) / 1000
    found = Betas(betas=betas, zero_terminal=zero).alpha(t) ** 2
    # diffusers multiplies a thousand factors in float32.
    torch.testing.assert_close(found, scheduler.alphas_cumprod, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero terminal"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", BETAS)
def test_x_hat_is_that_of_the_ddpm_scheduler(betas, prediction, zero, tmp_path):
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=betas, prediction_type=prediction, rescale_betas_zero_snr=zero, clip_sample=False
    )
    model, z = read_diffusers(saved(tmp_path, scheduler)), states()
    network = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    with torch.no_grad():
        for i in (0, 20, 400, 800, min(990, model.schedule.steps - 1)):
            theirs = scheduler.step(network(z, i).sample, i, z).pred_original_sample
            ours = model.denoiser(z, torch.full((4,), (i + 1) / model.schedule.steps))
            scale = theirs.abs().max()  # eps at low signal is divided by a small alpha
            torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("betas", "zero", "steps"), [("linear", False, 1000), ("linear", True, 950), ("squaredcos_cap_v2", False, 997)]
)
def test_an_eps_network_is_sampled_from_the_largest_time_that_it_knows(betas, zero, steps, tmp_path):
    """Where no signal is left, x_hat = (z - sigma eps) / alpha is noise."""
    scheduler = diffusers.DDPMScheduler(beta_schedule=betas, rescale_betas_zero_snr=zero)
    schedule = read_diffusers(saved(tmp_path, scheduler)).schedule
    assert schedule.steps == pytest.approx(steps, abs=1)
    t = torch.arange(1, schedule.steps + 1) / schedule.steps
    torch.testing.assert_close(schedule.alpha(t) ** 2, scheduler.alphas_cumprod[: schedule.steps], rtol=2e-4, atol=1e-7)
    assert schedule.alpha(torch.ones(1)) >= 0.004


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_x_hat_is_that_of_the_flow_matching_scheduler(shift, tmp_path):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    model, z = read_diffusers(saved(tmp_path, scheduler)), states()
    network = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    with torch.no_grad():
        for i in (0, 300, 999):
            sigma, told = scheduler.sigmas[i], scheduler.timesteps[i]
            t = model.schedule.t_from_logsnr(2 * torch.log((1 - sigma) / sigma).clamp(-20, 20)).expand(4)
            ours = model.denoiser(z, t)
            torch.testing.assert_close(ours, z - sigma * network(z, told).sample, rtol=0, atol=2e-4 if i == 0 else 1e-5)
    # sigma = shift t / (1 + (shift - 1) t): the times of the scheduler are those of a uniform grid.
    t = torch.linspace(0.1, 0.9, 9)
    torch.testing.assert_close(model.schedule.sigma(t), shift * t / (1 + (shift - 1) * t))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_x_hat_is_that_of_edms_preconditioning(prediction, tmp_path):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction)
    model, noise = read_diffusers(saved(tmp_path, scheduler)), states()
    network = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    with torch.no_grad():
        for sigma in torch.tensor([0.01, 0.5, 3.0, 70.0]):
            z = sigma * noise
            told = scheduler.precondition_noise(sigma)
            out = network(scheduler.precondition_inputs(z, sigma), told.expand(4)).sample
            t = model.schedule.t_from_logsnr(-2 * sigma.log()).expand(4)
            theirs = scheduler.precondition_outputs(z, out, sigma)
            torch.testing.assert_close(model.denoiser(z, t), theirs, rtol=1e-4, atol=1e-4)


def test_labels_conditions_and_the_null_label(tmp_path):
    """Eleven embeddings may be ten classes and "no label"."""
    saved(tmp_path, diffusers.DDPMScheduler(), num_class_embeds=11)
    model, z, t = read_diffusers(tmp_path, classes=10), states(2), torch.tensor([0.3, 0.6])
    assert (model.network.num_classes, model.null_label) == (10, True)
    plain = read_diffusers(tmp_path)
    assert (plain.network.num_classes, plain.null_label) == (11, False)
    assert torch.equal(model.denoiser(z, t), plain.denoiser(z, t, torch.tensor([10, 10])))
    told = model.denoiser.conditioned_on("guidance")
    label, w = torch.tensor([1, 2]), {"guidance": torch.tensor([0.2, 0.7])}
    assert torch.equal(told.eval()(z, t, label, w), model.denoiser(z, t, label))
    torch.nn.init.normal_(told.backbone.conditions["guidance"].narrow.weight)
    assert not torch.allclose(told(z, t, label, w), model.denoiser(z, t, label))
    assert not torch.allclose(told(z, t, label, w), told(z, t, label, {"guidance": w["guidance"] + 0.1}))
    with pytest.raises(NotATeacher, match="classes: 4; the network's embedding has 11"):
        read_diffusers(tmp_path, classes=4)


def test_it_is_stored_as_a_model_and_sampled_as_ours(tmp_path):
    model = read_diffusers(saved(tmp_path / "theirs", diffusers.DDPMScheduler(prediction_type="v_prediction")))
    save_model(tmp_path / "ours", model)
    again = load_model(tmp_path / "ours")
    assert again.network == model.network
    assert again.schedule == model.schedule
    assert torch.equal(again.sample(3, k=4, seed=1), model.sample(3, k=4, seed=1))


def module(width=4) -> torch.nn.Module:
    """A network of another package: it is told t, and takes no label."""

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, width, 3, padding=1)
            self.out = torch.nn.Conv2d(width, 3, 3, padding=1)

        def forward(self, z, t):
            return self.out(torch.nn.functional.silu(self.conv(z) + t[:, None, None, None]))

    return Plain()


def test_a_stored_model_makes_nothing_else_run(tmp_path):
    """A model folder is data. Whatever function its description names, only what makes networks is called."""
    never = tmp_path / "never"
    for place in ("subprocess:check_output", "os:system"):
        with pytest.raises(ValueError, match="is no NetworkConfig"):
            network_config({"kind": place, "args": ["touch", str(never)]})
        with pytest.raises(ValueError, match="is no Extractor"):
            extractor_class(place)
        options = {"args": ["touch", str(never)]}
        config = network_config(
            {"kind": "module", "image_size": 8, "channels": 3, "factory": place, "options": options}
        )
        with pytest.raises(ValueError, match="annotated to return one"):
            config.inner()
    assert not never.exists()


READING = Reading(Betas(), "v", {"time": "unit"})


def test_any_module_by_its_factory(tmp_path):
    theirs = module(width=6)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    shape = {"image_size": 8, "channels": 3, "reading": READING}
    model = read_module(f"{__name__}:module", **shape, weights=tmp_path / "w.safetensors", width=6)
    z, t = states(2), torch.tensor([0.3, 0.6])
    a, s = model.schedule.alpha(t)[:, None, None, None], model.schedule.sigma(t)[:, None, None, None]
    torch.testing.assert_close(model.denoiser(z, t), a * z - s * theirs(z, t))
    with pytest.raises(NotATeacher, match="has the shape \\[6, 3, 3, 3\\]; the network's is \\[4, 3, 3, 3\\]"):
        read_module(f"{__name__}:module", **shape, weights=tmp_path / "w.safetensors")
    with pytest.raises(NotATeacher, match="a pickle is not read"):
        read_module(f"{__name__}:module", **shape, weights=tmp_path / "w.pt")
    for factory, said in (
        ("nowhere.at:all", "No module named"),
        (f"{__name__}:states", "annotated to return one"),
    ):
        with pytest.raises(NotATeacher, match=said):
            read_module(factory, **shape)
    with pytest.raises(ValueError, match="has no time_embedding, so it can't be told guidance"):
        model.denoiser.conditioned_on("guidance")


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler: a scheduler without betas"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, "'laplace' is not one of linear"),
        (
            {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "prediction_type": "x"},
            "prediction_type 'x' is not",
        ),
        (
            {"_class_name": "DDPMScheduler", "trained_betas": [0.1, 2.0], "num_train_timesteps": 2},
            "betas should be above 0",
        ),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "prediction_type 'sample' is not one of"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ],
)
def test_a_scheduler_that_says_too_little_is_a_line(scheduler, said):
    with pytest.raises(NotATeacher, match=said):
        reading_of(scheduler)


class TestFolders:
    def changed(self, folder, part, **values):
        path = folder / part
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    @pytest.fixture
    def folder(self, tmp_path):
        return saved(tmp_path / "pipeline", diffusers.DDPMScheduler())

    def test_a_network_alone_needs_a_reading(self, folder):
        with pytest.raises(NotATeacher, match="no scheduler beside the network"):
            read_diffusers(folder / "unet")
        assert read_diffusers(folder / "unet", reading=READING).denoiser.prediction == "v"

    def test_nothing_is_there(self, folder):
        with pytest.raises(NotATeacher, match="neither a pipeline"):
            read_diffusers(folder / "nothing")
        self.changed(folder, "model_index.json", unet=None)
        with pytest.raises(NotATeacher, match="a pipeline without a network"):
            read_diffusers(folder)

    def test_other_classes_and_shapes(self, folder):
        self.changed(folder, "unet/config.json", _class_name="UNet1DModel")
        with pytest.raises(NotATeacher, match="'UNet1DModel' is not one of UNet2DModel"):
            read_diffusers(folder)
        self.changed(folder, "unet/config.json", _class_name="UNet2DModel", sample_size=[8, 16])
        with pytest.raises(NotATeacher, match="sample_size \\[8, 16\\] should be one whole number"):
            read_diffusers(folder)

    def test_weights_that_are_not_the_networks(self, folder):
        file = folder / "unet/diffusion_pytorch_model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:-100])
        with pytest.raises(NotATeacher, match="damaged"):
            read_diffusers(folder)
        file.write_bytes(whole)
        self.changed(folder, "unet/config.json", layers_per_block=2)
        with pytest.raises(NotATeacher, match="are missing, such as"):
            read_diffusers(folder)
        self.changed(folder, "unet/config.json", layers_per_block=1, in_channels=1)
        with pytest.raises(NotATeacher, match=r"conv_in\.weight has the shape"):
            read_diffusers(folder)

    def test_a_pickle_is_refused_unread(self, folder):
        (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
        (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
        with pytest.raises(NotATeacher, match="a pickle, which can run code"):
            read_diffusers(folder)

    def test_shards_by_their_index_and_none_outside(self, folder):
        network = diffusers.UNet2DModel.from_pretrained(folder / "unet")
        whole = read_diffusers(folder)
        (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
        network.save_pretrained(folder / "unet", max_shard_size="20KB")
        assert (folder / "unet/diffusion_pytorch_model.safetensors.index.json").is_file()
        again, z = read_diffusers(folder), states(2)
        t = torch.tensor([0.3, 0.6])
        assert torch.equal(again.denoiser(z, t), whole.denoiser(z, t))
        self.changed(
            folder, "unet/diffusion_pytorch_model.safetensors.index.json", weight_map={"a": "../../x.safetensors"}
        )
        with pytest.raises(NotATeacher, match="names a file outside its folder"):
            read_diffusers(folder)


def test_a_configuration_without_its_schedule_builds_nothing():
    with pytest.raises(ValueError, match=r"'UNet3D' is not one of"):
        DiffusersConfig(image_size=8, channels=3, model={"_class_name": "UNet3D"})
    with pytest.raises(ValueError, match=r"network\.time: 'now' is not one of index"):
        DiffusersConfig(image_size=8, channels=3, model={"_class_name": "UNet2DModel"}, time="now")
