"""Round trips through the pivot, and each prediction against its definition."""

import pytest
import torch
from test_schedules import ALL

from mmdistill_core.diffusion.predictions import PREDICTIONS, prediction_from_x, x_from_prediction
from mmdistill_core.diffusion.process import expand, q_sample

T = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


@pytest.fixture(params=ALL, ids=lambda s: s.name)
def case(request):
    schedule, rng = request.param, torch.Generator().manual_seed(0)
    x, eps = (torch.randn(7, 2, 3, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    z = q_sample(schedule=schedule, x=x, eps=eps, t=T)
    return dict(x=x, eps=eps, z=z, alpha=schedule.alpha(T), sigma=schedule.sigma(T))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_round_trip(case, prediction):
    level = {name: case[name] for name in ("z", "alpha", "sigma")}
    value = prediction_from_x(prediction=prediction, x=case["x"], **level)
    back = x_from_prediction(prediction=prediction, value=value, **level)
    torch.testing.assert_close(back, case["x"], atol=1e-7, rtol=1e-7)


def test_definitions(case):
    level = {name: case[name] for name in ("z", "alpha", "sigma")}
    a, s = expand(case["alpha"], like=case["x"]), expand(case["sigma"], like=case["x"])
    expected = {
        "x": case["x"],
        "eps": case["eps"],
        "v": (a * case["eps"] - s * case["x"]) / torch.hypot(a, s),
        "flow": case["eps"] - case["x"],
    }
    for prediction in PREDICTIONS:
        value = prediction_from_x(prediction=prediction, x=case["x"], **level)
        torch.testing.assert_close(value, expected[prediction], atol=1e-6, rtol=1e-6)


def test_unknown_prediction_names_the_choices():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="x, eps, v, flow"):
        x_from_prediction(prediction="velocity", value=one, z=one, alpha=one[0], sigma=one[0])
