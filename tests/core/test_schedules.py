"""Every schedule fulfils every property."""

import math

import pytest
import torch

from mmdistill_core.diffusion.schedules import (
    LOGSNR_MAX,
    SCHEDULES,
    Betas,
    Cosine,
    Karras,
    Linear,
    ShiftedCosine,
    schedule_from_dict,
    schedule_to_dict,
)

ALL = [
    Cosine(),
    ShiftedCosine(resolution=128, reference=32),
    Linear(),
    Linear(shift=3),
    Karras(),
    Betas(),
    Betas(200, "squaredcos_cap_v2"),
]
INSIDE = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
WHOLE = torch.linspace(0, 1, 101)


def test_every_schedule_is_tested():
    assert {type(s) for s in ALL} == set(SCHEDULES.values())


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
class TestProperties:
    def test_inverse(self, schedule):
        torch.testing.assert_close(schedule.t_from_logsnr(schedule.logsnr(INSIDE)), INSIDE, atol=1e-10, rtol=0)

    def test_logsnr_falls_strictly(self, schedule):
        assert (schedule.logsnr(INSIDE).diff() < 0).all()

    def test_logsnr_is_that_of_alpha_and_sigma(self, schedule):
        ratio = 2 * (schedule.alpha(INSIDE) / schedule.sigma(INSIDE)).log()
        torch.testing.assert_close(schedule.logsnr(INSIDE), ratio, atol=1e-9, rtol=1e-9)

    def test_ends_are_finite_in_float32(self, schedule):
        for values in (schedule.logsnr(WHOLE), schedule.alpha(WHOLE), schedule.sigma(WHOLE)):
            assert values.isfinite().all()
        assert (schedule.sigma(WHOLE) > 0).all()

    def test_float32_keeps_falling_up_to_the_ends(self, schedule):
        logsnr = schedule.logsnr(WHOLE)
        inside = logsnr.abs() < LOGSNR_MAX - 1e-3
        assert (logsnr.diff()[inside[1:] & inside[:-1]] < 0).all()

    def test_variance_is_preserved_where_that_is_said(self, schedule):
        total = schedule.alpha(WHOLE) ** 2 + schedule.sigma(WHOLE) ** 2
        close = torch.allclose(total, torch.ones_like(total), atol=1e-6)
        assert close == schedule.variance_preserving

    def test_survives_json(self, schedule):
        assert schedule_from_dict(schedule_to_dict(schedule)) == schedule

    def test_inverse_beyond_the_ends_stays_in_range(self, schedule):
        t = schedule.t_from_logsnr(torch.tensor([-60.0, 60.0]))
        assert ((t >= 0) & (t <= 1)).all()


def test_cosine_is_cosine_and_sine():
    torch.testing.assert_close(Cosine().alpha(INSIDE), torch.cos(math.pi / 2 * INSIDE))
    torch.testing.assert_close(Cosine().sigma(INSIDE), torch.sin(math.pi / 2 * INSIDE))


def test_linear_is_one_minus_t_and_t():
    torch.testing.assert_close(Linear().alpha(INSIDE), 1 - INSIDE)
    torch.testing.assert_close(Linear().sigma(INSIDE), INSIDE)


def test_shift_is_in_logsnr():
    shifted = ShiftedCosine(resolution=128, reference=32)
    expected = Cosine().logsnr(INSIDE) + 2 * math.log(32 / 128)
    torch.testing.assert_close(shifted.logsnr(INSIDE), expected)


def test_karras_ends():
    ends = Karras().sigma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.002, 80.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("values", "said"), [({"name": "cosin"}, "cosine, shifted_cosine"), ({"name": "karras", "rh": 7}, "rho")]
)
def test_errors_name_the_choices(values, said):
    with pytest.raises(ValueError, match=said):
        schedule_from_dict(values)
