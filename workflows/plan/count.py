"""Counts what trainings cost, by running their code on fake tensors (mmdistill_core/engine/cost.py).

Every count is linear in the depth of the network, since all blocks cost the same. So the counts of one and two blocks give that
of any depth: exactly, and faster than counting the paper's networks themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from workflows.config.assembly import method_of, network_of, rounds_of, schedule_of
from workflows.config.schema import Distill, RunConfig
from workflows.config.values import without
from workflows.dataset.sources import source_of
from workflows.errors import ConfigError

if TYPE_CHECKING:
    from mmdistill_core.methods.base import Method, Role, Round

FEW, MORE = 1, 2
"""The numbers of blocks that are counted in place of a deeper network."""


@dataclass(frozen=True)
class Training:
    """What one training costs.

    fixed        bytes by kind, whatever the batch
    per_image    further bytes for each image
    evaluations  forwards of the network for one image of a batch, mean over a cycle of the method's phases
    updates      updates of the method's learner per step
    halves       parts that the method cuts a batch into
    """

    fixed: dict[str, int]
    per_image: float
    evaluations: float
    updates: float
    halves: int


@dataclass(frozen=True)
class Counted:
    """The counts for a recipe. `trainings` maps "teacher", or a choice (`choices_of`), to the trainings by round."""

    flops_per_forward: float
    parameters: int
    trainings: dict[str, dict[str, Training]]


def choices_of(config: RunConfig) -> tuple[str, ...]:
    """The values of the option that the method wants compared, or the method's name if it has none."""
    from mmdistill_core.methods import method_class
    from mmdistill_core.options import options_of

    method = method_class(config.distill.method)
    if method.compared is None:
        return (config.distill.method,)
    (compared,) = (option for option in options_of(method) if option.name == method.compared)
    return get_args(compared.type)


def with_choice(config: RunConfig, choice: str) -> tuple[Distill, tuple[Round, ...]]:
    """The distill section and its rounds with this choice. An option that conflicts with it gets its default. Raises ConfigError if
    that does not help.
    """
    from mmdistill_core.methods import method_class

    own, schedule = config.distill, schedule_of(config)
    compared = method_class(own.method).compared
    if compared is None:
        return own, rounds_of(own, schedule)
    values, defaults = own.model_dump(), {name: type(own).model_fields[name].default for name in own.OPTIONS}
    for left_out in ((), *((name,) for name in own.OPTIONS), own.OPTIONS):
        changed = {name: defaults[name] for name in left_out} | {compared: choice}
        of_k = {k: without(fields, changed) for k, fields in own.overrides.items()}
        with suppress(ValueError):
            section = type(own).model_validate(values | changed | {"overrides": of_k})
            return section, rounds_of(section, schedule)
    raise ConfigError(f"--only: {choice} does not go with the recipe's other options")


def count(config: RunConfig, choices: Sequence[str] | None = None) -> Counted:
    """Counts a recipe's teacher, and its students with each of `choices`, by default all. Raises ConfigError."""
    with _fake():
        network = _of_its_depth(config, _network)
        trainings = {"teacher": {"teacher": _training(config, method_of(config.teacher, schedule_of(config)))}}
        for choice in choices or choices_of(config):
            trainings[choice] = _rounds(config, *with_choice(config, choice))
        return Counted(network["forward"], network["parameters"], trainings)


def round_flops(config: RunConfig, k: int) -> tuple[float, float]:
    """FLOPs of a forward of one image, and of an update from a whole batch, mean over a cycle: what `bench` measures."""
    own = config.distill.for_k(k)
    with _fake():
        network = _of_its_depth(config, _network)
        (training,) = _rounds(config, own, rounds_of(own, schedule_of(config))).values()
    return network["forward"], network["forward"] * training.evaluations * own.batch


def _network(config: RunConfig) -> dict[str, float]:
    """The FLOPs of a forward of one image, and the number of parameters."""
    from mmdistill_core.engine.cost import forward_flops

    network = _denoiser(config)
    return {
        "forward": forward_flops(network, source_of(config.data).shape),
        "parameters": sum(p.numel() for p in network.parameters()),
    }


@contextmanager
def _fake() -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with warnings.catch_warnings(), FakeTensorMode():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def _of_its_depth(config: RunConfig, counted: Callable[[RunConfig], Mapping[Any, Any]]) -> Mapping[Any, Any]:
    """The result of `counted` for a network with as many blocks as the recipe's, extrapolated from FEW and MORE blocks."""
    from mmdistill_core.networks.config import network_class

    repeated = network_class(config.network.kind).repeated
    depth = getattr(config.network, repeated) if repeated else 0
    if repeated is None or depth <= MORE:
        return counted(config)
    few, more = (
        counted(config.model_copy(update={"network": config.network.model_copy(update={repeated: blocks})}))
        for blocks in (FEW, MORE)
    )
    return {name: n + (more[name] - n) * (depth - FEW) for name, n in few.items()}


