"""teacher: a diffusion model trained on the prepared images, or one that is there already. Of a training the average is kept.

The exact denoiser, of data whose law is known, has nothing to train: beside it lies a network that was fitted to the data.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from workflows.cluster.session import Workers, groups, let_go, run_together
from workflows.config.assembly import network_of, options_in, schedule_of
from workflows.config.schema import RunConfig
from workflows.dataset.sources import source_of
from workflows.errors import UserError
from workflows.session.context import Context, Done
from workflows.session.stage import StageRun, run_stage, training_listener
from workflows.storage.code import code_version
from workflows.storage.integrity import check_model, identity_of
from workflows.storage.store import fetch
from workflows.storage.uri import is_remote
from workflows.training.crew import CREWS, abort
from workflows.training.events import EVENTS, interruptions
from workflows.training.job import Job

if TYPE_CHECKING:
    from mmdistill_core.methods.base import About
    from mmdistill_core.networks.config import NetworkConfig

FITTED = "fitted"
"""Folder beside an exact teacher: the network from which its students start."""
WITHOUT_WORKERS = 30.0
"""Seconds without workers after which a training says that it waits, and a stop waits for it no longer."""
STEPS = 256
"""With which a teacher is sampled where nothing else is said."""
TRAINING_CODE = (
    "workflows/training/job.py",
    "workflows/training/worker.py",
    "workflows/training/crew.py",
    "workflows/training/parallelize.py",
    "workflows/dataset/streaming.py",
    "workflows/dataset/shards.py",
)
ENGINE = ("mmdistill_core.engine", "mmdistill_core.engine.preparation", "mmdistill_core.artifact")
"""What every training runs beside its method and its network."""


def training_code(method: str, *parts: str, networks: Sequence[Any], modules: tuple[str, ...] = ()) -> str:
    """The version of the code of a training by this method of this network."""
    from mmdistill_core.methods import method_class

    own = (method_class(method).__module__, *(type(network).__module__ for network in networks))
    return code_version(*TRAINING_CODE, *parts, modules=(*ENGINE, *own, *modules))


def model_config(context: Context) -> dict[str, Any]:
    c = context.config
    return {"network": c.network.model_dump(), "schedule": c.schedule.as_dict(), "prediction": c.prediction} | (
        {"precision": c.compute.precision} if c.compute.precision != "float32" else {}
    )


def teacher(context: Context, prepared: Done) -> Done:
    c = context.config
    if c.teacher.model is not None:
        return _named(context, prepared, c.teacher.model)
    shown = {"teacher": c.teacher.model_dump(exclude={"model"}), **model_config(context)}
    depends = {
        "prepare": prepared.identity,
        "window": window_of(c, prepared.result),
        "seed": c.seed,
        "code": training_code(
            c.teacher.method, "workflows/stages/teacher.py", networks=[network_in(c, prepared.result)]
        ),
        **shown,
    }
    return run_stage(context, "teacher", depends=depends, config=shown, body=lambda run: _body(run, prepared))


def _body(run: StageRun, prepared: Done) -> dict[str, Any]:
    context, c = run.context, run.context.config
    exact = c.teacher.kind == "exact"
    job = Job(
        name=f"teacher-{run.folder.key}",
        output=run.folder.at(FITTED if exact else "model"),
        storage=context.workspace.training_storage,
        data=data_of(prepared),
        rows=c.data.trained,
        window=window_of(c, prepared.result),
        seed=c.seed,
        method=c.teacher.method,
        arguments=options_in(c.teacher),
        network=network_values(c, prepared.result),
        schedule=c.schedule.as_dict(),
        prediction=c.prediction,
        options=dict.fromkeys(trained_by(c), c.teacher.optimiser.model_dump()),
        images=c.teacher.images,
        batch=c.teacher.batch,
        compute=c.compute.model_dump(),
        log_every=c.teacher.log_every,
        checkpoint_every=c.teacher.checkpoint_every,
        ks=(STEPS,),
        ema_half_life_images=c.teacher.ema_half_life_images,
        ema_ramp=c.teacher.ema_ramp,
        micro_batch=c.teacher.micro_batch,
        provenance={
            "role": "teacher",
            "recipe": c.recipe,
            **data_provenance(prepared.result),
        },
    )
    with context.screen.bars():
        run_trainings(context, [(job, run)], at_once=1, workers=context.placement.teacher_workers, done=lambda _: None)
    run.folder.collect(FITTED if exact else "model")
    if exact:
        _save_exact(run, job)
    return training_result(run, f"{c.teacher.images:,} images" + (", the exact denoiser beside it" if exact else ""))


def trained_by(config: RunConfig) -> list[str]:
    """The roles that the teacher's method trains."""
    from workflows.config.assembly import method_of

    return [role.name for role in method_of(config.teacher, schedule_of(config)).roles if role.trained]


