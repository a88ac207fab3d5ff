"""The contract of a method. The method declares; the engine and the workflow obey.

- its fields are its options, with defaults, choices and bounds (`option`): the `distill:` section of a recipe
- roles    the networks, where each comes from, and which of them are trained
- phases   which roles learn from which loss, and when
- rounds   the trainings in order, each with its numbers of steps k, its teacher and its start
- sampler  how a student of k steps is sampled
- needs, prepare, validate, curves, extras: its inputs and outputs

docs/methods.md shows all of it on one method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, overload

import torch
from torch import Tensor, nn

from mmdistill_core.diffusion.schedules import Schedule
from mmdistill_core.options import check_options
from mmdistill_core.rng import Rng

Networks = Mapping[str, nn.Module]


# What a training sees


class Batch:
    """Named tensors of one length: `x` [b, ...] clean data, `label` [b] integers, and whatever else a method needs.

    A batch without tensors has only a length: `Batch(length=b)`, for methods that need no data.
    """

    def __init__(
        self, x: Tensor | None = None, label: Tensor | None = None, *, length: int = 0, **columns: Tensor
    ) -> None:
        named = {"x": x, "label": label, **columns}
        self.columns: dict[str, Tensor] = {name: value for name, value in named.items() if value is not None}
        lengths = {name: len(value) for name, value in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"batch: its columns differ in length: {lengths}")
        self._length = next(iter(lengths.values()), length)

    def __len__(self) -> int:
        return self._length

    @property
    def x(self) -> Tensor:
        return self["x"]

    @property
    def label(self) -> Tensor | None:
        return self.columns.get("label")

    @overload
    def __getitem__(self, part: str) -> Tensor: ...

    @overload
    def __getitem__(self, part: slice) -> Batch: ...

    def __getitem__(self, part: str | slice) -> Tensor | Batch:
        """A column by its name, or some of the rows."""
        if isinstance(part, str):
            if part not in self.columns:
                raise KeyError(f"batch: no column {part!r}; it has {', '.join(self.columns) or 'none'}")
            return self.columns[part]
        rows = {name: value[part].contiguous() for name, value in self.columns.items()}
        return Batch(length=len(range(*part.indices(self._length))), **rows)


@dataclass(frozen=True)
class Progress:
    """The position of a training: engine steps done, images seen, and the images of the whole training."""

    step: int
    n_images: int
    total: int

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.n_images / self.total


# Which networks there are


@dataclass(frozen=True)
class Given:
    """An existing network: the round's "teacher", the data's "extractor", or a model that the recipe names (`distill.given`)."""

    name: str


@dataclass(frozen=True)
class Copy:
    """Starts as a copy of another role's network."""

    role: str


@dataclass(frozen=True)
class New:
    """A new network: its name in NETWORKS, and fields of its configuration. Image size, channels and classes come from the data.
    Without a name, it is the network of the recipe's section `network`.
    """

    network: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Average:
    """The exponential moving average of another role. `decay` gives the factor of a step. By default the factor follows from the
    recipe's half-life in images.
    """

    role: str
    decay: Callable[[Progress], float] | None = None


@dataclass(frozen=True)
class Prepared:
    """A network that `Method.prepare` makes before training."""


@dataclass(frozen=True)
class Role:
    """A network of a training.

    trained     by a phase's loss. During other phases its parameters have no gradients
    conditions  its inputs beyond t and label (Denoiser.conditioned_on)
    whole       a loss differentiates with respect to its parameters, so workers neither wrap nor shard it
    optimiser   fields of OptimiserOptions that differ from the recipe's
    lr_ratio    its learning rate over the recipe's. A rate that the recipe states for the role is taken as it is
    """

    name: str
    origin: Given | Copy | New | Average | Prepared
    trained: bool = False
    conditions: tuple[str, ...] = ()
    whole: bool = False
    optimiser: Mapping[str, Any] = field(default_factory=dict)
    lr_ratio: float = 1.0


# Who learns, when


