"""teacher: trains a diffusion model on the prepared images and keeps its average, or takes a model that exists already.

For data with a known distribution the teacher may be the exact denoiser. It has no weights. So a network is fitted to the data and
lies beside it, for students to start from.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from workflows.cluster.session import Workers, groups, let_go, run_together
from workflows.config.assembly import method_of, network_of, options_in, schedule_of
from workflows.config.schema import Distill, RunConfig, Teacher, Training
from workflows.config.values import merge
from workflows.dataset.sources import source_of
from workflows.errors import UserError
from workflows.ingest.teachers import as_json, identity_of_source, is_foreign, prove_on_data, read_teacher
from workflows.session.context import Context, Done
from workflows.session.stage import StageRun, run_stage, training_listener
from workflows.storage.code import code_version
from workflows.storage.integrity import check_model, identity_of, model_identity
from workflows.storage.local import read_json
from workflows.storage.store import fetch
from workflows.storage.uri import is_remote
from workflows.training.crew import CREWS, abort
from workflows.training.events import EVENTS, interruptions
from workflows.training.job import Job

if TYPE_CHECKING:
    from mmdistill_core.methods.base import About, Method, Role
    from mmdistill_core.networks.config import NetworkConfig

FITTED = "fitted"
"""The folder beside an exact teacher, with the network from which its students start."""
WITHOUT_WORKERS = 30.0
"""Seconds without workers after which the user is told that a training waits, and after which a stop no longer waits for it."""
STEPS = 256
"""The default number of sampling steps of a teacher."""
TRAINING_CODE = (
    "workflows/training/job.py",
    "workflows/training/worker.py",
    "workflows/training/crew.py",
    "workflows/training/parallelize.py",
    "workflows/dataset/streaming.py",
    "workflows/dataset/shards.py",
)
ENGINE = ("mmdistill_core.engine", "mmdistill_core.engine.preparation", "mmdistill_core.artifact")
"""The modules that every training runs, apart from its method and its networks."""


IMPORTS = ("mmdistill_core.imports", "mmdistill_core.metrics.proof")


def training_code(method: str, *parts: str, networks: Sequence[Any], modules: tuple[str, ...] = ()) -> str:
    """The version of the code of a training by this method of these networks."""
    from mmdistill_core.methods import method_class

    chosen = (method_class(method).__module__, *(type(network).__module__ for network in networks))
    return code_version(*TRAINING_CODE, *parts, modules=(*ENGINE, *chosen, *modules))


def teacher(context: Context, prepared: Done) -> Done:
    c = context.config
    if c.teacher.model is not None:
        return _existing_teacher(context, prepared, c.teacher.model)
    params: dict[str, Any] = {
        "teacher": c.teacher.model_dump(exclude={"model"}),
        "network": c.network.model_dump(),
        "schedule": c.schedule.as_dict(),
        "prediction": c.prediction,
    }
    if c.compute.precision != "float32":
        params["precision"] = c.compute.precision
    networks = [network_in(c, prepared.result)]
    depends = {
        "prepare": prepared.identity,
        "window": window_of(c, prepared.result),
        "seed": c.seed,
        "code": training_code(c.teacher.method, "workflows/stages/teacher.py", networks=networks),
        **params,
    }
    return run_stage(context, "teacher", depends=depends, params=params, body=lambda run: _train(run, prepared))


def _train(run: StageRun, prepared: Done) -> dict[str, Any]:
    context, c = run.context, run.context.config
    exact, network = c.teacher.kind == "exact", network_in(c, prepared.result)
    folder = FITTED if exact else "model"
    job = Job(
        name=f"teacher-{run.folder.key}",
        output=run.folder.at(folder),
        storage=context.workspace.training_storage,
        seed=c.seed,
        arguments=options_in(c.teacher),
        network={"kind": network.kind} | asdict(network),
        schedule=c.schedule.as_dict(),
        prediction=c.prediction,
        options=optimiser_options(c.teacher, method_of(c.teacher, schedule_of(c))),
        ks=(STEPS,),
        provenance={"role": "teacher", "recipe": c.recipe, **data_provenance(prepared.result)},
        **common_fields(c, c.teacher, prepared),
    )
    workers = context.placement.teacher_workers
    run_trainings(context, [(job, run)], at_once=1, workers=workers, finish=lambda run: None)
    run.folder.collect(folder)
    if exact:
        _save_exact(run, job)
    return training_result(run, f"{c.teacher.images:,} images" + (", the exact denoiser beside it" if exact else ""))


def _save_exact(run: StageRun, job: Job) -> None:
    """Saves the exact denoiser as the teacher, with the provenance of the fitted network."""
    from mmdistill_core.artifact import DiffusionModel, load_model, save_model
    from mmdistill_core.diffusion.schedules import schedule_from_dict

    exact = source_of(run.context.config.data).exact
    assert exact is not None
    denoiser, provenance = exact(schedule=schedule_from_dict(job.schedule)), load_model(run.path / FITTED).provenance
    save_model(run.path / "model", DiffusionModel(denoiser, k=job.ks[0], null_label=True, provenance=provenance))
    run.context.tracker.log_artifact(run.run_id, run.path / FITTED, FITTED)


def _existing_teacher(context: Context, prepared: Done, model: str) -> Done:
    """Copies an existing model into the stage, or makes it of one from elsewhere. It must fit the data."""
    from workflows.registry.versions import Registry

    registered = model.startswith("models:/")
    if registered:
        context.settle()
        version = Registry(context.tracker).one(model)
        identity = [version.uri, version.tags.get("identity", "")]
    elif is_foreign(model):
        return _imported_teacher(context, prepared, model)
    else:
        folder = fetch(model) if is_remote(model) else check_model(fetch(model))
        _read_description(folder, model)
        identity = [model_identity(folder)]

    def copy(run: StageRun) -> dict[str, Any]:
        with TemporaryDirectory() as scratch:
            source = Registry(context.tracker).download(model, Path(scratch)) if registered else folder
            _check_fits(context.config, prepared, _read_description(source, model), model)
            shutil.copytree(source, run.path / "model", dirs_exist_ok=True)
        return training_result(run, f"{model}, as it is") | {"images": None, "forwards": None}

    depends = {"model": identity, "prepare": prepared.identity, "code": code_version("workflows/stages/teacher.py")}
    return run_stage(context, "teacher", depends=depends, params={"teacher": model}, body=copy)


def _imported_teacher(context: Context, prepared: Done, place: str) -> Done:
    """Makes a model of a teacher from elsewhere, after a proof on the images of the run."""
    from mmdistill_core.artifact import save_model

    config, read = context.config, context.config.teacher.read

    def make(run: StageRun) -> dict[str, Any]:
        data = prepared.result
        model = read_teacher(place, read, shape=tuple(data["shape"]), num_classes=data["num_classes"])
        model.provenance |= {"role": "teacher", "recipe": config.recipe, **data_provenance(data)}
        with TemporaryDirectory() as scratch:
            save_model(scratch, model)
            _check_fits(config, prepared, _read_description(Path(scratch), place), place)
        proof = prove_on_data(place, model, data_uri(prepared))
        model.provenance["proof"] = as_json(proof)
        save_model(run.path / "model", model)
        over = math.exp(fmean(math.log(one.ratio) for one in proof.errors))
        said = f"{place}, read as {model.denoiser.prediction} of {model.schedule.name}"
        return training_result(run, f"{said}; its error is {over:.2f} of the best simple denoiser's") | {
            "images": None,
            "forwards": None,
        }

    depends = {
        "model": identity_of_source(place, read),
        "prepare": prepared.identity,
        "code": code_version("workflows/stages/teacher.py", "workflows/ingest/teachers.py", modules=IMPORTS),
    }
    return run_stage(context, "teacher", depends=depends, params={"teacher": place}, body=make)


def _read_description(folder: Path, model: str) -> dict[str, Any]:
    """The content of model.json. Raises UserError for a folder that is not a model folder."""
    description = read_json(folder / "model.json") or {}
    if description.get("kind") != "denoiser":
        raise UserError(f"teacher.model: {model} is not a model folder (model.json and weights.safetensors)")
    return description


def _check_fits(config: RunConfig, prepared: Done, description: dict[str, Any], model: str) -> None:
    """Raises UserError for a teacher of images or classes unlike the data's, or one that can't be guided as the recipe asks."""
    network, shape, num_classes = description["network"], prepared.result["shape"], prepared.result["num_classes"]
    teacher_shape = [network["channels"], network["image_size"], network["image_size"]]
    if teacher_shape != list(shape):
        sizes = ["x".join(map(str, one)) for one in (teacher_shape, shape)]
        raise UserError(f"teacher.model: {model} makes images of {sizes[0]}, the data are of {sizes[1]}")
    if network["num_classes"] != num_classes:
        raise UserError(f"teacher.model: {model} has {network['num_classes']} classes, the data have {num_classes}")
    if config.evaluate.guidance and not description.get("null_label"):
        raise UserError(f"evaluate.guidance: {model} never learnt the null label, so it can't be guided")


def about_model(folder: Path) -> About:
    """What a method may know of a teacher, from its model folder."""
    from mmdistill_core.artifact import extra_names
    from mmdistill_core.methods.base import About

    description = json.loads((folder / "model.json").read_text())
    return About(description["network"]["num_classes"], bool(description.get("null_label")), extra_names(folder))


# What the trainings of teachers and students share


def common_fields(config: RunConfig, section: Training, prepared: Done) -> dict[str, Any]:
    """The fields of a Job that come from the same settings for a teacher and for a student."""
    return {
        **section.model_dump(include=set(Training.model_fields)),
        "data": data_uri(prepared),
        "rows": config.data.trained,
        "window": window_of(config, prepared.result),
        "compute": config.compute.model_dump(),
    }


def optimiser_options(section: Teacher | Distill, method: Method) -> dict[str, dict[str, Any]]:
    """The optimiser's options for each trained role. The method's options for the role override the recipe's common ones, and the
    recipe's for the role override both.
    """
    common, own = section.optimiser.model_dump(), getattr(section, "optimisers", {})

    def options(role: Role) -> dict[str, Any]:
        declared = common | dict(role.optimiser)
        declared["lr"] *= role.lr_ratio
        return merge(declared, own.get(role.name, {}))

    return {role.name: options(role) for role in method.roles if role.trained}


def data_uri(prepared: Done) -> str:
    """Where workers find the data set: in the stage's folder, or where the recipe says."""
    return str(prepared.result["data"] or prepared.at("data"))


