"""What trainings cost, counted of the code that runs them, on fake tensors (mmdistill_core/engine/cost.py).

All that is counted grows with the depth of the network, by the same for every block. So a network of two blocks and one of three
tell what one of any depth costs: exactly, and sooner than the paper's networks themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm
from typing import Any

from workflows.config.schema import RunConfig
from workflows.dataset.sources import source_of

UPDATES = ("alternating", "joint", "instant")
FEW, MORE = 2, 3
"""Blocks of the networks that are counted in the place of deeper ones."""


@dataclass(frozen=True)
class Training:
    """What one training costs: bytes by kind that are there whatever the batch, and those of one image more;
    `evaluations` in forwards of the network, for one image of a batch, mean over a round of its phases; `updates` of the network
    that is wanted, in a step.
    """

    fixed: dict[str, int]
    per_image: float
    evaluations: float
    updates: float
    halves: int


@dataclass(frozen=True)
class Counted:
    """What was counted of a recipe: `trainings` by name, the teacher's or an update, and by k, which is 0 for the teacher."""

    flops_per_forward: float
    parameters: int
    trainings: dict[str, dict[int, Training]]


def count(config: RunConfig, updates: Sequence[str] = UPDATES) -> Counted:
    from mmdistill_core.engine.cost import forward_flops

    def of_network(config: RunConfig) -> dict[Any, Any]:
        network = _denoiser(config)
        return {
            "forward": forward_flops(network, source_of(config.data).shape),
            "parameters": sum(p.numel() for p in network.parameters()),
        }

    with _fake():
        network = _of_its_depth(config, of_network)
        trainings = {"teacher": {0: _teacher(config)}} | {update: _students(config, update) for update in updates}
        return Counted(network["forward"], network["parameters"], trainings)


def pair_flops(config: RunConfig, k: int) -> tuple[float, float]:
    """Operations of a forward of one image, and of a joint pair of updates from a whole batch: what `bench` measures."""
    own = config.distill.for_k(k)
    counted = count(config.model_copy(update={"distill": own}), ["joint"])
    flops = counted.flops_per_forward
    return flops, flops * counted.trainings["joint"][k].evaluations * own.batch


@contextmanager
def _fake() -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with warnings.catch_warnings(), FakeTensorMode():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def _of_its_depth(config: RunConfig, counted: Callable[[RunConfig], dict[Any, Any]]) -> dict[Any, Any]:
    """What `counted` tells of a network as deep as the recipe's."""
    depth = config.network.depth
    if depth <= MORE:
        return counted(config)
    few, more = (
        counted(config.model_copy(update={"network": config.network.model_copy(update={"depth": blocks})}))
        for blocks in (FEW, MORE)
    )
    return {name: n + (more[name] - n) * (depth - FEW) for name, n in few.items()}


def _denoiser(config: RunConfig, dropout: float = 0.0) -> Any:
    from mmdistill_core.artifact import build_denoiser
    from mmdistill_core.networks.dit import DiTConfig

    source = source_of(config.data)
    data: dict[str, Any] = {
        "image_size": source.shape[1],
        "channels": source.shape[0],
        "num_classes": source.num_classes,
    }
    network = DiTConfig(**data | config.network.model_dump() | {"dropout": dropout or config.network.dropout})
    return build_denoiser(network=network, prediction=config.prediction, schedule=config.schedule.as_dict())


def _teacher(config: RunConfig) -> Training:
    from workflows.stages.teacher import denoising_arguments

    return _training(config, "denoising", denoising_arguments(config), "teacher_ema", rounds=1)


def _students(config: RunConfig, update: str) -> dict[int, Training]:
    """By k. What is the same for several is counted once."""
    from workflows.stages.distill import ARGUMENTS

    out: dict[int, Training] = {}
    known: dict[str, Training] = {}
    for k in config.distill.k:
        own = config.distill.for_k(k)
        arguments = {name: getattr(own, name) for name in ARGUMENTS} | {"update": update}
        if update == "instant":
            arguments |= {"auxiliary_updates": 1, "auxiliary_sees_t": False}
        turns, what = arguments["auxiliary_updates"], repr((own.method, arguments, own.dropout))
        if what not in known:
            rounds = lcm(turns, turns + 1)
            known[what] = _training(
                config, own.method, {"k": k} | arguments, "student", rounds=rounds, dropout=own.dropout
            )
        out[k] = known[what]
    return out


def _training(
    config: RunConfig, method: str, arguments: dict[str, Any], best: str, *, rounds: int, dropout: float = 0.0
) -> Training:
    """Of a state as a worker has it, and the phases of `rounds` steps."""
    from mmdistill_core.diffusion.schedules import schedule_from_dict
    from mmdistill_core.engine import OptimiserOptions, TrainState
    from mmdistill_core.engine.cost import bytes_of, forward_flops, phase_cost
    from mmdistill_core.methods import METHODS
    from mmdistill_core.networks.preconditioner import Preconditioner

    source, schedule = source_of(config.data), schedule_from_dict(config.schedule.as_dict())
    made = METHODS[method](schedule=schedule, **arguments)  # type: ignore[call-arg]
    phases = [phase for step in range(rounds) for phase in made.phases(step)]
    kinds = {phase.trains: phase for phase in phases}

    def of_state(config: RunConfig) -> dict[Any, Any]:
        # Each network is made anew: a fake one can't be copied.
        given = {role.name: _denoiser(config, dropout) for role in made.roles}
        if "preconditioner" in given:
            given["preconditioner"] = Preconditioner.identity(given["teacher"])
        state = TrainState.create(
            method=made, given=given, options=OptimiserOptions(), global_batch=1, total_images=1, best_role=best
        )
        costs = {
            trains: phase_cost(state, p, source.shape, label=source.num_classes > 0) for trains, p in kinds.items()
        }
        return {
            **{("size", name): bytes_of(network) for name, network in state.networks.items()},
            **{("flops", trains): cost.flops for trains, cost in costs.items()},
            **{("bytes", trains): cost.bytes for trains, cost in costs.items()},
            "forward": forward_flops(given["teacher"], source.shape),
        }

    counted = _of_its_depth(config, of_state)
    lives = {role.name: role.life for role in made.roles}
    size = {name[1]: n for name, n in counted.items() if name[0] == "size"}
    trained = sum(size[name] for name, life in lives.items() if life == "trained")
    fixed = {
        "weights": sum(size[n] for n, life in lives.items() if life != "ema" and n != "preconditioner"),
        "gradients": trained,
        "Adam's moments": 2 * trained,
        "averages": sum(size[n] for n, life in lives.items() if life == "ema"),
        "Lambda and nu": 2 * size.get("preconditioner", 0),
    }
    return Training(
        fixed,
        per_image=max(counted["bytes", p.trains] for p in phases),
        evaluations=sum(counted["flops", p.trains] for p in phases) / len(phases) / counted["forward"],
        updates=sum(best.removesuffix("_ema") in p.trains for p in phases) / rounds,
        halves=2 if any(p.statistic for p in phases) else 1,
    )