def _save_exact(run: StageRun, job: Job) -> None:
    """The optimal denoiser in the place of the teacher, with the figures of the network that was fitted to the data."""
    from mmdistill_core.artifact import DiffusionModel, load_model, save_model
    from mmdistill_core.diffusion.schedules import schedule_from_dict

    exact = source_of(run.context.config.data).exact
    assert exact is not None
    denoiser, provenance = exact(schedule=schedule_from_dict(job.schedule)), load_model(run.path / FITTED).provenance
    save_model(run.path / "model", DiffusionModel(denoiser, k=job.ks[0], null_label=True, provenance=provenance))
    run.context.tracker.log_artifact(run.run_id, run.path / FITTED, FITTED)


def _named(context: Context, prepared: Done, model: str) -> Done:
    """A teacher that is there already: a copy of it, which has to fit the data."""
    from workflows.registry.versions import Registry

    registered = model.startswith("models:/")
    if registered:
        context.settle()
        version = Registry(context.tracker).one(model)
        identity = [version.uri, version.tags.get("identity", "")]
    else:
        folder = fetch(model) if is_remote(model) else check_model(fetch(model))
        _describe(folder, model)
        identity = [identity_of(folder / "weights.safetensors", folder / "model.json")]
    shown = {"teacher": model}

    def body(run: StageRun) -> dict[str, Any]:
        with TemporaryDirectory() as scratch:
            there = Registry(context.tracker).download(model, Path(scratch)) if registered else folder
            _check_fits(context.config, prepared, _describe(there, model), model)
            shutil.copytree(there, run.path / "model", dirs_exist_ok=True)
        return training_result(run, f"{model}, as it is") | {"images": None, "forwards": None}

    depends = {"model": identity, "prepare": prepared.identity, "code": code_version("workflows/stages/teacher.py")}
    return run_stage(context, "teacher", depends=depends, config=shown, body=body)


def _describe(folder: Path, named: str) -> dict[str, Any]:
    """The model.json of a model folder. Raises UserError for a folder that holds none."""
    with suppress(OSError, ValueError):
        description = json.loads((folder / "model.json").read_text())
        if isinstance(description, dict) and description.get("kind") == "denoiser":
            return description
    raise UserError(f"teacher.model: {named} is not a model folder (model.json and weights.safetensors)")


def _check_fits(config: RunConfig, prepared: Done, model: dict[str, Any], named: str) -> None:
    """Raises UserError for a teacher of other images than the data are, or that can't do what the recipe asks."""
    network, shape = model["network"], prepared.result["shape"]
    found = [network["channels"], network["image_size"], network["image_size"]]
    if found != list(shape):
        sizes = ["x".join(map(str, one)) for one in (found, shape)]
        raise UserError(f"teacher.model: {named} makes images of {sizes[0]}, the data are of {sizes[1]}")
    if network["num_classes"] != prepared.result["num_classes"]:
        raise UserError(
            f"teacher.model: {named} has {network['num_classes']} classes, the data have {prepared.result['num_classes']}"
        )
    if config.evaluate.guidance and not model.get("null_label"):
        raise UserError(f"evaluate.guidance: {named} never learnt the null label, so that it can't be guided")


def about(model: Path) -> About:
    """What is known of a teacher from its folder."""
    from mmdistill_core.artifact import beside
    from mmdistill_core.methods.base import About

    description = json.loads((model / "model.json").read_text())
    return About(description["network"]["num_classes"], bool(description["null_label"]), beside(model))


def data_of(prepared: Done) -> str:
    """Where workers find the data set: of the stage's own, or the one that the recipe names."""
    return str(prepared.result["data"] or prepared.at("data"))


def data_provenance(prepared: dict[str, Any]) -> dict[str, Any]:
    """What a model keeps of its data: their fingerprint, and the names of their classes, if they have any."""
    names = {"classes": prepared["classes"]} if prepared.get("classes") else {}
    return {"data_fingerprint": prepared["fingerprint"], **names}


def window_of(config: RunConfig, prepared: dict[str, Any]) -> int | None:
    """Shards that are shuffled together where the images are too many to be held by every worker, else None."""
    return config.data.window if prepared["bytes"] > config.data.memory_gib * 2**30 else None


def network_in(config: RunConfig, prepared: dict[str, Any]) -> NetworkConfig:
    """The recipe's network, for the prepared images."""
    return network_of(config.network, shape=tuple(prepared["shape"]), num_classes=prepared["num_classes"])