def data_provenance(prepared: dict[str, Any]) -> dict[str, Any]:
    """What a model records of its data: the fingerprint, and the names of the classes if they have any."""
    names = {"classes": prepared["classes"]} if prepared.get("classes") else {}
    return {"data_fingerprint": prepared["fingerprint"], **names}


def window_of(config: RunConfig, prepared: dict[str, Any]) -> int | None:
    """How many shards are shuffled together if the images are too many for a worker's memory, else None."""
    return config.data.window if prepared["bytes"] > config.data.memory_gib * 2**30 else None


def network_in(config: RunConfig, prepared: dict[str, Any]) -> NetworkConfig:
    """The recipe's network, for the prepared images."""
    return network_of(config.network, shape=tuple(prepared["shape"]), num_classes=prepared["num_classes"])


def run_trainings(
    context: Context,
    trainings: list[tuple[Job, StageRun]],
    *,
    at_once: int,
    workers: Workers,
    finish: Callable[[StageRun], None],
) -> None:
    """Runs the jobs on Ray Train, at most `at_once` at a time. Their progress goes to their runs and to progress bars. Calls
    `finish(run)` after each job that ran to its end.

    If the user asks for a stop, each training writes a checkpoint, and then Stopped is raised.
    """
    running, complete, announced = list[StageRun](), set[StageRun](), set[str]()
    stop_sent, groups_before = False, groups()
    at_once = min(at_once, len(trainings))
    images, minutes = context.every.images, context.every.minutes
    if images or minutes:  # in place of the intervals in the jobs
        every: dict[str, Any] = {"checkpoint_every": images or 0, "checkpoint_minutes": minutes or math.inf}
        trainings = [(replace(job, **every), run) for job, run in trainings]

    def train(job: Job, run: StageRun) -> None:
        if context.stopping.asked:
            return
        run.begin()
        running.append(run)
        try:
            mailbox, use_gpu = context.monitor.actor, context.placement.use_gpu
            seen = CREWS.train(job, mailbox=mailbox, workers=workers, use_gpu=use_gpu, at_once=at_once)
            if seen >= job.images:
                complete.add(run)
        finally:
            running.remove(run)

    def tick() -> None:
        nonlocal stop_sent
        if context.stopping.asked and not stop_sent:
            stop_sent = True
            context.screen.line("stopping: each training writes a checkpoint first; once more to stop at once")
            context.monitor.stop()
        context.tick()
        if _all_wait(context, list(running), workers, announced):
            context.stopping.end()  # no worker can write a checkpoint, so the newest one is all that a stop would leave

    def ended(i: int) -> None:
        if (run := trainings[i][1]) in complete:
            finish(run)

    with context.screen.bars():
        for job, run in trainings:
            bar = context.screen.bar(run.folder.name, job.images, unit="images")
            context.listeners[job.name] = training_listener(run, bar)
        try:
            with context.stopping.waits():
                run_together(
                    [partial(train, *training) for training in trainings], at_once=at_once, tick=tick, done=ended
                )
            context.stopping.end()
        except BaseException:
            _abort(running, groups_before)
            raise
        finally:
            for job, _ in trainings:
                context.listeners.pop(job.name, None)
            CREWS.rest()


