"""distill: for each k a student of k steps, from the teacher, by the recipe's method; several at once where they fit."""

from __future__ import annotations

from typing import Any

from workflows.config import Distill
from workflows.context import Context, Done, StageRun, open_stage
from workflows.runtime.worker import Job
from workflows.runtime.workspace import code_version
from workflows.stages.teacher import (
    TRAINING_CODE,
    model_config,
    network_config,
    run_trainings,
    training_result,
)

CODE = (
    *TRAINING_CODE,
    "mmdistill_core/methods/moment_matching.py",
    "mmdistill_core/metrics/frechet.py",
    "mmdistill_core/samplers",
    "workflows/stages/distill.py",
)
ARGUMENTS = ("update", "pairing", "p_s", "w_s", "sigma_data", "pull", "ema")


def distill(context: Context, prepared: Done, taught: Done) -> dict[int, Done]:
    """The students by k. Each is a stage of its own, distill-k<k>, finished and tracked as soon as it is trained."""
    done: dict[int, Done] = {}
    runs: list[tuple[int, Job, StageRun]] = []
    for k in sorted(context.config.distill.k, reverse=True):
        own = context.config.distill.for_k(k)
        shown = {"k": k, "distill": own.model_dump(exclude={"k", "overrides"})}
        depends = {
            "prepare": prepared.identity,
            "teacher": taught.identity,
            "seed": context.config.seed,
            "code": code_version(*CODE),
            **shown,
        }
        opened = open_stage(context, f"distill-k{k}", depends=depends, config=shown | model_config(context))
        if isinstance(opened, Done):
            done[k] = opened
        else:
            runs.append((k, _job(context, opened, k, prepared, taught), opened))
    if runs:
        _train(context, runs, done)
    return dict(sorted(done.items()))


def _train(context: Context, runs: list[tuple[int, Job, StageRun]], done: dict[int, Done]) -> None:
    def finish(i: int) -> None:
        k, _, run = runs[i]
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
    import json

    provenance = json.loads((run.path / "model" / "model.json").read_text())["provenance"]
    if "best_score" not in provenance:
        return f"{provenance['images']:,} images"
    return f"{provenance['images']:,} images, best distance {provenance['best_score']:.3g} at {provenance['best_images']:,}"


def _job(context: Context, run: StageRun, k: int, prepared: Done, taught: Done) -> Job:
    own = context.config.distill.for_k(k)
    validate = None
    if own.validate_every:
        validate = {
            "classifier": str(prepared.folder / "classifier"),
            "samples": own.validate_samples,
            "every": own.validate_every,
        }
    return Job(
        name=f"distill-k{k}-{run.folder.key}",
        output=str(run.path / "model"),
        storage=str(context.workspace.training_storage),
        data=str(prepared.folder / "data"),
        seed=context.config.seed + k,
        method=own.method,
        arguments={"k": k} | {name: getattr(own, name) for name in ARGUMENTS},
        networks={"teacher": str(taught.folder / "model")},
        network=network_config(context, prepared),
        schedule=context.config.schedule.as_dict(),
        prediction=context.config.prediction,
        options=optimiser_options(own),
        images=own.images,
        batch=own.batch,
        log_every=own.log_every,
        checkpoint_every=own.checkpoint_every,
        best_role="student_ema" if own.ema else "student",
        k=k,
        ema_half_life_images=own.ema_half_life_images,
        ema_ramp=own.ema_ramp,
        validate=validate,
        provenance=_provenance(context, own.method, k, prepared, taught),
    )


def optimiser_options(own: Distill) -> dict[str, dict[str, Any]]:
    """The student's and the auxiliary's numbers, which differ in the learning rate if the recipe says so."""
    student = own.optimiser.model_dump()
    return {"student": student, "auxiliary": student | {"lr": own.auxiliary_lr or own.optimiser.lr}}


def _provenance(context: Context, method: str, k: int, prepared: Done, taught: Done) -> dict[str, Any]:
    return {
        "role": "student",
        "recipe": context.config.recipe,
        "method": method,
        "k": k,
        "teacher": taught.identity,
        "data_fingerprint": prepared.result["fingerprint"],
    }
