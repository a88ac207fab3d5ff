"""Tells what a recipe costs before anything runs: bytes on each GPU, network evaluations, and hours at a measured rate.

All counts come from the code that training runs (count.py). Only the hours are an estimate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from workflows.config.assembly import rounds_of, schedule_of
from workflows.config.loading import load_config
from workflows.config.schema import Distill, RunConfig
from workflows.errors import ConfigError, UserError
from workflows.plan.count import Counted, Training, choices_of, count
from workflows.rendering.screen import short, show_table
from workflows.training.job import JUDGED

GIB = 2**30
RESERVE = 0.1
"""The share of a GPU's memory that is left to CUDA, to the work spaces of its libraries and to fragmentation."""
BENCHES = Path(__file__).resolve().parents[2] / "docs" / "bench"


def plan(
    config: RunConfig, counted: Counted, *, gpus: int, gib: float, bench: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The costs as plain JSON, with hours if `bench` holds a measured rate. Raises UserError if nothing fits, ConfigError if a
    batch has too few images for so many GPUs.
    """
    batches = {"teacher": config.teacher.batch} | {name: own.batch for name, own in sections_of(config).items()}
    for trainings in counted.trainings.values():
        for name, training in trainings.items():
            if batches[name] < gpus * training.halves:
                raise ConfigError(
                    f"--gpus: {gpus} GPUs need a batch of at least {gpus * training.halves}; that of {name} is {batches[name]}"
                )
    memory = {
        choice: _most([_memory(t, name, batches[name], gpus, gib) for name, t in trainings.items()])
        for choice, trainings in counted.trainings.items()
    }
    choices = [choice for choice in memory if choice != "teacher"]
    if not any(memory[choice]["micro_batch"] for choice in choices):
        needs = {c: (memory[c]["fixed_bytes"] + memory[c]["bytes_per_image"]) / GIB / (1 - RESERVE) for c in choices}
        least = min(needs, key=needs.__getitem__)
        line = f"nothing fits in {gib:g} GiB; {least}, the smallest, needs GPUs of {needs[least]:.1f} GiB"
        raise UserError(f"{config.recipe}: {line}")
    evaluations = {
        "teacher": {"training": config.teacher.images * counted.trainings["teacher"]["teacher"].evaluations},
        **{choice: _evaluations(config, counted.trainings[choice]) for choice in choices},
        "evaluate": _evaluate(config),
    }
    figures = {
        "recipe": config.recipe,
        "gpus": gpus,
        "gpu_memory_gib": gib,
        "parameters": counted.parameters,
        "flops_per_forward": counted.flops_per_forward,
        "memory": memory,
        "evaluations": evaluations,
    }
    if bench is not None:
        figures["hours"] = _hours(evaluations, counted.flops_per_forward, gpus, bench)
    return figures


def sections_of(config: RunConfig) -> dict[str, Distill]:
    """Round -> its distill section."""
    rounds = rounds_of(config.distill, schedule_of(config))
    return {one.name: config.distill.for_round(one) for one in rounds}


def _most(columns: list[dict[str, Any]]) -> dict[str, Any]:
    """The round that needs the most memory. Its `rounds` lists all rounds that need the same."""
    most = max(columns, key=lambda c: (c["fixed_bytes"] + (c["micro_batch"] or 1) * c["bytes_per_image"], c["batch"]))
    most = next((c for c in columns if not c["micro_batch"]), most)
    return most | {"rounds": [c["rounds"] for c in columns if c == most | {"rounds": c["rounds"]}]}


def _memory(t: Training, name: str, batch: int, gpus: int, gib: float) -> dict[str, Any]:
    """The memory of a training on the GPU with the largest part of the batch. `micro_batch` is the largest that fits and divides
    that part, or None if not even one image fits.
    """
    part = -(-batch // (gpus * t.halves))

    def fixed_with(micro: int) -> dict[str, int]:
        # Gradients are stored in the buckets in which GPUs exchange them. While they accumulate, the buckets are a second copy.
        return t.fixed | {"buckets between GPUs": t.fixed["gradients"] if gpus > 1 and micro < part else 0}

    def fits(micro: int) -> bool:
        return sum(fixed_with(micro).values()) + micro * t.per_image <= gib * GIB * (1 - RESERVE)

    micro = next((m for m in range(part, 0, -1) if part % m == 0 and fits(m)), None)
    fixed = fixed_with(micro or 1)
    return {
        "rounds": name,
        "bytes": fixed,
        "bytes_per_image": t.per_image,
        "fixed_bytes": sum(fixed.values()),
        "batch": batch,
        "updates": t.updates,
        "evaluations_per_image": t.evaluations,
        "micro_batch": micro,
        "accumulate": micro and part * t.halves // micro,
        "bytes_in_use": micro and sum(fixed.values()) + micro * t.per_image,
    }


def _evaluations(config: RunConfig, trainings: dict[str, Training]) -> dict[str, float]:
    """Forwards of each round's training and of all validations. Other work counts as the forwards with as many FLOPs."""
    from mmdistill_core.samplers.samplers import evaluations

    sections, validation = sections_of(config), 0.0
    for one in rounds_of(config.distill, schedule_of(config)):
        own = sections[one.name]
        if own.validate_every:
            # The last state is measured too. At the end, at most two networks are judged on JUDGED draws each.
            times = math.ceil(own.images / own.validate_every) + 2 * JUDGED
            steps = sum(evaluations(one.method.sampler(k).name, k) for k in one.method.validate(one.ks))
            validation += times * own.validate_samples * steps
    of_rounds = {name: own.images * trainings[name].evaluations for name, own in sections.items()}
    return of_rounds | {"validation": validation}


def _evaluate(config: RunConfig) -> dict[str, float]:
    from workflows.stages.evaluate import STRIP, rows_of

    options = config.evaluate
    samplers = {k: one.method.sampler(k) for one in rounds_of(config.distill, schedule_of(config)) for k in one.ks}
    rows = rows_of(config, "", dict.fromkeys(config.distill.k, ""), samplers)
    return {"samples": sum(row.nfe for row in rows) * (options.samples * options.seeds + STRIP)}


def _hours(evaluations: dict[str, dict[str, float]], flops: float, gpus: int, bench: dict[str, Any]) -> dict[str, Any]:
    """Hours at the measured rate: the FLOP/s of a pair of updates, with the network and batch of the bench file."""
    engine = bench["engine"]
    rate = engine["flops_per_pair"] / engine["seconds_per_pair"]["engine"]
    return {
        "device": bench["machine"]["device"],
        "measured_with": bench["recipe"],
        "measured_flops_per_second": rate,
        "measured_flops_per_forward": engine["flops_per_forward"],
        "scaled_by": flops / engine["flops_per_forward"],
        "of": {
            name: {what: n * flops / rate / gpus / 3600 for what, n in of.items()} for name, of in evaluations.items()
        },
    }


def read_bench(path: Path | None) -> dict[str, Any] | None:
    """The figures that `mmdistill bench --out` wrote to `path`; by default those in docs/bench for this machine's GPU, or None.

    Raises ConfigError if `path` does not hold such figures.
    """
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    for file in [path] if path else sorted(BENCHES.glob("*.json")):
        try:
            figures = json.loads(file.read_text())
            found = figures["machine"]["device"]
            figures["engine"]["flops_per_pair"], figures["engine"]["seconds_per_pair"]["engine"], figures["recipe"]
        except (OSError, ValueError, KeyError, TypeError):
            if path:
                raise ConfigError(f"--bench: {file} is not what `mmdistill bench engine --out FILE` writes") from None
            continue
        if path or found == device:
            return dict(figures)
    return None


def run_plan(
    recipe: str,
    *,
    overrides: list[str] | None,
    gpus: int,
    gib: float,
    only: Sequence[str],
    bench: Path | None,
    as_json: bool,
) -> None:
    """Prints the plan of a recipe, as a table or as JSON. Raises ConfigError and UserError."""
    measured, config = read_bench(bench), load_config(recipe, overrides)
    for choice in only:
        if choice not in (known := choices_of(config)):
            raise ConfigError(f"--only: {choice!r} is not one of {', '.join(known)}")
    figures = plan(config, count(config, only or None), gpus=gpus, gib=gib, bench=measured)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    console = Console(highlight=False)
    show_table(console, table(figures))
    for line in notes(figures):
        console.print(f"[dim]{line}[/]", soft_wrap=True)


def table(figures: dict[str, Any]) -> Table:
    """A table with a column for the teacher's training and one for each choice."""
    memory, evaluations, gpus = figures["memory"], figures["evaluations"], figures["gpus"]
    each = f"{gpus} GPU{'s' * (gpus > 1)} of {figures['gpu_memory_gib']:g} GiB"
    title = f"{figures['recipe']}: {figures['parameters'] / 1e6:,.1f} M parameters, {each}"
    out = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    out.add_column("")
    for name in memory:
        out.add_column(name, justify="right")

    def row(name: str, *cells: str, last: bool = False) -> None:
        out.add_row(name, *cells, end_section=last)

    columns = list(memory.values())
    for kind in columns[0]["bytes"]:
        if any(c["bytes"][kind] for c in columns):
            row(f"{kind}, GiB", *(_gib(c["bytes"][kind]) for c in columns))
    row("an image in flight, MiB", *(f"{c['bytes_per_image'] / 2**20:,.1f}" for c in columns), last=True)
    row("global batch", *(f"{c['batch']:,}" for c in columns))
    row("images at once on a GPU", *(str(c["micro_batch"] or "does not fit") for c in columns))
    row("times accumulated", *(str(c["accumulate"] or "") for c in columns))
    row("then in use, GiB", *(_gib(c["bytes_in_use"]) for c in columns), last=True)
    row("updates in 1,000 steps", *(f"{1000 * c['updates']:,.0f}" for c in columns))
    row("forwards for an image", *(f"{c['evaluations_per_image']:.2f}" for c in columns), last=True)

    def each_training(what: str, of: dict[str, dict[str, float]], shown: Callable[[float], str]) -> None:
        kinds = list(dict.fromkeys(kind for name in memory for kind in of[name]))
        for kind in kinds:
            cells = (shown(of[name][kind]) if kind in of[name] else "" for name in memory)
            row(f"{what}: {kind}", *cells, last=kind == kinds[-1])

    each_training("forwards", evaluations, short)
    if hours := figures.get("hours"):
        each_training("hours", hours["of"], _hours_cell)
    return out


def notes(figures: dict[str, Any]) -> list[str]:
    """The lines below the table."""
    samples, forward = figures["evaluations"]["evaluate"]["samples"], figures["flops_per_forward"] / 1e9
    out = [
        f"A forward of one image: {forward:,.3g} GFLOP. A backward counts as the forwards that have as many operations. "
        f"Evaluate: {short(samples)} forwards. {RESERVE:.0%} of the memory is left free; float32 throughout."
    ]
    for name, column in figures["memory"].items():
        if name != "teacher" and set(column["rounds"]) != set(figures["evaluations"][name]) - {"validation"}:
            few = ", ".join(column["rounds"])
            out.append(
                f"Memory and batch of {name} are those of {few}, which needs the most; the others have options of their own."
            )
    if hours := figures.get("hours"):
        out.append(
            f"Hours: scaled, not measured. {hours['measured_flops_per_second'] / 1e9:,.3g} GFLOP/s on {hours['device']}, measured "
            f"with the recipe {hours['measured_with']} whose forward is {1 / hours['scaled_by']:.3g} of this one's, times "
            f"{figures['gpus']} as if nothing were lost between GPUs. Evaluate: {_hours_cell(hours['of']['evaluate']['samples'])}."
        )
    else:
        out.append(
            "Hours: no rate was measured on this machine's GPU; --bench FILE, of `mmdistill bench engine --out FILE` there."
        )
    return out


def _gib(count: float | None) -> str:
    return "" if count is None else f"{count / GIB:,.2f}"


def _hours_cell(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{60 * hours:.1f} min"
