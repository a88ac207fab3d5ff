"""How fast the auxiliary must follow the student: the descent on constants, whose course is known exactly.

The student says b, the auxiliary m, the teacher 0, whatever they see. An update of the student moves b by -h m. The auxiliary's
moves m by rho (b - m), and with the pull by rho (b / 2 - m). With n updates of the auxiliary before one of the student, b falls
without ringing if 1 - (1 - rho)^n >= 4 h / (1 + h)^2. The pull halves h.
"""

from itertools import pairwise

import pytest
import torch
from oracles import COSINE
from states import START, at_step, matching
from torch import nn

from mmdistill_core.methods.base import Batch
from mmdistill_core.rng import generator

H = RHO = 0.05
ROUNDS = 200


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, z, t, label=None):
        return self.value.expand_as(z)


def course(n, *, pull):
    """b after each update of the student, by the method's own losses and phases."""
    method = matching(schedule=COSINE, k=1, update="alternating", auxiliary_updates=n, pull=pull)
    nets = {"teacher": Constant(0.0), "student": Constant(1.0), "auxiliary": Constant(0.0)}
    # The gradient of |b - m|^2 is 2 (m - b), and with the pull 2 (m - b) + 2 m.
    rates = {"student": H, "auxiliary": RHO / (4 if pull else 2)}
    batch, b = Batch(torch.zeros(1, 1, dtype=torch.float64)), []
    for step in range(ROUNDS * method.cycle):
        (phase,) = method.phases(at_step(step))
        losses = phase.loss(nets, batch, generator(step), START).per_sample
        for role, loss in losses.items():
            (slope,) = torch.autograd.grad(loss.mean(), [nets[role].value])
            nets[role].value.data -= rates[role] * slope
        if "student" in losses:
            b.append(nets["student"].value.item())
    return b


@pytest.mark.parametrize(
    ("pull", "n", "changes", "lowest"),
    [
        (False, 1, 3, -0.158), (False, 2, 3, -0.040), (False, 3, 2, -0.003), (False, 4, 0, None), (False, 10, 0, None),
        (True, 1, 1, -0.040), (True, 2, 0, None), (True, 4, 0, None),
    ],
)  # fmt: skip
def test_it_rings_as_often_as_the_map_does_and_not_beyond_the_bound(pull, n, changes, lowest):
    b = course(n, pull=pull)
    signs = [value > 0 for value in b]
    assert sum(x != y for x, y in pairwise(signs)) == changes
    if lowest is not None:
        assert min(b) == pytest.approx(lowest, abs=1e-3)
    h = H / 2 if pull else H
    assert (1 - (1 - RHO) ** n >= 4 * h / (1 + h) ** 2) == (changes == 0)