def _abort(running: list[StageRun], groups_before: set[str]) -> None:
    """Ends the running trainings and waits for their threads: Ray must not be shut down while one of them uses it. Then removes the
    placement groups that are not among `groups_before`.
    """
    begun = time.monotonic()
    while running and (waited := time.monotonic() - begun) < 20:
        with suppress(Exception):  # an error is being raised already
            abort(kill=waited > 5)  # repeated, as a training may have just begun
        time.sleep(0.2)
    with suppress(Exception):
        let_go(groups() - groups_before)


def _all_wait(context: Context, runs: list[StageRun], workers: Workers, announced: set[str]) -> bool:
    """Whether all these trainings have been without workers for WITHOUT_WORKERS seconds. Tells the user of each once, and keeps the
    names in `announced` until their workers begin.
    """
    waiting = {run.folder.name for run in runs if run.seconds_without_workers > WITHOUT_WORKERS}
    for name in waiting - announced:
        context.screen.line(
            f"[yellow]![/] {name}: its workers ({workers}) have not begun for {WITHOUT_WORKERS:.0f} s; it waits, and the "
            "cluster may have no room for them"
        )
    announced &= waiting
    announced |= waiting
    return 0 < len(waiting) == len(runs)


def training_result(run: StageRun, summary: str) -> dict[str, Any]:
    """Logs the model folder of a finished training. Returns the stage's result, whose identity is the hash of the model."""
    tracker, model = run.context.tracker, run.path / "model"
    tracker.log_artifact(run.run_id, model, "model")
    provenance = json.loads((model / "model.json").read_text())["provenance"]
    counts = {name: provenance.get(name) for name in ("images", "forwards", "skipped", "best_images", "best_score")}
    fitted = [FITTED] if (run.path / FITTED).is_dir() else []
    folders = (model, *(run.path / name for name in fitted))
    identity = identity_of(*(folder / name for folder in folders for name in ("weights.safetensors", "model.json")))
    events = [EVENTS] if run.events.path.exists() else []  # an existing teacher has none
    for name in events:
        tracker.log_artifact(run.run_id, run.path / name)
    stops = interruptions(run.events.rows)
    if stops["times"]:
        times = f"{stops['times']} time{'s' * (stops['times'] > 1)}"
        summary += f"; interrupted {times}, {stops['again']:,} images trained again"
    artifacts = ["model", *events, *fitted]
    return {"identity": identity, "artifacts": artifacts, "summary": summary, "interruptions": stops, **counts}