@dataclass(frozen=True)
class Losses:
    """The result of a phase's loss.

    per_sample  role -> [b]: the loss of each trained role. Its gradient reaches only that role's weights, so that the engine
                may sum the losses for one backward pass
    logs        name -> [b] or scalar: means are logged
    by_level    name -> [b]: logged per noise level, with `logsnr` [b] of the same samples
    logsnr      [b], of by_level
    forwards    network evaluations for one sample; in a phase with a statistic, for one sample of each half
    """

    per_sample: dict[str, Tensor]
    logs: dict[str, Tensor] = field(default_factory=dict)
    by_level: dict[str, Tensor] = field(default_factory=dict)
    logsnr: Tensor | None = None
    forwards: float = 0

    @classmethod
    def join(cls, parts: Sequence[Losses]) -> Losses:
        """The losses of a batch from those of its parts, detached."""
        if len(parts) == 1:
            (only,) = parts
            return replace(only, per_sample={name: v.detach() for name, v in only.per_sample.items()})

        def joined(of: Callable[[Losses], dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([of(p)[name].detach().reshape(-1) for p in parts]) for name in of(parts[0])}

        levels = [p.logsnr for p in parts if p.logsnr is not None]
        return cls(
            joined(lambda p: p.per_sample),
            joined(lambda p: p.logs),
            joined(lambda p: p.by_level),
            torch.cat(levels) if levels else None,
            parts[0].forwards,
        )


Statistic = dict[str, Tensor]
PhaseLoss = Callable[..., Losses]
"""(nets, batch, rng, progress) -> Losses; in a phase with a statistic (nets, batch, rng, progress, statistic) -> Losses."""


@dataclass(frozen=True)
class Phase:
    """One update: the roles that it trains (nearly always one), and their loss.

    statistic  (nets, batch, rng, progress) -> named means, for a loss with a product of two expectations. They are taken over half
               of the global batch, every other image. `loss` gets them with the other half
    """

    trains: tuple[str, ...]
    loss: PhaseLoss
    statistic: Callable[[Networks, Batch, Rng, Progress], Statistic] | None = None


# How the result is sampled


@dataclass(frozen=True)
class Sampler:
    """How a model is sampled in k steps. It is stored with the weights, in model.json.

    name        in samplers.SAMPLERS
    options     of the sampler function
    times       k + 1 times that fall from 1 to 0; None: the uniform grid
    conditions  name -> k values: the network's condition at each step
    ranges      name -> (low, high): a condition that the user chooses for all steps, by default low
    """

    name: str = "ancestral"
    options: Mapping[str, float] = field(default_factory=dict)
    times: tuple[float, ...] | None = None
    conditions: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


# What is trained after what


@dataclass(frozen=True)
class Round:
    """One training of a distillation.

    name     unique among the rounds. Its stage is called distill-NAME
    ks       the numbers of steps for which its student is measured and registered; none: it only serves another round
    method   with the options of this round
    teacher  the round whose student is the teacher; None: the run's teacher
    starts   role -> the round whose student replaces its origin
    like     the k whose settings (images, batch, optimisers) it uses. By default its own k, if it has just one
    """

    name: str
    ks: tuple[int, ...]
    method: Method
    teacher: str | None = None
    starts: Mapping[str, str] = field(default_factory=dict)
    like: int | None = None

    @property
    def settings_of(self) -> int | None:
        """The k whose settings it uses; None: the settings common to all."""
        return self.ks[0] if self.like is None and len(self.ks) == 1 else self.like


# What the workflow lends and takes


@dataclass(frozen=True)
class About:
    """The facts about a round's teacher before it is loaded: its number of classes, 0 if it is unconditional; whether it can be
    guided; the names of the tensors beside its weights (`Method.extras`).
    """

    num_classes: int
    guidable: bool
    extras: frozenset[str]


class Preparation(Protocol):
    """What `Method.prepare` may use."""

    @property
    def networks(self) -> Networks:
        """The given, copied and new networks, by role."""
        ...

    def extra(self, role: str, name: str) -> dict[str, Tensor]:
        """Tensors beside a given model's weights."""
        ...

    def training_of(self, role: str) -> Method:
        """The method by which a given model was trained."""
        ...

    def squared_gradients(self, network: nn.Module, method: Method, *, steps: int) -> dict[str, Tensor]:
        """Mean over `steps` batches of the squared gradient of the method's first phase, by parameter, at learning rate 0. It is
        computed once: a checkpoint holds it.
        """
        ...


class Finished(Protocol):
    """A training at its end, for `Method.extras`."""

    @property
    def networks(self) -> Networks: ...

    def second_moments(self, role: str) -> dict[str, Tensor]:
        """The second moments of the role's optimiser, by parameter, bias-corrected as in Adam."""
        ...


@dataclass(frozen=True)
class Curve:
    """A metric of the training that the report draws, for every round that logged it.

    metric       a name in Losses.logs, and with `by_level` also in Losses.by_level
    label        of the vertical axis
    explanation  sentences for the caption: first what the curve shows, in plain words, then the formula in symbols
    signed       the metric may be negative, so its axis is linear around 0
    """

    metric: str
    label: str
    explanation: str
    by_level: bool = True
    signed: bool = False


# The method itself


@dataclass(frozen=True)
class Method(ABC):
    """Options, roles, phases. Optimisers, devices, ranks and logging belong to the engine.

    k         steps of the student in this round
    name      in METHODS
    needs     columns of the batch. Labels are added if the data have them
    learners  the roles that it may train, whatever its options
    extra_names  names of the results of `extras`
    compared  the option whose choices `mmdistill plan` compares
    small     options of a training that takes seconds, for `--smoke`
    """

    schedule: Schedule
    k: int = 1
    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("x",)
    learners: ClassVar[tuple[str, ...]]
    extra_names: ClassVar[tuple[str, ...]] = ()
    compared: ClassVar[str | None] = None
    small: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        check_options(self)

    @property
    @abstractmethod
    def roles(self) -> tuple[Role, ...]: ...

    @abstractmethod
    def phases(self, progress: Progress) -> tuple[Phase, ...]:
        """The updates of this engine step, each on its own batch. Alternation and curricula are defined here."""

    @property
    @abstractmethod
    def result(self) -> str:
        """The role whose weights become the model."""

    @property
    def cycle(self) -> int:
        """Engine steps after which the phases repeat."""
        return 1

    @property
    def halves(self) -> int:
        """2 if every batch is divided into halves, one for a statistic and one for the loss; else 1."""
        phases = [phase for step in range(self.cycle) for phase in self.phases(Progress(step, 0, self.cycle))]
        return 2 if any(phase.statistic for phase in phases) else 1

    @property
    def guidable(self) -> bool:
        """Whether the result learns the null label, and can therefore be guided in sampling."""
        return False

    @property
    def learner(self) -> str:
        """The trained role behind the result: the result itself, or the role that it averages."""
        origins = {role.name: role.origin for role in self.roles}
        origin = origins[self.result]
        return origin.role if isinstance(origin, Average) else self.result

    def rounds(self, methods: Mapping[int, Method], *, warm: Container[int] = ()) -> tuple[Round, ...]:
        """The trainings, in order, that make the students. `methods` holds the method with the recipe's options for each number of
        steps k. `warm`: the ks whose student starts from that of 2k steps, if there is one.

        By default one training for each k, from the run's teacher. Raises ValueError for methods that don't fit together.
        """
        rounds = []
        for k, method in sorted(methods.items(), reverse=True):
            starts = {}
            if k in warm and 2 * k in methods:
                starts[method.learner] = f"k{2 * k}"
                own, other = ({r.name: r.conditions for r in m.roles}[m.learner] for m in (method, methods[2 * k]))
                if own != other:
                    raise ValueError(
                        f"warm_start: the student of {k} steps is conditioned on {', '.join(own) or 'nothing'}, that of {2 * k} on "
                        f"{', '.join(other) or 'nothing'}, so it can't be its start"
                    )
            rounds.append(Round(f"k{k}", (k,), replace(method, k=k), starts=starts))
        return tuple(rounds)

    def sampler(self, k: int) -> Sampler:
        return Sampler()

    def validate(self, ks: Sequence[int]) -> tuple[int, ...]:
        """The numbers of steps at which validations sample. They choose the weights to keep by distance; none: the last ones."""
        return tuple(ks)

    def prepare(self, context: Preparation) -> dict[str, nn.Module]:
        """Makes the networks of the roles whose origin is Prepared."""
        return {}

    def extras(self, finished: Finished) -> dict[str, dict[str, Tensor]]:
        """Tensors to save beside the result's weights, by name. A later `prepare` can load them."""
        return {}

    @property
    def curves(self) -> tuple[Curve, ...]:
        return ()

    def check_teacher(self, teacher: About) -> None:  # noqa: B027  most methods take any teacher
        """Raises ValueError for a teacher that this method can't learn from."""
