"""Builds the configuration class of a run: the sections of schema.py plus the options of the chosen methods and network.

A method declares each option once, in its dataclass: type, default, bounds. Here the options become fields of the method's section,
so they are validated and shown like any other field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field, ValidationError, ValidationInfo, create_model, model_validator

from workflows.config.messages import one_line
from workflows.config.schema import ONLY_SHOWN, Distill, Network, RunConfig, Teacher, Training
from workflows.config.section import Section
from workflows.config.values import merge
from workflows.dataset.extractors import wanted_in
from workflows.dataset.sources import Source, source_of
from workflows.errors import ConfigError

if TYPE_CHECKING:
    from mmdistill_core.diffusion.schedules import Schedule
    from mmdistill_core.methods.base import About, Method, Round
    from mmdistill_core.networks.config import NetworkConfig

S = TypeVar("S", bound=Section)
ANY_SIZE = 110_880
"""Stands for an unknown image size. It is a multiple of all usual ones."""
DECLARED: dict[str, tuple[str, type[Section]]] = {
    "teacher": ("method", Teacher),
    "distill": ("method", Distill),
    "network": ("kind", Network),
}
"""The sections with options of a method or a network: the field that names it, and the section without these options."""


@contextmanager
def _errors_in(field: str, model: type[Section] = Section) -> Iterator[None]:
    """Puts the field before the message of a ValueError in the block. `model`: the section that was validated."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}{one_line(error, model)}") from None


# The classes


def _with_options(section: type[S], declared: type) -> type[S]:
    """A subclass of `section` with the options of the dataclass `declared` as further fields."""
    from mmdistill_core.options import options_of

    options = options_of(declared)
    if twice := sorted(set(section.model_fields) & {option.name for option in options}):
        raise TypeError(f"{declared.__name__}: the section has fields of the name {', '.join(twice)} already")
    field: Any = Field  # the bounds are passed by name, which mypy can't check
    fields: Any = {o.name: (o.type, field(o.default, description=o.doc, **o.bounds)) for o in options}
    made = create_model(section.__name__, __base__=section, __module__=section.__module__, **fields)
    made.OPTIONS = tuple(option.name for option in options)
    return made


@cache
def config_class(teacher: str, distill: str, network: str) -> type[RunConfig]:
    """The configuration class for these methods and this network. Raises ValueError for an unknown name."""
    from mmdistill_core.methods import method_class
    from mmdistill_core.networks.config import network_class

    fields: Any = {}
    for (section, (field, base)), name in zip(DECLARED.items(), (teacher, distill, network), strict=True):
        with _errors_in(f"{section}.{field}: "):
            made = _with_options(base, network_class(name) if section == "network" else method_class(name))
        fields[section] = (made, Field(default_factory=made))
    return create_model("RunConfig", __base__=_Consistent, __module__=__name__, **fields)


def class_for(values: Mapping[str, Any]) -> type[RunConfig]:
    """The configuration class for the methods and the network named in `values`. Raises ValueError for an unknown name."""

    names = []
    for section, (field, base) in DECLARED.items():
        given = values.get(section)
        name = given.get(field) if isinstance(given, Mapping) else None
        # The section's validation reports a bad value.
        names.append(name if isinstance(name, str) and name else str(base.model_fields[field].default))
    return config_class(*names)


@cache
def _defaults(made: type[RunConfig]) -> dict[str, Any]:
    return made.model_construct(recipe="").model_dump(exclude={"recipe"})


def config_of(values: Mapping[str, Any], context: dict[str, Any] | None = None) -> RunConfig:
    """The validated configuration: `values` merged over the defaults, field by field.

    Raises ConfigError with a one-line message.
    """
    if isinstance(teacher := values.get("teacher"), str):
        values = {**values, "teacher": {"model": teacher}}
    model: type[RunConfig] = RunConfig
    try:
        model = class_for(values)
        return model.model_validate(merge(_defaults(model), dict(values)), context=context)
    except ValidationError as error:
        raise ConfigError(one_line(error, model)) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


# What is built from the sections


def method_of(section: Training, schedule: Schedule) -> Method:
    """The section's method, with its options. Raises ValueError for options that conflict."""
    from mmdistill_core.methods import method_class

    return method_class(section.method)(schedule=schedule, **options_in(section))


