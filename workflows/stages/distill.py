"""distill: runs the rounds (trainings) of the recipe's method, for a student of each k. Independent rounds may run in parallel."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflows.config.assembly import rounds_of
from workflows.config.schema import Distill, RunConfig
from workflows.errors import UserError
from workflows.session.context import Context, Done
from workflows.session.stage import StageRun, open_stage
from workflows.stages.teacher import (
    FITTED,
    about_model,
    common_fields,
    data_provenance,
    optimiser_options,
    run_trainings,
    training_code,
    training_result,
    window_of,
)
from workflows.storage.integrity import model_identity
from workflows.storage.local import read_json
from workflows.storage.store import fetch
from workflows.training.job import Job

if TYPE_CHECKING:
    from mmdistill_core.diffusion.schedules import Schedule
    from mmdistill_core.methods.base import Method, Round
    from mmdistill_core.networks.config import NetworkConfig

CODE = ("workflows/dataset/reference.py", "workflows/stages/teacher.py", "workflows/stages/distill.py")
VALIDATION = ("mmdistill_core.metrics.frechet", "mmdistill_core.samplers.labels")


@dataclass(frozen=True)
class Teacher:
    """The teacher of a round. `folder` is its model folder on this machine, `uri` its URI for workers, `model` the content of its
    model.json.
    """

    folder: Path
    uri: str
    identity: str
    model: dict[str, Any]

    @classmethod
    def of(cls, done: Done) -> Teacher:
        return cls(done.folder / "model", done.at("model"), done.identity, done.model_description)

    @property
    def networks(self) -> list[NetworkConfig]:
        """The teacher's network, and the fitted network beside an exact teacher."""
        from mmdistill_core.networks.config import network_config

        fitted = read_json(self.folder.parent / FITTED / "model.json")
        return [network_config(model["network"]) for model in (self.model, fitted) if model]

    @property
    def schedule(self) -> Schedule:
        """The schedule of the teacher and of its students."""
        from mmdistill_core.diffusion.schedules import schedule_from_dict

        return schedule_from_dict(self.model["schedule"])


@dataclass(frozen=True)
class Distilled:
    """The finished rounds by name, those with few steps first, and the student of each k."""

    rounds: dict[str, Done]
    students: dict[int, Done]


def distill(context: Context, prepared: Done, trained: Done) -> Distilled:
    """Trains each round as a stage of its own, distill-NAME, which is finished and tracked as soon as it is trained. A round waits
    for the rounds that give its teacher or its start.
    """
    rounds = rounds_of(context.config.distill, Teacher.of(trained).schedule)
    done: dict[str, Done] = {}
    waiting = list(rounds)
    while waiting:
        ready = [r for r in waiting if {*r.starts.values(), *filter(None, [r.teacher])} <= done.keys()]
        assert ready, [r.name for r in waiting]
        waiting = [r for r in waiting if r not in ready]
        _train_together(context, prepared, trained, ready, done)
    students = {k: done[r.name] for r in rounds for k in r.ks}
    in_order = sorted(rounds, key=lambda r: (r.ks or (r.settings_of or 0,), len(r.ks)))
    return Distilled({r.name: done[r.name] for r in in_order}, dict(sorted(students.items())))


def _train_together(
    context: Context, prepared: Done, trained: Done, rounds: list[Round], done: dict[str, Done]
) -> None:
    """Trains those of the rounds that are not finished yet. Adds all of them to `done`."""
    config, trainings = context.config, list[tuple[Job, StageRun]]()
    sections = {r.name: config.distill.for_round(r) for r in rounds}
    # Longest first, so that no long one starts last.
    for round_ in sorted(rounds, key=lambda r: -sections[r.name].images):
        section, teacher = sections[round_.name], Teacher.of(done[round_.teacher] if round_.teacher else trained)
        start_from = {role: done[name] for role, name in round_.starts.items()}
        opened = open_stage(
            context,
            f"distill-{round_.name}",
            depends={"seed": config.seed} | round_depends(config, section, round_, prepared, teacher, start_from),
            params={"k": ", ".join(map(str, round_.ks)), "distill": section.model_dump(exclude={"k", "overrides"})},
        )
        if isinstance(opened, Done):
            done[round_.name] = opened
            continue
        job = job_of(
            config,
            section,
            round_,
            prepared=prepared,
            teacher=teacher,
            seed=seed_of(config, round_),
            name=f"distill-{round_.name}-{opened.folder.key}",
            output=opened.folder.at("model"),
            storage=context.workspace.training_storage,
            starts=fitted_starts(round_.method, trained) | {role: s.at("model") for role, s in start_from.items()},
        )
        trainings.append((job, opened))
    if not trainings:
        return

    def finish(run: StageRun) -> None:
        run.folder.collect("model")
        done[run.folder.name.removeprefix("distill-")] = run.finish(training_result(run, _summary(run)))

    at_once, workers = context.placement.at_once, context.placement.student_workers
    try:
        run_trainings(context, trainings, at_once=at_once, workers=workers, finish=finish)
    except BaseException as error:
        for _, run in trainings:
            if run.folder.result is None:
                run.abandon(error)
        raise


