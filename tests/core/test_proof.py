"""The proof of a teacher from elsewhere, on networks that are exact: each wrong reading is found, and named."""

import pytest
import torch

from mmdistill_core.diffusion.predictions import PREDICTIONS, prediction_from_x
from mmdistill_core.diffusion.schedules import Betas, Linear
from mmdistill_core.imports import Reading, read_module
from mmdistill_core.metrics.proof import LEVELS, errors, prove
from mmdistill_core.networks.foreign import TIMES

MEANS = torch.tensor([[-0.8, 0.1, 0.7], [0.5, -0.6, 0.2], [0.1, 0.8, -0.5]])
"""Of each class in each channel. All pixels of a channel have the same value, its mean plus noise of deviation .1."""
DEVIATION = 0.1
SCHEDULES = {"betas": Betas(), "linear": Linear()}


class Exact(torch.nn.Module):
    """The optimal denoiser of these images, by its output: what a perfectly trained network gives."""

    def __init__(self, prediction, schedule, time):
        super().__init__()
        self.prediction, self.schedule, self.time = prediction, SCHEDULES[schedule], time
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, z, told, label):
        t = self.t_of(told)
        a, s = self.schedule.alpha(t)[:, None, None, None], self.schedule.sigma(t)[:, None, None, None]
        mean, pixels, var = MEANS[label][:, :, None, None], z[0, 0].numel(), DEVIATION**2
        average = z.mean((2, 3), keepdim=True)
        x = mean + a * var / (a**2 * var + s**2 / pixels) * (average - a * mean)
        return self.scale * prediction_from_x(
            prediction=self.prediction,
            x=x.expand_as(z),
            z=z,
            alpha=self.schedule.alpha(t),
            sigma=self.schedule.sigma(t),
        )

    def t_of(self, told):
        """The inverse of TIMES, by a table. What lies outside of it is its nearest end, as for a network."""
        grid = torch.linspace(0, 1, 4001)
        values = TIMES[self.time](grid, self.schedule.logsnr(grid), 1000)
        place = torch.searchsorted(values.contiguous(), told.contiguous()).clamp(1, len(grid) - 1)
        low, high = values[place - 1], values[place]
        part = ((told - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
        return (grid[place - 1] + part * (grid[1] - grid[0])).clamp(1e-4, 1 - 1e-4)


def exact(**options) -> torch.nn.Module:
    return Exact(**options)


def images(n=400):
    torch.manual_seed(0)
    label = torch.arange(n) % 3
    flat = MEANS[label] + DEVIATION * torch.randn(n, 3)
    return flat[:, :, None, None].expand(n, 3, 4, 4).contiguous(), label


def model(prediction="v", schedule="betas", time="index", *, read=None):
    """The exact network, read as it is but for what `read` says."""
    read = {"prediction": prediction, "time": time} | (read or {})
    return read_module(
        f"{__name__}:exact",
        image_size=4,
        channels=3,
        num_classes=3,
        reading=Reading(SCHEDULES[schedule], read["prediction"], {"time": read["time"]}),
        prediction=prediction,
        schedule=schedule,
        time=time,
    ).denoiser


@pytest.mark.parametrize("time", sorted(TIMES))
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_exact_network_is_better_than_trivial_and_linear_at_every_level(prediction, schedule, time):
    levels = errors(model(prediction, schedule, time), *images())
    assert len(levels) == LEVELS
    assert prove(model(prediction, schedule, time), *images()).refused is False
    for one in levels:
        if one.judged:
            assert one.model < one.linear * 1.02


def test_the_trivial_errors_are_those_of_closed_forms():
    x, label = images(4000)
    levels = errors(model(), x, label)
    variance = float((MEANS[label] - MEANS.mean(0)).var(0, unbiased=False).mean()) + DEVIATION**2
    for one in levels:
        assert one.constant == pytest.approx(variance, rel=0.03)
        assert one.identity == pytest.approx(torch.tensor(-one.logsnr).exp().item(), rel=0.03)
        # One mode a channel correlates with the others; the best linear denoiser is between.
        assert one.linear <= 1.02 * one.trivial
    same, again = errors(model(), x, label), levels
    assert same == again, "by its seed"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prediction": "eps"}, "prediction: v"),
        ({"prediction": "x"}, "prediction: v"),
        ({"time": "unit"}, "time: index"),
        ({"time": "sigma"}, "time: index"),
        ({"prediction": "eps", "time": "unit"}, "prediction: v, time: index"),
    ],
)
def test_a_wrong_reading_is_found_and_the_right_one_named(wrong, named):
    denoiser, data = model(read=wrong), images()
    proof = prove(denoiser, *data)
    assert (proof.refused, proof.reason) == (True, named)


def test_other_images_than_it_was_trained_on_are_found():
    """It was trained on BGR, on [0, 1], on labels from 1: what we have is the other."""
    (x, label), denoiser = images(), model()
    for ours, named in (
        ((x.flip(1), label), "the channels are blue, green, red"),
        ((2 * x - 1, label), "images in [0, 1], not [-1, 1]"),
        ((x, (label - 1) % 3), "the labels begin at 1"),
        ((x, (label + 1) % 3), "the labels begin at 0, and these at 1"),
    ):
        proof = prove(denoiser, *ours)
        assert (proof.refused, proof.reason) == (True, named)


def test_a_network_that_learnt_nothing_is_bad_and_no_reading_helps():
    denoiser, data = model(), images()
    with torch.no_grad():
        denoiser.backbone.network.scale.fill_(-3.0)
    proof = prove(denoiser, *data)
    assert (proof.refused, proof.reason) == (True, None)
    with torch.no_grad():
        denoiser.backbone.network.scale.fill_(float("nan"))
    assert all(one.worse == one.judged for one in prove(denoiser, *data).errors)


def test_the_denoiser_itself_is_left_as_it_was():
    denoiser, data = model(read={"prediction": "eps"}), images()
    prove(denoiser, *data)
    assert (denoiser.prediction, denoiser.backbone.config.time) == ("eps", "index")
