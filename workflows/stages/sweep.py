"""sweep: many distillations of one teacher by Ray Tune, over any field of the distill section, several at once.

A trial trains a student in one process (the engine alone), keeps its best weights by measured distance, and measures them by the
protocol of `evaluate`. Each trial is a run in the tracking store, below the sweep's.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import time
from dataclasses import replace
from typing import Any

import yaml
from pydantic import ValidationError

from workflows.config import ConfigError, Distill, RunConfig, digest, one_line
from workflows.context import Context, Done
from workflows.runtime.errors import UserError
from workflows.runtime.progress import Screen, clock
from workflows.runtime.s3 import arrow_filesystem
from workflows.runtime.uri import is_remote
from workflows.stages.teacher import data_of
from workflows.values import merge, nested

NUMBER = r"[0-9.eE+-]+"
RANDOM = re.compile(rf"^(uniform|loguniform)\(({NUMBER}),({NUMBER})\)$")
MEASURED = ("frechet", "frechet_pixels", "kid", "inception_score", "accuracy", "recall")


def parse_space(texts: list[str], config: RunConfig) -> dict[str, Any]:
    """["pairing=uniform,grid", "optimiser.lr=loguniform(1e-4,1e-2)", "seed=0,1"] -> field -> list of values, or
    ("loguniform", low, high). Raises ConfigError for a field or value that the distill section does not allow.
    """
    space: dict[str, Any] = {}
    for text in texts:
        field, equals, values = text.replace(" ", "").partition("=")
        if not equals or not values:
            raise ConfigError(f"--space: {text!r} should read field=a,b,c or field=loguniform(low,high)")
        if found := RANDOM.match(values):
            space[field] = (found[1], float(found[2]), float(found[3]))
        else:
            space[field] = [_number(yaml.safe_load(v)) for v in values.split(",")]
        for value in space[field] if isinstance(space[field], list) else space[field][1:]:
            section(config, config.distill.k[0], {field: value})
    return space


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def section(config: RunConfig, k: int, point: dict[str, Any]) -> Distill:
    """The distill section for k with a trial's values in it. "seed" and "k" are not of the section; "setting" is several fields."""
    values, point = config.distill.for_k(k).model_dump(), dict(point)
    for field, value in (point | point.pop("setting", {})).items():
        if field not in ("seed", "k", "choice"):
            values = merge(values, nested(field, value))
    values |= {"k": [point.get("k", k)], "overrides": {}}
    try:
        own = RunConfig.model_validate(config.model_dump() | {"distill": values}).distill
    except ValidationError as error:
        raise ConfigError(f"--space: {one_line(error, RunConfig)}") from None
    if own.warm_start:
        raise ConfigError(
            "--space: distill.warm_start: a sweep trains each student alone; set distill.warm_start=false"
        )
    return own


def sweep(
    context: Context, prepared: Done, taught: Done, *, space: dict[str, Any], trials: int, early_stop: bool
) -> list[dict[str, Any]]:
    """Runs the trials; a row for each: its point, its distances, its seconds. With lists alone every combination is tried
    once; with a random field, `trials` draws in all.
    """
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from workflows.runtime.shards import read_all
    from workflows.runtime.worker import root_cause

    config = context.config
    space = {"k": list(config.distill.k)} | space
    random = any(isinstance(v, tuple) for v in space.values())
    grid = list(itertools.product(*(v for v in space.values() if isinstance(v, list))))
    total = trials if random else len(grid)
    if (size := prepared.result["bytes"] / 2**30) > config.data.memory_gib:
        raise UserError(
            f"sweep: holds the images in memory, {size:.1f} GiB, more than data.memory_gib={config.data.memory_gib:g}",
            hint="prepare fewer of them (--limit), or raise data.memory_gib",
        )
    arrays = ray.put(read_all(data_of(prepared)))
    jobs = {"config": config.model_dump(), "prepared": prepared, "taught": taught}
    mailbox = context.monitor.actor

    def trial(point: dict[str, Any]) -> None:
        run_trial(point, jobs, arrays, mailbox)

    place = context.workspace.training_storage
    filesystem, path = arrow_filesystem(place) if is_remote(place) else (None, place)
    name = f"sweep-{digest([space, config.model_dump(mode='json'), taught.identity, trials])}"
    scheduler = ASHAScheduler(time_attr="n_images", max_t=10**12, grace_period=1) if early_stop else None
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={field: _domain(tune, v, random) for field, v in space.items()},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="min",
            num_samples=trials if random else 1,
            scheduler=scheduler,
            max_concurrent_trials=context.placement.at_once,
        ),
        run_config=tune.RunConfig(name=name, storage_path=path, storage_filesystem=filesystem, verbose=0),
    )
    rows: list[dict[str, Any]] = []
    with context.screen.bars() as screen:
        bar = screen.bar("sweep", total, unit="trials")

        def listen(row: dict[str, Any]) -> None:
            rows.append(row)
            run = context.tracker.start_run(f"trial {len(rows)}", parent=context.parent_run)
            context.tracker.log_params(run, row["point"])
            context.tracker.log_metrics(run, [(0, {n: row[n] for n in (*MEASURED, "seconds") if n in row})])
            context.tracker.end_run(run)
            point = "  ".join(f"{f} {_short(v)}" for f, v in row["point"].items())
            pixels = f", pixels {row['frechet_pixels']:.3f}" if "frechet_pixels" in row else ""
            screen.line(f"  {point}  distance {row['frechet']:.3f}{pixels}  {clock(row['seconds'])}")
            bar.update(len(rows))

        context.listeners["sweep"] = listen
        found: list[Any] = []
        from workflows.runtime.cluster import run_together

        run_together([lambda: found.append(tuner.fit())], at_once=1, tick=context.tick, done=lambda _: None)
    if found[0].errors:
        raise UserError(f"a trial failed: {root_cause(found[0].errors[0])}") from found[0].errors[0]
    return rows