def _denoiser(config: RunConfig, dropout: float | None = None) -> Any:
    """The recipe's network as a denoiser. `dropout` replaces the probability of every dropout layer."""
    import torch

    source = source_of(config.data)
    network = network_of(config.network, shape=source.shape, num_classes=source.num_classes)
    denoiser = network.denoiser(schedule=schedule_of(config), prediction=config.prediction)
    for module in denoiser.modules():
        if dropout is not None and isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return denoiser


def _rounds(config: RunConfig, distill: Distill, rounds: Sequence[Round]) -> dict[str, Training]:
    """The trainings by round. Equal ones are counted once."""
    out: dict[str, Training] = {}
    known: dict[str, Training] = {}
    for one in rounds:
        own = distill.for_round(one)
        what = repr((replace(one.method, k=1), own.dropout))
        if what not in known:
            known[what] = _training(config, one.method, dropout=own.dropout)
        out[one.name] = known[what]
    return out


def _training(config: RunConfig, made: Method, *, dropout: float | None = None) -> Training:
    """The cost of a training, from its state on one worker and the phases of one cycle of steps."""
    from mmdistill_core.engine import OptimiserOptions, TrainState
    from mmdistill_core.engine.cost import bytes_of, forward_flops, phase_cost, statistic_bytes
    from mmdistill_core.methods.base import Average, Copy, Prepared, Progress

    source = source_of(config.data)
    phases = [phase for step in range(made.cycle) for phase in made.phases(Progress(step, 0, 10**9))]
    kinds = {phase.trains: phase for phase in phases}
    labelled = source.num_classes > 0

    def of_state(config: RunConfig) -> dict[Any, Any]:
        # Every network is built, because a fake one can't be copied.
        fresh = {r.name: _denoiser(config, dropout) for r in made.roles if not isinstance(r.origin, Prepared)}
        others = {r.name for r in made.roles if isinstance(r.origin, (Copy, Average))}
        state = TrainState.create(
            method=made,
            given={name: network for name, network in fresh.items() if name not in others},
            starts={name: network for name, network in fresh.items() if name in others},
            prepare=lambda networks: made.prepare(Counting(networks)),
            options=OptimiserOptions(),
            global_batch=1,
            total_images=1,
        )
        costs = {trains: phase_cost(state, p, source.shape, label=labelled) for trains, p in kinds.items()}
        return {
            **{("size", name): bytes_of(network) for name, network in state.networks.items()},
            **{("flops", trains): cost.flops for trains, cost in costs.items()},
            **{("bytes", trains): cost.bytes for trains, cost in costs.items()},
            "statistic": max(statistic_bytes(state, p, source.shape, label=labelled) for p in kinds.values()),
            "forward": forward_flops(fresh[made.roles[0].name], source.shape),
        }

    counted = _of_its_depth(config, of_state)
    size = {name[1]: n for name, n in counted.items() if name[0] == "size"}

    def bytes_where(wanted: Callable[[Role], bool]) -> int:
        return sum(size[role.name] for role in made.roles if wanted(role))

    trained = bytes_where(lambda role: role.trained)
    fixed = {
        "weights": bytes_where(lambda role: not isinstance(role.origin, (Average, Prepared))),
        "gradients": trained,
        "Adam's moments": 2 * trained,
        "averages": bytes_where(lambda role: isinstance(role.origin, Average)),
        "prepared, and statistics": bytes_where(lambda role: isinstance(role.origin, Prepared)) + counted["statistic"],
    }
    return Training(
        fixed,
        per_image=max(counted["bytes", p.trains] for p in phases),
        evaluations=sum(counted["flops", p.trains] for p in phases) / len(phases) / counted["forward"],
        updates=sum(made.learner in p.trains for p in phases) / made.cycle,
        halves=made.halves,
    )


@dataclass(frozen=True)
class Counting:
    """A `methods.base.Preparation` for counting: ones of each parameter's shape replace what would be read or collected."""

    networks: Any

    def extra(self, role: str, name: str) -> dict[str, Any]:
        return self.squared_gradients(self.networks[role], None, steps=0)

    def training_of(self, role: str) -> Any:
        return None

    def squared_gradients(self, network: Any, method: Any, *, steps: int) -> dict[str, Any]:
        import torch

        return {name: torch.ones_like(p) for name, p in network.named_parameters()}
