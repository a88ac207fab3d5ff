"""`mmdistill bench`: runs the parts by name, and prints the table of their figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.data import bench_data
from benchmarks.engine import bench_engine, joint
from benchmarks.memory import bench_memory
from benchmarks.ray_share import bench_ray
from benchmarks.sampler import bench_sampler
from benchmarks.scaling import bench_scaling
from benchmarks.start import bench_start
from benchmarks.tracking import bench_tracking
from workflows.config.loading import load_config
from workflows.errors import ConfigError
from workflows.rendering.screen import show_table

PARTS = ("engine", "sampler", "start", "ray", "scaling", "tracking", "memory", "data")


def run_bench(
    what: str, *, recipe: str, repeats: int, out: Path | None, place: str | None = None, workers: str = "1,2"
) -> None:
    """Prints the figures of a part or of all, and writes them to `out` as JSON. `place` (s3://BUCKET/PREFIX) is for data read from
    there. Raises ConfigError for an unknown part or bad `workers`.
    """
    if what not in (*PARTS, "all"):
        raise ConfigError(f"bench: {what!r} is not one of {', '.join(PARTS)}, all")
    try:
        numbers = tuple(sorted(int(n) for n in workers.split(",")))
    except ValueError:
        raise ConfigError(f"--workers: {workers!r} should be numbers, such as 1,2") from None
    config, console = load_config(recipe), Console(stderr=True, highlight=False)
    if config.data.source == "folder" and config.data.path is None:
        config = load_config(recipe, ["data.source=made"])  # costs do not depend on what the images show
    processes = max(3, repeats // 5)
    with console.status("measuring") as status:

        def say(text: str) -> None:
            status.update(f"measuring: {text}")

        measure: dict[str, Callable[..., dict[str, Any]]] = {
            "engine": bench_engine,
            "sampler": bench_sampler,
            "start": lambda config, _: bench_start(config, processes),
            "ray": bench_ray,
            "scaling": lambda config, _: bench_scaling(joint(config), processes, workers=numbers),
            "tracking": bench_tracking,
            "memory": lambda config, _: bench_memory(config, processes),
            "data": lambda config, repeats: bench_data(config, repeats, place=place, say=say),
        }
        figures: dict[str, Any] = {"machine": machine(), "recipe": config.recipe, "rounds": repeats}
        for part in PARTS if what == "all" else (what,):
            say(part)
            figures[part] = measure[part](config, repeats)
    show_table(console, _table(figures))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + "\n")
        console.print(f"written to {out}")


def machine() -> dict[str, Any]:
    import os

    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": name, "cores": os.cpu_count(), "torch": torch.__version__, "threads": 1}


def _table(figures: dict[str, Any]) -> Table:
    table = Table(header_style="bold")
    for name in ("what", "measured", "target"):
        table.add_column(name)
    if e := figures.get("engine"):
        table.add_row("a pair of updates", f"{1000 * e['seconds_per_pair']['engine']:.1f} ms", "")
        table.add_row("  over its floor", f"{e['engine_over_floor']:.3f}", f"{e['target']:.2f}")
        table.add_row("  over floor and optimisers", f"{e['engine_over_floor_and_optimisers']:.3f}", "")
    if s := figures.get("sampler"):
        for name, rate in s["samples_per_second"].items():
            table.add_row(f"samples/s at k = {s['k']}, {name}", f"{rate:,.0f}", "")
        table.add_row("  mmdistill / diffusers", f"{s['mmdistill_over_diffusers']:.2f}", "")
    if b := figures.get("start"):
        for name, title in (
            ("to_the_first_update", "from the command to the first update"),
            ("to_a_further_training", "to that of a further training"),
            ("to_the_end", "a whole smoke run"),
            ("cpu_seconds", "  CPU seconds, of all processes"),
            ("cpu_to_the_first_update", "  of these to the first update"),
        ):
            goal = f"{b['targets'][name]:.0f} s" if name in b["targets"] else ""
            table.add_row(title, f"{b[name]['median']:.1f} s", goal)
    if r := figures.get("ray"):
        table.add_row("under Ray, over the floor", f"{r['ray_over_floor']:.3f}", f"{r['target']:.2f}")
        table.add_row("  lost to data", f"{r['share_of_data']:.2%}", "")
        table.add_row("  lost to checkpoints", f"{r['share_of_checkpoints']:.2%}", "")
        table.add_row("  seconds to start a training", f"{r['seconds_to_start']:.1f}", "")
    if c := figures.get("scaling"):
        for batch, numbers in c["batches"].items():
            for n, of in ((n, of) for n, of in numbers.items() if n != "1"):
                rate = of["images_per_second"]
                table.add_row(f"batch {batch}: images/s, one worker", f"{rate['alone']:,.0f}", "")
                table.add_row(f"  {n} workers", f"{rate['joined']:,.0f}", "")
                table.add_row(f"  over {n} times one", f"{of['efficiency']:.2f}", f"{c['target']:.2f}")
                table.add_row("  if they did not exchange a word", f"{of['of_the_machine']:.2f}", "")
        point = c["checkpoint"]
        table.add_row("training / the engine in a bare loop", f"{c['trained'] / c['bare_process']:.2f}", "")
        for n, seconds in c["seconds_to_first_step"].items():
            table.add_row(f"to the first update, workers: {n}", f"{seconds:.1f} s", "")
        table.add_row("a checkpoint, of its interval", f"{point['share']:.2%}", f"{point['target']:.0%}")
        table.add_row(
            "from a kill to the next update", f"{c['recovery']['seconds']:.1f} s", f"{c['recovery']['target']} s"
        )
    for way, share in figures.get("tracking", {}).get("share_of_logging", {}).items():
        goal = f"{figures['tracking']['target']:.1%}" if way.endswith("outbox") else ""
        table.add_row(f"a row logged every update, {way}", f"{share:.2%}", goal)
    for update, m in figures.get("memory", {}).get("updates", {}).items():
        held = f"{m['bytes'] / 2**20:,.0f} MiB, {m['copies']:.1f} copies of the weights; {m['networks']} networks"
        table.add_row(f"memory, {update}", held, "")
    if d := figures.get("data"):
        for name, row in d["readers"].items():
            target = d["targets"].get(name)
            rate = f"{row['images_per_second']:,.0f}, {d['over_fastest_peer'][name]:.2f} of the fastest peer"
            table.add_row(f"images/s, {name}", rate, f"{target:.1f}" if target else "")
        for kind, share in d["share_of_an_update_that_waits"].items():
            table.add_row(f"an update waits for {kind}", f"{share:.2%}", f"{d['target_of_waiting']:.0%}")
    return table