def _short(value: Any) -> str:
    """A value for a line: a setting by its name."""
    return str(value.get("choice", value) if isinstance(value, dict) else value)


def _domain(tune: Any, values: Any, random: bool) -> Any:
    if isinstance(values, tuple):
        return getattr(tune, values[0])(values[1], values[2])
    return tune.choice(values) if random else tune.grid_search(values)


def run_trial(point: dict[str, Any], jobs: dict[str, Any], arrays: Any, mailbox: Any) -> None:
    """One trial, on a Tune worker."""
    import ray
    import torch
    from ray import tune

    from mmdistill_core.engine import FitOptions, InMemoryBatches, fit
    from workflows.runtime.job import build_state, validator
    from workflows.stages.distill import job_of, starts

    torch.set_num_threads(1)
    config, k, seed = RunConfig.model_validate(jobs["config"]), int(point["k"]), int(point.get("seed", 0))
    own = section(config, k, point)
    data = ray.get(arrays)
    trained = data.rows(config.data.trained)
    images, labels = torch.from_numpy(trained.images.copy()), torch.from_numpy(trained.labels.copy())
    taught = jobs["taught"]
    job = job_of(config, own, k, prepared=jobs["prepared"], teacher=taught.at("model"), identity=taught.identity,
                 name="trial", output="", storage="", start=starts(taught, None))  # fmt: skip
    job = replace(job, seed=config.seed + k + 1000 * seed)
    batches = InMemoryBatches(
        x=images, label=labels if job.network["num_classes"] else None, global_batch=job.batch, seed=job.seed
    )
    state = build_state(job, batches)

    def report(metrics: dict[str, float]) -> None:
        if "score" in metrics:
            tune.report({"score": metrics["score"], "n_images": metrics["n_images"]})

    began = time.perf_counter()
    options = FitOptions(log_every=job.log_every, validate_every=own.validate_every, seed=job.seed)
    validate = validator(job, labels) if job.validate else None
    fit(state=state, batches=batches, options=options, report=report, validate=validate)
    seconds = time.perf_counter() - began
    row = {"point": point, "seconds": seconds, "images": state.n_images, "forwards": state.forwards,
           "kept_at": state.best.n_images}  # fmt: skip
    labels = torch.from_numpy(data.rows(config.data.reference).labels.copy())
    row |= measured(config, job, state.best_network(), labels, jobs["prepared"])
    mailbox.push.remote("sweep", row)
    tune.report({"score": row["frechet"], "n_images": float(state.n_images)})


def measured(config: RunConfig, job: Any, network: Any, labels: Any, prepared: Done) -> dict[str, float]:
    """The kept student by `evaluate`'s protocol: its counts, its seeds, its labels, its reference; means over seeds."""
    from mmdistill_core.artifact import load_extractor
    from mmdistill_core.samplers import data_labels
    from workflows.reference import check_reference, load_reference
    from workflows.runtime.job import model_of
    from workflows.runtime.storage import fetch
    from workflows.stages.evaluate import measure, sampled

    options, model = config.evaluate, model_of(job, network)
    extractor = load_extractor(fetch(prepared.at("extractor")))
    real = load_reference(check_reference(config, prepared.at("statistics"), prepared.result)).statistics
    values = []
    for seed in range(options.seeds):
        label = data_labels(labels, options.samples, config.seed, 3, seed)
        fake = sampled(model, extractor, {}, job.k, label, seed, 0, options.neighbour_samples)
        values.append(measure(real, fake, label, options, seed))
    return {name: statistics.mean(v[name] for v in values) for name in MEASURED if name in values[0]}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in the seed alone as one: means and standard deviations; best first within each k."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        point = {field: v for field, v in row["point"].items() if field != "seed"}
        groups.setdefault(json.dumps(point, sort_keys=True), []).append(row)
    out = []
    for text, members in groups.items():
        line: dict[str, Any] = {"point": json.loads(text), "seeds": len(members)}
        for name in (n for n in (*MEASURED, "seconds") if n in members[0]):
            values = [m[name] for m in members]
            line[name] = {"mean": statistics.mean(values), "spread": statistics.pstdev(values)}
        out.append(line)
    return sorted(out, key=lambda line: (line["point"]["k"], line["frechet"]["mean"]))


def show(lines: list[dict[str, Any]], screen: Screen) -> None:
    from rich.table import Table

    fields = [f for f in lines[0]["point"] if f == "k" or len({json.dumps(line["point"][f]) for line in lines}) > 1]
    table = Table(header_style="bold")
    shown = {"frechet": "distance", "frechet_pixels": "in pixels", "recall": "recall"}
    shown = {name: title for name, title in shown.items() if name in lines[0]}
    for name in (*fields, *shown.values(), "seconds", "seeds"):
        table.add_column(name, no_wrap=True)
    for line in lines:
        values = [f"{v:.3g}" if isinstance(v := line["point"][f], float) else _short(v) for f in fields]
        cells = [f"{line[n]['mean']:.3f} ± {line[n]['spread']:.3f}" for n in shown]
        table.add_row(*values, *cells, f"{line['seconds']['mean']:.0f}", str(line["seeds"]))
    screen.console.print(table)
