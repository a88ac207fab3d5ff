"""distill: for each k a student of k steps, from the teacher, by the recipe's method; several at once where they fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workflows.config.schema import Distill, RunConfig
from workflows.errors import UserError
from workflows.session.context import Context, Done, StageRun, open_stage
from workflows.stages.teacher import (
    FITTED,
    TRAINING_CODE,
    data_of,
    data_provenance,
    denoising_arguments,
    model_config,
    network_config,
    run_trainings,
    training_result,
    window_of,
)
from workflows.storage.workspace import code_version
from workflows.training.job import Job

CODE = (
    *TRAINING_CODE,
    "mmdistill_core/methods/moment_matching.py",
    "mmdistill_core/methods/denoising.py",
    "mmdistill_core/metrics/frechet.py",
    "workflows/dataset/reference.py",
    "mmdistill_core/samplers",
    "workflows/stages/teacher.py",
    "workflows/stages/distill.py",
)
ARGUMENTS = (
    "update",
    "pairing",
    "delta_power",
    "p_s",
    "w_s",
    "sigma_data",
    "logsnr_shift",
    "transition",
    "eta",
    "guidance",
    "clip_x",
    "pull",
    "auxiliary_updates",
    "auxiliary_sees_t",
    "derivative",
    "ema",
)


def distill(context: Context, prepared: Done, taught: Done) -> dict[int, Done]:
    """The students by k. Each is a stage of its own, distill-k<k>, finished and tracked as soon as it is trained. With `warm_start`
    a student of k steps waits for that of 2k steps, from which it starts.
    """
    done: dict[int, Done] = {}
    waiting = {k: context.config.distill.for_k(k) for k in context.config.distill.k}
    while waiting:
        ready = {k: own for k, own in waiting.items() if not (own.warm_start and 2 * k in waiting)}
        waiting = {k: own for k, own in waiting.items() if k not in ready}
        _distill(context, prepared, taught, ready, done)
    return dict(sorted(done.items()))


def _distill(
    context: Context, prepared: Done, taught: Done, sections: dict[int, Distill], done: dict[int, Done]
) -> None:
    """Those of `sections`, together; the finished ones go to `done`."""
    runs: list[tuple[int, Job, StageRun]] = []
    # The longest first, so that the last ones to end are short.
    for k, own in sorted(sections.items(), key=lambda item: -item[1].images):
        start = done.get(2 * k) if own.warm_start else None
        shown = {"k": k, "distill": own.model_dump(exclude={"k", "overrides"})}
        depends = {
            "prepare": prepared.identity,
            "window": window_of(context.config, prepared.result),
            "extractor": prepared.result["extractor"],
            "teacher": taught.identity,
            "start": start.identity if start else None,
            "seed": context.config.seed,
            "code": code_version(*CODE),
            "preconditioner": preconditioner(context.config, own),
            **shown,
            **model_config(context),
        }
        opened = open_stage(context, f"distill-k{k}", depends=depends, config=shown | model_config(context))
        if isinstance(opened, Done):
            done[k] = opened
        else:
            _check_preconditioner(own, taught.folder / "model")
            job = job_of(
                context.config,
                own,
                k,
                prepared=prepared,
                teacher=taught.at("model"),
                identity=taught.identity,
                name=f"distill-k{k}-{opened.folder.key}",
                output=opened.folder.at("model"),
                storage=context.workspace.training_storage,
                start=starts(taught, start),
            )
            runs.append((k, job, opened))
    if runs:
        _train(context, runs, done)


def _train(context: Context, runs: list[tuple[int, Job, StageRun]], done: dict[int, Done]) -> None:
    def finish(i: int) -> None:
        k, _, run = runs[i]
        run.folder.collect("model")
        done[k] = run.finish(training_result(run, _summary(run)))

    unfinished = {run.folder.name: run for k, _, run in runs if k not in done}
    with context.screen.bars():
        try:
            trainings = [(job, run) for _, job, run in runs]
            run_trainings(
                context,
                trainings,
                at_once=context.placement.at_once,
                workers=context.placement.student_workers,
                done=finish,
            )
        except BaseException as error:
            for run in unfinished.values():
                if run.folder.result is None:
                    run.abandon(error)
            raise


def _summary(run: StageRun) -> str:
    provenance = json.loads((run.path / "model" / "model.json").read_text())["provenance"]
    if "best_score" not in provenance:
        return f"{provenance['images']:,} images"
    return f"{provenance['images']:,} images, best distance {provenance['best_score']:.3g} at {provenance['best_images']:,}"


def job_of(
    config: RunConfig,
    own: Distill,
    k: int,
    *,
    prepared: Done,
    teacher: str,
    identity: str,
    name: str,
    output: str,
    storage: str,
    start: dict[str, str],
) -> Job:
    """The training of the k-step student: `own` is the distill section as it holds for k, `teacher` a model folder and `identity`
    its hash, `start` the roles that begin as another one (`starts`).
    """
    result = prepared.result
    validate = None
    if own.validate_every:
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
        window=window_of(config, result),
        seed=config.seed + k,
        method=own.method,
        arguments={"k": k} | {field: getattr(own, field) for field in ARGUMENTS},
        networks={"teacher": teacher} | start,
        network=network_config(config, result),
        schedule=config.schedule.as_dict(),
        prediction=config.prediction,
        options=optimiser_options(own),
        micro_batch=own.micro_batch,
        dropout=own.dropout,
        preconditioner=preconditioner(config, own),
        sampler="renoise" if own.transition == "unconditional" else "ancestral",
        sampler_options={} if own.eta == 1 else {"eta": own.eta},
        guidance=own.told,
        images=own.images,
        batch=own.batch,
        compute=config.compute.model_dump(),
        log_every=own.log_every,
        checkpoint_every=own.checkpoint_every,
        best_role="student_ema" if own.ema else "student",
        k=k,
        ema_half_life_images=own.ema_half_life_images,
        ema_ramp=own.ema_ramp,
        validate=validate,
        provenance={
            "role": "student",
            "recipe": config.recipe,
            "method": own.method,
            "k": k,
            "teacher": identity,
            **data_provenance(result),
        },
    )


def starts(taught: Done, student: Done | None) -> dict[str, str]:
    """role -> model folder of those that don't start as the teacher. An exact one has no weights to start from: beside it lies a
    network that was fitted to the data.
    """
    fitted = taught.at(FITTED)
    networks = {"student": fitted, "auxiliary": fitted} if (taught.folder / FITTED).is_dir() else {}
    return networks | ({"student": student.at("model")} if student else {})


def optimiser_options(own: Distill) -> dict[str, dict[str, Any]]:
    """The student's and the auxiliary's numbers, which differ in the learning rate if the recipe says so."""
    student = own.optimiser.model_dump()
    if own.update == "instant":
        return {"student": student}
    return {"student": student, "auxiliary": student | {"lr": own.auxiliary_lr or own.optimiser.lr}}


def preconditioner(config: RunConfig, own: Distill) -> dict[str, Any] | None:
    """Instant's Lambda (job.Job)."""
    if own.update != "instant":
        return None
    collected = {"batches": own.collect_batches, "arguments": denoising_arguments(config)}
    return {"kind": own.preconditioner} | (collected if own.preconditioner == "collected" else {})


def _check_preconditioner(own: Distill, teacher: Path) -> None:
    """Raises UserError for a Lambda that is to come of the teacher's optimiser, and can't."""
    from mmdistill_core.artifact import NotAModel, check_second_moments

    if own.update == "instant" and own.preconditioner == "adam":
        try:
            check_second_moments(teacher)
        except NotAModel as error:
            raise UserError(f"distill.preconditioner: {error}") from error
