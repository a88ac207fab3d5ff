"""plan: what a recipe costs before anything runs: bytes on each GPU, network evaluations, and hours at a measured rate.

All counts are of the code that training runs (plan_count.py); only the hours are an estimate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from workflows.config.schema import ConfigError, RunConfig, load_config
from workflows.errors import UserError
from workflows.plan.count import UPDATES, Counted, Training, count
from workflows.rendering.screen import short, show_table
from workflows.training.job import JUDGED

GIB = 2**30
RESERVE = 0.1
"""The share of a GPU's memory that is left to CUDA, to its libraries' work spaces and to fragments."""
BENCHES = Path(__file__).resolve().parents[2] / "docs" / "bench"


def plan(
    config: RunConfig, counted: Counted, *, gpus: int, gib: float, bench: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Plain JSON. Raises UserError when no update fits, ConfigError when there are more GPUs than a batch has images for."""
    batches = {0: config.teacher.batch} | {k: config.distill.for_k(k).batch for k in config.distill.k}
    for trainings in counted.trainings.values():
        for k, training in trainings.items():
            if batches[k] < gpus * training.halves:
                of = f"k = {k}" if k else "teacher"
                raise ConfigError(
                    f"--gpus: {gpus} is more than the batch {batches[k]} of {of} has images for, {training.halves} each"
                )
    memory = {
        name: _most([_memory(t, k, batches[k], gpus, gib) for k, t in trainings.items()])
        for name, trainings in counted.trainings.items()
    }
    updates = [name for name in memory if name != "teacher"]
    if not any(memory[update]["micro_batch"] for update in updates):
        needs = {u: (memory[u]["fixed_bytes"] + memory[u]["bytes_per_image"]) / GIB / (1 - RESERVE) for u in updates}
        least = min(needs, key=needs.__getitem__)
        line = f"nothing fits in {gib:g} GiB; {least}, the smallest, needs GPUs of {needs[least]:.1f} GiB"
        raise UserError(f"{config.recipe}: {line}")
    evaluations = {
        "teacher": {"training": config.teacher.images * counted.trainings["teacher"][0].evaluations},
        **{update: _evaluations(config, counted.trainings[update]) for update in updates},
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


def _most(columns: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the students of several k, the one that needs the most memory; `k` then has those that need the same."""
    most = max(columns, key=lambda c: (c["fixed_bytes"] + (c["micro_batch"] or 1) * c["bytes_per_image"], c["batch"]))
    most = next((c for c in columns if not c["micro_batch"]), most)
    return most | {"k": [c["k"] for c in columns if c == most | {"k": c["k"]}]}


def _memory(t: Training, k: int, batch: int, gpus: int, gib: float) -> dict[str, Any]:
    """The largest micro-batch that fits and divides a GPU's part of the batch, of the GPU with the largest; None if not even one
    image does.
    """
    # Between GPUs gradients travel in buckets, which are a copy of them.
    fixed = t.fixed | {"buckets between GPUs": t.fixed["gradients"] if gpus > 1 else 0}
    free, part = gib * GIB * (1 - RESERVE) - sum(fixed.values()), -(-batch // (gpus * t.halves))
    micro = next((m for m in range(part, 0, -1) if part % m == 0 and m * t.per_image <= free), None)
    return {
        "k": k,
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


def _evaluations(config: RunConfig, trainings: dict[int, Training]) -> dict[str, float]:
    """Of each student's training, and of all their validations: forwards, or as many operations."""
    sections = {k: config.distill.for_k(k) for k in config.distill.k}
    # The last state is measured too, and at most two networks are judged at the end.
    measured = {
        k: math.ceil(own.images / own.validate_every) + 2 * JUDGED if own.validate_every else 0
        for k, own in sections.items()
    }
    return {f"k={k}": own.images * trainings[k].evaluations for k, own in sections.items()} | {
        "validation": sum(measured[k] * own.validate_samples * k for k, own in sections.items())
    }


def _evaluate(config: RunConfig) -> dict[str, float]:
    from workflows.stages.evaluate import STRIP, rows_of

    options = config.evaluate
    rows = rows_of(config, "", dict.fromkeys(config.distill.k, ""))
    return {"samples": sum(row.nfe for row in rows) * (options.samples * options.seeds + STRIP)}


def _hours(evaluations: dict[str, dict[str, float]], flops: float, gpus: int, bench: dict[str, Any]) -> dict[str, Any]:
    """At the operations a second of the measured pair of updates, whose network and batch the bench file tells."""
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
    """The figures of `mmdistill bench --out`; by default those in docs/bench of this machine's GPU, if there are any.

    Raises ConfigError for a file that does not hold them.
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
    updates: Sequence[str],
    bench: Path | None,
    as_json: bool,
) -> None:
    for update in updates:
        if update not in UPDATES:
            raise ConfigError(f"--update: {update!r} is not one of {', '.join(UPDATES)}")
    measured, config = read_bench(bench), load_config(recipe, overrides)
    figures = plan(config, count(config, updates or UPDATES), gpus=gpus, gib=gib, bench=measured)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    console = Console(highlight=False)
    show_table(console, table(figures))
    for line in notes(figures):
        console.print(f"[dim]{line}[/]", soft_wrap=True)


def table(figures: dict[str, Any]) -> Table:
    """A column for the teacher's training and for each update."""
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
    """What the table can't say."""
    samples, forward = figures["evaluations"]["evaluate"]["samples"], figures["flops_per_forward"] / 1e9
    out = [
        f"A forward of one image: {forward:,.3g} GFLOP. A backward counts as the forwards that have as many operations. "
        f"Evaluate: {short(samples)} forwards. {RESERVE:.0%} of the memory is left free; float32 throughout."
    ]
    for name, column in figures["memory"].items():
        if name != "teacher" and set(column["k"]) != {
            int(what[2:]) for what in figures["evaluations"][name] if "=" in what
        }:
            few = ", ".join(map(str, column["k"]))
            out.append(
                f"Memory and batch of {name} are those of k = {few}, which needs the most; the others have options of their own."
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
