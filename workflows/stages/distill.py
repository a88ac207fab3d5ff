"""distill: the rounds of the recipe's method, which end in a student for each k; several at once where they fit."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflows.config.assembly import rounds_of
from workflows.config.schema import Distill, RunConfig
from workflows.config.values import merge
from workflows.errors import UserError
from workflows.session.context import Context, Done
from workflows.session.stage import StageRun, open_stage
from workflows.stages.teacher import (
    FITTED,
    about,
    data_of,
    data_provenance,
    run_trainings,
    training_code,
    training_result,
    window_of,
)
from workflows.storage.local import read_json
from workflows.training.job import Job

if TYPE_CHECKING:
    from mmdistill_core.diffusion.schedules import Schedule
    from mmdistill_core.methods.base import Method, Round
    from mmdistill_core.networks.config import NetworkConfig

CODE = ("workflows/dataset/reference.py", "workflows/stages/teacher.py", "workflows/stages/distill.py")
VALIDATION = ("mmdistill_core.metrics.frechet", "mmdistill_core.samplers.labels")


@dataclass(frozen=True)
class Taught:
    """A round's teacher: its folder here and for workers, its identity, and its model.json."""

    folder: Path
    at: str
    identity: str
    model: dict[str, Any]

    @classmethod
    def of(cls, done: Done) -> Taught:
        folder = done.folder / "model"
        return cls(folder, done.at("model"), done.identity, json.loads((folder / "model.json").read_text()))

    @property
    def networks(self) -> list[NetworkConfig]:
        """The teacher's, and that of its students' start, if it is another."""
        from mmdistill_core.networks.config import network_config

        fitted = read_json(self.folder.parent / FITTED / "model.json")
        return [network_config(model["network"]) for model in (self.model, fitted) if model]

    @property
    def schedule(self) -> Schedule:
        """Its students' too."""
        from mmdistill_core.diffusion.schedules import schedule_from_dict

        return schedule_from_dict(self.model["schedule"])


@dataclass(frozen=True)
class Distilled:
    """What the rounds made: each by its name, those of few steps first, and the student of each k."""

    rounds: dict[str, Done]
    students: dict[int, Done]


def distill(context: Context, prepared: Done, taught: Done) -> Distilled:
    """Each round is a stage of its own, distill-NAME, finished and tracked as soon as it is trained. One that learns from another's
    student, or starts from it, waits for that.
    """
    rounds = rounds_of(context.config.distill, Taught.of(taught).schedule)
    done: dict[str, Done] = {}
    waiting = list(rounds)
    while waiting:
        ready = [one for one in waiting if _needs(one) <= set(done)]
        assert ready, [one.name for one in waiting]
        waiting = [one for one in waiting if one not in ready]
        _distill(context, prepared, taught, ready, done)
    students = {k: done[one.name] for one in rounds for k in one.ks}
    in_order = sorted(rounds, key=lambda one: (one.ks or (one.settings_of or 0,), len(one.ks)))
    return Distilled({one.name: done[one.name] for one in in_order}, dict(sorted(students.items())))


def _needs(one: Round) -> set[str]:
    return {*one.starts.values(), *([one.teacher] if one.teacher else [])}


def _distill(context: Context, prepared: Done, taught: Done, rounds: list[Round], done: dict[str, Done]) -> None:
    """These rounds, together; the finished ones go to `done`."""
    config, runs = context.config, list[tuple[str, Job, StageRun]]()
    sections = {one.name: config.distill.for_round(one) for one in rounds}
    # The longest first, so that the last ones to end are short.
    for one in sorted(rounds, key=lambda one: -sections[one.name].images):
        own, by = sections[one.name], Taught.of(done[one.teacher] if one.teacher else taught)
        begins = {role: done[name] for role, name in one.starts.items()}
        depends = {"seed": config.seed} | round_depends(config, own, one, prepared, by, begins)
        shown = {"k": ", ".join(map(str, one.ks)), "distill": own.model_dump(exclude={"k", "overrides"})}
        opened = open_stage(context, f"distill-{one.name}", depends=depends, config=shown)
        if isinstance(opened, Done):
            done[one.name] = opened
            continue
        job = job_of(
            config,
            own,
            one,
            prepared=prepared,
            taught=by,
            seed=seed_of(config, one),
            name=f"distill-{one.name}-{opened.folder.key}",
            output=opened.folder.at("model"),
            storage=context.workspace.training_storage,
            starts=starts(one.method, taught) | {role: start.at("model") for role, start in begins.items()},
        )
        runs.append((one.name, job, opened))
    if runs:
        _train(context, runs, done)


def round_depends(
    config: RunConfig, own: Distill, one: Round, prepared: Done, taught: Taught, begins: Mapping[str, Done]
) -> dict[str, Any]:
    """What a round's result follows from, beside its seed. `begins`: role -> the student that it starts from."""
    return {
        "prepare": prepared.identity,
        "window": window_of(config, prepared.result),
        "extractor": prepared.result["extractor"],
        "teacher": taught.identity,
        "starts": {role: start.identity for role, start in begins.items()},
        "given": own.given,
        "round": [one.name, list(one.ks)],
        "distill": own.model_dump(exclude={"k", "overrides", "warm_start", "given"}),
        "precision": config.compute.precision,
        "code": training_code(own.method, *CODE, networks=taught.networks, modules=VALIDATION),
    }