def round_depends(
    config: RunConfig, section: Distill, round_: Round, prepared: Done, teacher: Teacher, start_from: Mapping[str, Done]
) -> dict[str, Any]:
    """What the result of a round depends on, apart from its seed. `start_from`: role -> the student that it starts from."""
    return {
        "prepare": prepared.identity,
        "window": window_of(config, prepared.result),
        "extractor": prepared.result["choosing"]["weights"],
        "teacher": teacher.identity,
        "starts": {role: start.identity for role, start in start_from.items()},
        "given": {name: model_identity(fetch(place)) for name, place in section.given.items()},
        "round": [round_.name, list(round_.ks)],
        "distill": section.model_dump(exclude={"k", "overrides", "warm_start", "given"}),
        "precision": config.compute.precision,
        "code": training_code(
            section.method,
            *CODE,
            networks=teacher.networks,
            modules=(*VALIDATION, *_named_modules(round_, prepared.result["choosing"]["kind"])),
        ),
    }


def _named_modules(round_: Round, chooses: str) -> list[str]:
    """The modules that a training finds by name: of its new networks, of its samplers and of the extractor that chooses."""
    from mmdistill_core.artifact import extractor_class
    from mmdistill_core.methods.base import New
    from mmdistill_core.networks.config import network_class
    from mmdistill_core.samplers.samplers import sampler_function

    origins = [role.origin for role in round_.method.roles]
    found = {network_class(o.network).__module__ for o in origins if isinstance(o, New) and o.network}
    found |= {sampler_function(round_.method.sampler(k).name).__module__ for k in round_.ks or (round_.method.k,)}
    return sorted(found | {extractor_class(chooses).__module__})


def _summary(run: StageRun) -> str:
    provenance = json.loads((run.path / "model" / "model.json").read_text())["provenance"]
    if "best_score" not in provenance:
        return f"{provenance['images']:,} images"
    return f"{provenance['images']:,} images, best distance {provenance['best_score']:.3g} at {provenance['best_images']:,}"


def seed_of(config: RunConfig, round_: Round) -> int:
    """The recipe's seed, plus k for a round with one k, or plus a hash of the name for any other round."""
    return config.seed + (round_.ks[0] if len(round_.ks) == 1 else zlib.crc32(round_.name.encode()) % 10**6)


def job_of(
    config: RunConfig,
    section: Distill,
    round_: Round,
    *,
    prepared: Done,
    teacher: Teacher,
    seed: int,
    name: str,
    output: str,
    storage: str,
    starts: dict[str, str],
) -> Job:
    """The training of a round. `section` is the distill section as it holds for this round. `starts` gives the model folder of each
    role that starts from another model.

    Raises UserError for a teacher that the method can't learn from.
    """
    method = round_.method
    try:
        method.check_teacher(about_model(teacher.folder))
    except ValueError as error:
        raise UserError(f"distill.{error}") from None
    validate = None
    if section.validate_every and method.validate(round_.ks):
        validate = {
            "extractor": prepared.at("choosing/extractor"),
            "reference": prepared.at(f"choosing/statistics/{config.data.trained}"),
            "samples": section.validate_samples,
            "every": section.validate_every,
        }
    return Job(
        name=name,
        output=output,
        storage=storage,
        seed=seed,
        arguments=arguments_of(method),
        given=given_of(section, method, teacher=teacher.uri, extractor=prepared.at("choosing/extractor")),
        starts=starts,
        network=teacher.model["network"],
        schedule=teacher.model["schedule"],
        prediction=teacher.model["prediction"],
        options=optimiser_options(section, method),
        dropout=section.dropout,
        ks=round_.ks or (method.k,),
        validate=validate,
        provenance={
            "role": "student",
            "recipe": config.recipe,
            "method": section.method,
            "k": round_.ks[0] if len(round_.ks) == 1 else list(round_.ks),
            "teacher": teacher.identity,
            **data_provenance(prepared.result),
        },
        **common_fields(config, section, prepared),
    )


def arguments_of(method: Method) -> dict[str, Any]:
    """The fields of a method, except its schedule."""
    return {f.name: getattr(method, f.name) for f in fields(method) if f.name != "schedule"}


def given_of(section: Distill, method: Method, **known: str) -> dict[str, str]:
    """name -> folder or URI of each model that the method's roles are given, from `known` or from the recipe.

    Raises UserError for a model that is neither.
    """
    from mmdistill_core.methods.base import Given

    places = known | section.given
    names = [role.origin.name for role in method.roles if isinstance(role.origin, Given)]
    for name in names:
        if name not in places:
            raise UserError(
                f"distill.given: {section.method} asks for a model {name!r}; name its folder or URI in distill.given.{name}"
            )
    return {name: places[name] for name in names}


def fitted_starts(method: Method, trained: Done) -> dict[str, str]:
    """The model folder of each trained role that would start as a copy of an exact teacher. Such a teacher has no weights, so the
    role starts from the fitted network beside it. {} for any other teacher.
    """
    from mmdistill_core.methods.base import Copy, Given

    if not (trained.folder / FITTED).is_dir():
        return {}
    origins = {role.name: role.origin for role in method.roles}
    return {
        role.name: trained.at(FITTED)
        for role in method.roles
        if role.trained and isinstance(role.origin, Copy) and origins[role.origin.role] == Given("teacher")
    }
