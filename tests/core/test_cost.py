"""Costs on fake tensors against closed forms, against real tensors, and against torch's own tracker."""

import contextlib
from functools import cache

import pytest
import torch
from states import START, at_step, create_state
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from mmdistill_core.artifact import build_denoiser
from mmdistill_core.diffusion.schedules import Cosine
from mmdistill_core.engine import OptimiserOptions
from mmdistill_core.engine.cost import FUSED_ATTENTION, Meter, forward_flops, phase_cost
from mmdistill_core.engine.step import backward
from mmdistill_core.methods import METHODS
from mmdistill_core.methods.base import Batch
from mmdistill_core.networks.dit import DiTConfig
from mmdistill_core.networks.preconditioner import Preconditioner
from mmdistill_core.rng import Draws

CONFIG = DiTConfig(image_size=16, channels=3, num_classes=10, patch=4, width=48, depth=2, heads=4)
IMAGE = (3, 16, 16)
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


def denoiser():
    return build_denoiser(network=CONFIG, prediction="v", schedule={"name": "cosine"})


def state_of(update):
    method = METHODS["moment_matching"](schedule=Cosine(), k=8, update=update)
    given = {role.name: denoiser() for role in method.roles}
    if update == "instant":
        given["preconditioner"] = Preconditioner.identity(given["teacher"])
    return create_state(
        method=method, given=given, options=OptimiserOptions(), global_batch=8, total_images=8, best_role="student"
    )


@cache
def costs(update, fake):
    with FakeTensorMode() if fake else contextlib.nullcontext():
        state = state_of(update)
        phases = [phase for step in range(2) for phase in state.method.phases(at_step(step))]
        return [phase_cost(state, phase, IMAGE, label=True) for phase in phases]


def test_a_forward_has_the_operations_of_its_matrices():
    tokens, inputs, w = 16, 3 * 4 * 4, CONFIG.width
    condition = 128 * w + w * w + CONFIG.depth * 6 * w * w + 2 * w * w
    block = tokens * (3 + 1 + 8) * w * w + 2 * tokens * tokens * w
    by_hand = 2 * (condition + CONFIG.depth * block + 2 * tokens * inputs * w)
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode:
            assert forward_flops(denoiser(), IMAGE) == by_hand


@pytest.mark.parametrize("update", ["alternating", "joint", "instant"])
def test_fake_tensors_cost_what_real_ones_do(update):
    assert costs(update, fake=True) == costs(update, fake=False)


@pytest.mark.parametrize(("update", "forwards"), [("alternating", 5), ("joint", 7), ("instant", 5)])
def test_a_backward_is_two_forwards(update, forwards):
    with FakeTensorMode():
        one = forward_flops(denoiser(), IMAGE)
    for cost in costs(update, fake=True):
        assert cost.flops / one == pytest.approx(forwards, rel=0.02)


def test_operations_are_those_of_torchs_own_counter():
    state = state_of("instant")
    (phase,) = state.method.phases(START)
    state.global_batch = 4
    batch = Batch(torch.zeros(4, *IMAGE), torch.zeros(4, dtype=torch.long))
    found = []
    for counter in (Meter(), FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION)):
        with FakeTensorMode(allow_non_fake_inputs=True), counter:
            backward(state, phase, batch, Draws(0, range(4), 4))
        found.append(counter.flops if isinstance(counter, Meter) else counter.get_total_flops())
    assert found[0] == found[1] > 0


def test_the_peak_counts_what_is_alive_at_once_and_views_once():
    mine = torch.zeros(1000)
    with Meter([mine]) as memory:
        a = torch.zeros(100)
        b = a.view(10, 10) + 1
        del a
        c = torch.zeros(50)
        mine.add_(1)
    assert memory.peak == 4 * 200
    assert memory.bytes == 4 * 150
    del b, c


def run(state, phase, n, around):
    """Runs a loss and its backward pass for n images inside `around`."""
    batch = Batch(torch.zeros(n, *IMAGE), torch.zeros(n, dtype=torch.long))
    for optimiser in state.optimisers.values():
        optimiser.zero_grad(set_to_none=True)
    with around:
        losses = phase.loss(state.networks, batch, torch.Generator(), START)
        torch.stack([loss.mean() for loss in losses.per_sample.values()]).sum().backward()


@pytest.mark.parametrize("update", ["alternating", "joint"])
def test_bytes_are_what_autograd_keeps_and_some_temporaries(update):
    state = state_of(update)
    phase = state.method.phases(at_step(1))[0]
    weights = {p.untyped_storage()._cdata for n in state.networks.values() for p in (*n.parameters(), *n.buffers())}

    def kept(n):
        storages = {}

        def pack(t):
            storages[t.untyped_storage()._cdata] = t.untyped_storage()
            return t

        run(state, phase, n, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
        return sum(s.nbytes() for name, s in storages.items() if name not in weights)

    by_hooks = (kept(32) - kept(16)) / 16
    assert by_hooks < phase_cost(state, phase, IMAGE, label=True).bytes < 1.5 * by_hooks


def test_bytes_agree_with_torchs_own_tracker():
    method = METHODS["denoising"](schedule=Cosine())
    given = {role.name: denoiser() for role in method.roles}
    state = create_state(
        method=method, given=given, options=OptimiserOptions(), global_batch=8, total_images=8, best_role="teacher"
    )
    (phase,) = method.phases(START)

    def tracked(n):
        tracker = MemTracker()
        tracker.track_external(state.networks["teacher"])
        run(state, phase, n, tracker)
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    ours = phase_cost(state, phase, IMAGE, label=True).bytes
    assert ours == pytest.approx((tracked(32) - tracked(16)) / 16, rel=0.02)