def _train(context: Context, runs: list[tuple[str, Job, StageRun]], done: dict[str, Done]) -> None:
    def finish(i: int) -> None:
        name, _, run = runs[i]
        run.folder.collect("model")
        done[name] = run.finish(training_result(run, _summary(run)))

    unfinished = [run for name, _, run in runs if name not in done]
    with context.screen.bars():
        try:
            run_trainings(
                context,
                [(job, run) for _, job, run in runs],
                at_once=context.placement.at_once,
                workers=context.placement.student_workers,
                done=finish,
            )
        except BaseException as error:
            for run in unfinished:
                if run.folder.result is None:
                    run.abandon(error)
            raise


def _summary(run: StageRun) -> str:
    provenance = json.loads((run.path / "model" / "model.json").read_text())["provenance"]
    if "best_score" not in provenance:
        return f"{provenance['images']:,} images"
    return f"{provenance['images']:,} images, best distance {provenance['best_score']:.3g} at {provenance['best_images']:,}"


def seed_of(config: RunConfig, one: Round) -> int:
    """Of a student of one k, k after the recipe's; of any other round, by its name."""
    return config.seed + (one.ks[0] if len(one.ks) == 1 else zlib.crc32(one.name.encode()) % 10**6)


def job_of(
    config: RunConfig,
    own: Distill,
    one: Round,
    *,
    prepared: Done,
    taught: Taught,
    seed: int,
    name: str,
    output: str,
    storage: str,
    starts: dict[str, str],
) -> Job:
    """The training of a round: `own` is the distill section as it holds for it, `starts` the roles that begin as another model.

    Raises UserError for a teacher that the method can't learn from.
    """
    try:
        one.method.check_teacher(about(taught.folder))
    except ValueError as error:
        raise UserError(f"distill.{error}") from None
    validate = None
    if own.validate_every and one.method.validate(one.ks):
        validate = {
            "extractor": prepared.at("extractor"),
            "reference": prepared.at(f"statistics/{config.data.trained}"),
            "samples": own.validate_samples,
            "every": own.validate_every,
        }
    return Job(
        name=name,
        output=output,
        storage=storage,
        data=data_of(prepared),
        rows=config.data.trained,
        window=window_of(config, prepared.result),
        seed=seed,
        method=own.method,
        arguments=arguments_of(one.method),
        given=given_of(own, one.method, teacher=taught.at, extractor=prepared.at("extractor")),
        starts=starts,
        network=taught.model["network"],
        schedule=taught.model["schedule"],
        prediction=taught.model["prediction"],
        options=optimiser_options(own, one.method),
        micro_batch=own.micro_batch,
        dropout=own.dropout,
        images=own.images,
        batch=own.batch,
        compute=config.compute.model_dump(),
        log_every=own.log_every,
        checkpoint_every=own.checkpoint_every,
        ks=one.ks or (one.method.k,),
        ema_half_life_images=own.ema_half_life_images,
        ema_ramp=own.ema_ramp,
        validate=validate,
        provenance={
            "role": "student",
            "recipe": config.recipe,
            "method": own.method,
            "k": one.ks[0] if len(one.ks) == 1 else list(one.ks),
            "teacher": taught.identity,
            **data_provenance(prepared.result),
        },
    )


def arguments_of(method: Method) -> dict[str, Any]:
    """The fields of a method, but its schedule."""
    return {f.name: getattr(method, f.name) for f in fields(method) if f.name != "schedule"}


def given_of(own: Distill, method: Method, **known: str) -> dict[str, str]:
    """name -> where it is, of what the method's roles are given: what is `known`, or a model that the recipe names.

    Raises UserError for one that is neither.
    """
    from mmdistill_core.methods.base import Given

    places = known | own.given
    names = [role.origin.name for role in method.roles if isinstance(role.origin, Given)]
    for name in names:
        if name not in places:
            raise UserError(
                f"distill.given: {own.method} asks for a model {name!r}; name its folder or URI in distill.given.{name}"
            )
    return {name: places[name] for name in names}


def starts(method: Method, taught: Done) -> dict[str, str]:
    """role -> model folder of those that would be trained as copies of an exact teacher, which has no weights to start from: beside
    it lies a network that was fitted to the data.
    """
    from mmdistill_core.methods.base import Copy, Given

    if not (taught.folder / FITTED).is_dir():
        return {}
    origins = {role.name: role.origin for role in method.roles}
    return {
        role.name: taught.at(FITTED)
        for role in method.roles
        if role.trained and isinstance(role.origin, Copy) and origins[role.origin.role] == Given("teacher")
    }


def optimiser_options(own: Distill, method: Method) -> dict[str, dict[str, Any]]:
    """Of each trained role: the recipe's, with what the method has for the role, and with what the recipe has for it."""
    common = own.optimiser.model_dump()
    return {
        role.name: merge(common | dict(role.optimiser), own.optimisers.get(role.name, {}))
        for role in method.roles
        if role.trained
    }
