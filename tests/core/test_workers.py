"""A training is the same for any number of workers and any division of its batches."""

from dataclasses import replace

import pytest
import torch
from oracles import together
from trainings import MAKE, denoiser, make_batches, make_state, weights

from mmdistill_core.engine import train_step
from mmdistill_core.engine.preparation import squared_gradients
from mmdistill_core.rng import Draws, normal_like, uniform

STEPS = 3


def trained(name, world=1, micro_batch=None):
    """(weights, losses by step and role) after some steps; gradients are averaged over the workers, as DDP does."""

    method = MAKE[name]()
    if getattr(method, "update", "") == "instant":
        method = replace(method, derivative="double_backward")  # forward mode does not work in threads
    states = [make_state(method) for _ in range(world)]  # all threads share torch's own generator

    def of(rank, summed):
        state = states[rank]
        state.micro_batch = micro_batch
        state.averaged_over_workers = lambda statistic: {n: summed(v) / world for n, v in statistic.items()}

        def averaged(p):
            p.grad.copy_(summed(p.grad) / world)

        for role in state.optimisers:
            # With the default eps, rounding errors of a zero gradient would become whole steps.
            state.optimisers[role].param_groups[0]["eps"] = 1e-4
            if world > 1:
                for p in state.networks[role].parameters():
                    p.register_post_accumulate_grad_hook(averaged)
        batches, losses = make_batches(rank, world), []
        for _ in range(STEPS):
            for log in train_step(state=state, batches=batches, seed=0, rank=rank, world=world):
                means = [loss.mean() * log.share for loss in log.losses.per_sample.values()]
                losses += [summed(mean).item() / world for mean in means]
        return weights(state), losses

    found = together(world, of)
    assert all(losses == found[0][1] for _, losses in found)
    return found[0]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(("world", "micro_batch"), [(2, None), (3, None), (4, 5), (1, 16), (1, 7)])
def test_the_number_of_workers_and_parts_changes_rounding_alone(name, world, micro_batch):
    (whole, losses), (shared, shared_losses) = trained(name), trained(name, world, micro_batch)
    assert shared_losses == pytest.approx(losses, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-6)


def test_collected_second_moments_are_those_of_one_worker():
    def of(world):
        teachers = [denoiser() for _ in range(world)]

        def work(rank, summed):
            return squared_gradients(
                network=teachers[rank],
                method=MAKE["denoising"](),
                batches=make_batches(rank, world),
                steps=2,
                global_batch=64,
                seed=0,
                rank=rank,
                world=world,
                averaged_over_workers=lambda statistic: {n: summed(v) / world for n, v in statistic.items()},
            )

        return together(world, work)[0]

    for world in (3, 4):
        torch.testing.assert_close(of(world), of(1), rtol=1e-3, atol=1e-9)


def test_a_rows_draws_are_its_own():
    whole = Draws(3, range(12), 12)
    u, x = uniform(12, rng=whole), normal_like(torch.zeros(12, 2), rng=whole)
    for rows in (slice(4, 8), slice(1, None, 2), slice(0, 1)):
        part = Draws(3, range(12), 12)[rows]
        n = len(part.rows)
        assert torch.equal(uniform(n, rng=part), u[rows])
        assert torch.equal(normal_like(torch.zeros(n, 2), rng=part), x[rows])
    assert torch.equal(uniform(2, rng=Draws(3, range(12), 12)[1::2][2:4]), u[[5, 7]])
    assert len(set(u.tolist())) == 12


def test_a_worker_alone_draws_what_a_plain_generator_would():
    """So trainings on one worker are the same as before draws belonged to rows."""
    plain, rows = torch.Generator().manual_seed(5), Draws(5, range(8), 8)
    for _ in range(2):
        assert torch.equal(uniform(8, rng=plain), uniform(8, rng=rows))
        x = torch.zeros(8, 3)
        assert torch.equal(normal_like(x, rng=plain), normal_like(x, rng=rows))
