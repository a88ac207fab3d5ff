"""A teacher that diffusers trained and saved, distilled here, back in diffusers: nearer to the data than it in as many steps."""

import pytest
import torch

from mmdistill_core import distill, read_diffusers, teacher_of, to_diffusers
from mmdistill_core.diffusion.schedules import Betas
from mmdistill_core.engine import OptimiserOptions
from mmdistill_core.metrics.frechet import frechet_distance, moments

diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
K, COUNT = 8, 1500
UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
SCHEDULERS = {
    "eps, linear betas": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "v, zero terminal": lambda: diffusers.DDPMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    ),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "edm": lambda: diffusers.EDMEulerScheduler(sigma_data=0.5),
}


def images():
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


def loss_of(network, scheduler, x):
    """The objective of diffusers' own training examples."""
    eps = torch.randn_like(x)
    if isinstance(scheduler, diffusers.DDPMScheduler):
        i = torch.randint(0, 1000, (len(x),))
        wanted = eps if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(x, eps, i)
        return (network(scheduler.add_noise(x, eps, i), i).sample - wanted).square().mean()
    if isinstance(scheduler, diffusers.EDMEulerScheduler):
        sigma = torch.exp(1.2 * torch.randn(len(x)) - 1.2)[:, None, None, None]
        z = x + sigma * eps
        out = network(scheduler.precondition_inputs(z, sigma), scheduler.precondition_noise(sigma).flatten()).sample
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        return (weight * (scheduler.precondition_outputs(z, out, sigma) - x).square()).mean()
    sigma = torch.rand(len(x))
    z = (1 - sigma[:, None, None, None]) * x + sigma[:, None, None, None] * eps
    return (network(z, 1000 * sigma).sample - (eps - x)).square().mean()


def trained(loss, network, steps=600):
    x = images()
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(x[torch.randint(0, len(x), (64,))]).backward()
        optimiser.step()
        rates.step()
    return network.eval()


def distance(samples):
    return frechet_distance(moments(samples.flatten(1)), moments(images().flatten(1)))


def student_of(teacher):
    rates = OptimiserOptions(lr=2e-4, decay="linear", warmup_images=3200)
    return distill(teacher, images(), k=K, images=25_600, batch=64, optimiser=rates, z_t="rollout", w_s="sigmoid")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # other tests run beside it
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_out_of_diffusers_and_back(kind, tmp_path):
    network, scheduler = diffusers.UNet2DModel(**UNET), SCHEDULERS[kind]()
    trained(lambda x: loss_of(network, scheduler, x), network)
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path / "theirs")
    teacher = read_diffusers(tmp_path / "theirs")
    student = student_of(teacher)
    if isinstance(scheduler, diffusers.DDPMScheduler):
        to_diffusers(student, tmp_path / "ours")
        of_teacher, of_student = (sampled(tmp_path / name) for name in ("theirs", "ours"))
    else:
        of_teacher, of_student = teacher.sample(COUNT, k=K), student.sample(COUNT)
    before, after = distance(of_teacher), distance(of_student)
    print(f"{kind}: teacher {before:.3f}, student {after:.3f} at {K} steps")
    assert after <= 0.5 * before


def sampled(folder):
    """By stock diffusers, with timesteps that begin at the noisiest one."""
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    pipeline.scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        batch_size=COUNT, num_inference_steps=K, output_type="np", generator=torch.Generator().manual_seed(1)
    )
    return torch.from_numpy(found.images).permute(0, 3, 1, 2) * 2 - 1


class Plain(torch.nn.Module):
    """A network that no library knows, told t."""

    def __init__(self):
        super().__init__()
        self.inner = diffusers.UNet2DModel(**UNET)

    def forward(self, z, t):
        return self.inner(z, 1000 * t).sample


def test_a_plain_module():
    network, schedule = Plain(), Betas()

    def loss(x):
        t, eps = torch.rand(len(x)), torch.randn_like(x)
        a, s = schedule.alpha(t)[:, None, None, None], schedule.sigma(t)[:, None, None, None]
        return (network(a * x + s * eps, t) - (a * eps - s * x)).square().mean()

    trained(loss, network)
    teacher = teacher_of(network, images(), prediction="v", schedule=schedule)
    before, after = distance(teacher.sample(COUNT, k=K)), distance(student_of(teacher).sample(COUNT))
    print(f"plain: teacher {before:.3f}, student {after:.3f} at {K} steps")
    assert after <= 0.5 * before