def options_in(section: Section) -> dict[str, Any]:
    """The options that a method or a network added to the section, by name."""
    return {name: getattr(section, name) for name in section.OPTIONS}


def network_of(section: Network, *, shape: tuple[int, ...], num_classes: int) -> NetworkConfig:
    """The network's configuration for images of `shape` [c, h, w]. Raises ValueError if the network does not fit them."""
    from mmdistill_core.networks.config import network_class

    channels, image_size, _ = shape
    data = {"image_size": image_size, "channels": channels, "num_classes": num_classes}
    return network_class(section.kind)(**data, **options_in(section))


def rounds_of(distill: Distill, schedule: Schedule) -> tuple[Round, ...]:
    """The section's training rounds, each with its method. Raises ValueError for options that conflict."""
    sections = {k: distill.for_k(k) for k in distill.k}
    methods = {k: method_of(section, schedule) for k, section in sections.items()}
    warm = {k for k, section in sections.items() if section.warm_start}
    return method_of(distill, schedule).rounds(methods, warm=warm)


def about_teacher(config: RunConfig, num_classes: int) -> About:
    """The facts about the teacher before it is trained."""
    from mmdistill_core.methods.base import About

    method = method_of(config.teacher, schedule_of(config))
    if config.teacher.kind == "exact":
        return About(num_classes, guidable=True, extras=frozenset())
    return About(num_classes, guidable=method.guidable, extras=frozenset(method.extra_names))


def schedule_of(config: RunConfig) -> Schedule:
    from mmdistill_core.diffusion.schedules import schedule_from_dict

    return schedule_from_dict(config.schedule.as_dict())


# Consistency of the sections


class _Consistent(RunConfig):
    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> _Consistent:
        self._check_overrides()
        # Don't open a data set, which may be remote, only to show the configuration.
        source = None if info.context == ONLY_SHOWN and self.data.source == "dataset" else source_of(self.data)
        exact = self.teacher.kind == "exact"
        if exact and (source is None or source.exact is None):
            raise ValueError(f"teacher.kind: exact is not known for {self.data.source}; it is for gmm")
        self._check_methods(source)
        if self.prediction == "eps" and self.schedule.name != "karras":
            raise ValueError(
                "prediction: eps says nothing of the image at t = 1, where sampling starts and no signal is left; take v, x or flow"
            )
        if source is not None:
            with _errors_in("data."):
                wanted_in(self.data, shape=source.shape, num_classes=source.num_classes)
        shape = (3, ANY_SIZE, ANY_SIZE) if source is None else source.shape
        network_of(self.network, shape=shape, num_classes=source.num_classes if source else 0)
        return self

    def _check_overrides(self) -> None:
        for name, section in (("distill", self.distill), ("gate", self.gate)):
            for k in section.overrides:
                with _errors_in(f"{name}.overrides.{k}.", type(section)):
                    section.for_k(k)

    def _check_methods(self, source: Source | None) -> None:
        from mmdistill_core.samplers.samplers import sampler_function

        schedule = schedule_of(self)
        with _errors_in("teacher."):
            method_of(self.teacher, schedule)
        for name in self.evaluate.samplers:
            with _errors_in("evaluate.samplers: "):
                sampler_function(name)
        with _errors_in("distill."):
            rounds = rounds_of(self.distill, schedule)
        for one in rounds:
            self._check_round(one)
        if self.teacher.model is not None or source is None:
            return  # checked once the teacher is loaded
        about = about_teacher(self, source.num_classes)
        for one in rounds:
            with _errors_in("distill."):
                one.method.check_teacher(about)
        if self.evaluate.guidance and not (about.num_classes and about.guidable):
            raise ValueError(
                "evaluate.guidance: the teacher can't be guided: it needs labels, and to learn the null label in its training"
            )

    def _check_round(self, one: Round) -> None:
        distill, method = self.distill.for_round(one), one.method
        if distill.batch % method.halves:
            raise ValueError(
                f"distill.batch: {distill.batch} is odd, and {distill.method} cuts every batch into halves"
            )
        for role in distill.optimisers:
            if role not in method.learners:
                known = ", ".join(method.learners)
                raise ValueError(
                    f"distill.optimisers: {role!r} is none of the networks that {distill.method} trains: {known}"
                )
            with _errors_in(f"distill.optimisers.{role}.", type(distill.optimiser)):
                distill.optimiser_of(role)