def network_values(config: RunConfig, prepared: dict[str, Any]) -> dict[str, Any]:
    """The network as plain values, with its kind: the recipe's, and those that follow from the data."""
    made = network_in(config, prepared)
    return {"kind": made.kind} | asdict(made)


def run_trainings(
    context: Context,
    trainings: list[tuple[Job, StageRun]],
    *,
    at_once: int,
    workers: Workers,
    done: Callable[[int], None],
) -> None:
    """The jobs on Ray Train, at most `at_once` together; their progress goes to their runs and to bars. `done(i)` after job i.

    Asked to stop, they write a checkpoint each, and Stopped is raised.
    """

    unfinished, going, said, told = set[int](), set[int](), set[str](), False
    at_once = min(at_once, len(trainings))
    held = groups()

    def start(i: int) -> Callable[[], None]:
        job, run = trainings[i]
        images, minutes = context.every.images, context.every.minutes
        if images or minutes:
            # As asked, and no more often.
            job = replace(job, checkpoint_every=images or 0, checkpoint_minutes=minutes or math.inf)

        def work() -> None:
            if context.stopping.asked:
                unfinished.add(i)
                return
            run.begin()
            going.add(i)
            try:
                mailbox, use_gpu = context.monitor.actor, context.placement.use_gpu
                seen = CREWS.train(job, mailbox=mailbox, workers=workers, use_gpu=use_gpu, at_once=at_once)
                if seen < job.images:
                    unfinished.add(i)
            finally:
                going.discard(i)

        return work

    def tick() -> None:
        nonlocal told
        if context.stopping.asked and not told:
            told = True
            context.screen.line("stopping: each training writes a checkpoint first; once more to stop at once")
            context.monitor.stop()
        context.tick()
        if _all_wait(context, [trainings[i][1] for i in list(going)], workers, said):
            context.stopping.end()  # nobody is there to hear of it; the newest checkpoint is what a stop would leave

    for job, run in trainings:
        bar = context.screen.bar(run.folder.name, job.images, unit="images")
        context.listeners[job.name] = training_listener(run, bar)
    try:
        with context.stopping.waits():
            run_together(
                [start(i) for i in range(len(trainings))],
                at_once=at_once,
                tick=tick,
                done=lambda i: None if i in unfinished else done(i),
            )
        context.stopping.end()
    except BaseException:
        _abort(going, held)
        raise
    finally:
        for job, _ in trainings:
            context.listeners.pop(job.name, None)
        CREWS.rest()


def _abort(going: set[int], held: set[str]) -> None:
    """Ends the trainings that still go on, and waits for their threads: Ray must not be shut down below one that uses it. Of what
    the driver holds of the cluster it keeps what it `held` before.
    """
    begun = time.monotonic()
    while going and (waited := time.monotonic() - begun) < 20:
        with suppress(Exception):  # it is on the way up of an error
            abort(kill=waited > 5)  # again, as one may just begin
        time.sleep(0.2)
    with suppress(Exception):
        let_go(groups() - held)


def _all_wait(context: Context, runs: list[StageRun], workers: Workers, said: set[str]) -> bool:
    """Whether all these trainings have long been without workers; says so of each, once: `said`."""
    waiting = [run for run in runs if run.waits_for_workers() > WITHOUT_WORKERS]
    for name in {run.folder.name for run in waiting} - said:
        context.screen.line(
            f"[yellow]![/] {name}: its workers ({workers}) have not begun for {WITHOUT_WORKERS:.0f} s; it waits, as where the "
            "cluster has no room for them"
        )
    said.clear()
    said |= {run.folder.name for run in waiting}
    return bool(runs) and waiting == runs


def training_result(run: StageRun, summary: str) -> dict[str, Any]:
    """What a training stage returns: the model's folder is logged, and its hash is the stage's identity."""
    model = run.path / "model"
    run.context.tracker.log_artifact(run.run_id, model, "model")
    provenance = json.loads((model / "model.json").read_text())["provenance"]
    counts = {name: provenance.get(name) for name in ("images", "forwards", "skipped", "best_images", "best_score")}
    made = [folder / name for folder in (model, run.path / FITTED) for name in ("weights.safetensors", "model.json")]
    identity = identity_of(*(path for path in made if path.exists()))
    run.context.tracker.log_artifact(run.run_id, run.events.path)
    stops = interruptions(run.events.rows)
    if stops["times"]:
        times = f"{stops['times']} time{'s' * (stops['times'] > 1)}"
        summary += f"; interrupted {times}, {stops['again']:,} images trained again"
    artifacts = ["model", EVENTS, *([FITTED] if (run.path / FITTED).is_dir() else [])]
    return {"identity": identity, "artifacts": artifacts, "summary": summary, "interruptions": stops, **counts}
