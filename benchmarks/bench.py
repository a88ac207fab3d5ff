"""bench: what an update costs against its floor, the sampler against diffusers, the share of Ray and of data.

All ratios are of medians over rounds within which the systems take turns, so that a machine whose speed drifts is fair to all.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.data import bench_data
from benchmarks.memory import bench_memory
from benchmarks.scaling import bench_scaling
from benchmarks.start import bench_start
from benchmarks.tracking import bench_tracking
from workflows.config.schema import ConfigError, RunConfig, load_config
from workflows.dataset.sources import Source, source_of
from workflows.errors import UserError
from workflows.plan.count import pair_flops
from workflows.rendering.screen import show_table

PARTS = ("engine", "sampler", "start", "ray", "scaling", "tracking", "memory", "data")
STEPS, K = 10, 8
"""Updates timed together in a round."""


def run_bench(
    what: str, *, recipe: str, repeats: int, out: Path | None, place: str | None = None, workers: str = "1,2"
) -> None:
    """Prints the figures, and writes them to `out` as JSON. `place`: s3://BUCKET/PREFIX, for data read from there."""
    if what not in (*PARTS, "all"):
        raise ConfigError(f"bench: {what!r} is not one of {', '.join(PARTS)}, all")
    try:
        numbers = tuple(sorted(int(n) for n in workers.split(",")))
    except ValueError:
        raise ConfigError(f"--workers: {workers!r} should be numbers, such as 1,2") from None
    config, console = load_config(recipe), Console(stderr=True, highlight=False)
    if config.data.source == "folder" and config.data.path is None:
        config = load_config(recipe, ["data.source=made"])  # costs do not depend on what the images show
    measure: dict[str, Callable[..., dict[str, Any]]] = {
        "engine": bench_engine,
        "sampler": bench_sampler,
        "start": lambda config, repeats: bench_start(config, max(3, repeats // 5)),
        "ray": bench_ray,
        "scaling": lambda config, repeats: bench_scaling(_joint(config), max(3, repeats // 5), workers=numbers),
        "tracking": bench_tracking,
        "memory": bench_memory,
    }
    figures: dict[str, Any] = {"machine": machine(), "recipe": config.recipe, "rounds": repeats}
    for part in PARTS if what == "all" else (what,):
        with console.status(f"measuring: {part}") as status:
            if part == "data":
                figures[part] = bench_data(
                    config, repeats, place=place, say=lambda text: status.update(f"measuring: {text}")
                )
            else:
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


def interleaved(systems: dict[str, Callable[[], None]], *, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each system: median, least and most over the rounds, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, call in systems.items():
            began = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in seconds.items()
    }


def ratio(times: dict[str, dict[str, float]], over: str, under: str) -> float:
    return times[over]["median"] / times[under]["median"]


def job_of(config: RunConfig, folder: Path, k: int) -> Any:
    """A distillation as the recipe has it, from an untrained teacher in `folder`: costs do not depend on the weights."""
    from mmdistill_core.artifact import DiffusionModel, build_denoiser, save_model
    from mmdistill_core.networks.dit import DiTConfig
    from workflows.stages.distill import ARGUMENTS, optimiser_options
    from workflows.training.job import Job

    source = source_of(config.data)
    network: dict[str, Any] = {
        "image_size": source.shape[1],
        "channels": source.shape[0],
        "num_classes": source.num_classes,
    }
    network |= config.network.model_dump()
    schedule = config.schedule.as_dict()
    denoiser = build_denoiser(network=DiTConfig(**network), prediction=config.prediction, schedule=schedule)
    save_model(folder / "teacher", DiffusionModel(denoiser, k=256))
    own = config.distill.for_k(k)
    return Job(
        name="bench",
        output=str(folder / "student"),
        storage=str(folder / "ray"),
        data=str(folder / "data"),
        seed=0,
        method=own.method,
        arguments={"k": k} | {name: getattr(own, name) for name in ARGUMENTS},
        networks={"teacher": str(folder / "teacher")},
        network=network,
        schedule=schedule,
        prediction=config.prediction,
        options=optimiser_options(own),
        images=10**12,
        batch=own.batch,
        log_every=own.log_every,
        checkpoint_every=own.checkpoint_every,
        best_role="student",
        k=k,
    )


def floor_of(state: Any, batches: Any) -> Callable[[], None]:
    """STEPS bare pairs of updates: the same three forwards and two backward passes, and nothing else: no noise, no
    transition, no optimiser, no clipping, no logs.
    """
    import torch

    batch = batches(0)
    t = torch.rand(len(batch), device=batch.x.device)
    student, teacher, auxiliary = (state.networks[name] for name in ("student", "teacher", "auxiliary"))

    def run() -> None:
        for _ in range(STEPS):
            x_tilde = student(batch.x, t, batch.label)
            with torch.no_grad():
                teacher(batch.x, t, batch.label)
            (x_tilde.mean() + auxiliary(batch.x, t, batch.label).mean()).backward()

    return run


def engine_of(state: Any, batches: Any) -> Callable[[], None]:
    """STEPS pairs of updates as training makes them, the log window included."""
    from mmdistill_core.engine.fit import LogWindow
    from mmdistill_core.engine.step import train_step

    def run() -> None:
        window = LogWindow()
        for _ in range(STEPS):
            for log in train_step(state=state, batches=batches, seed=0):
                window.add(log)
        window.flush(state.averaged_over_workers)

    return run


def optimisers_of(state: Any) -> Callable[[], None]:
    """STEPS clips and optimiser steps of both networks, on the gradients that are there."""
    from torch import nn

    def run() -> None:
        for _ in range(STEPS):
            for role, optimiser in state.optimisers.items():
                nn.utils.clip_grad_norm_(state.networks[role].parameters(), 1.0)
                optimiser.step()

    return run


def bench_engine(config: RunConfig, repeats: int) -> dict[str, Any]:
    import torch

    from workflows.training.job import build_state

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        state = build_state(job_of(_joint(config), Path(scratch), k=K))
    batches = batches_of(config)
    systems = {
        "floor": floor_of(state, batches),
        "engine": engine_of(state, batches),
        "optimisers": optimisers_of(state),
    }
    times = interleaved(systems, rounds=repeats)
    forward, pair = pair_flops(config, K)
    return {
        "seconds_per_pair": {name: t["median"] / STEPS for name, t in times.items()},
        "flops_per_forward": forward,
        "flops_per_pair": pair,
        "engine_over_floor": ratio(times, "engine", "floor"),
        "engine_over_floor_and_optimisers": times["engine"]["median"]
        / (times["floor"]["median"] + times["optimisers"]["median"]),
        "target": 1.05,
        "rounds": times,
    }


def _joint(config: RunConfig) -> RunConfig:
    """The update whose floor is measured."""
    return config.model_copy(update={"distill": config.distill.model_copy(update={"update": "joint"})})


def bench_sampler(config: RunConfig, repeats: int) -> dict[str, Any]:
    """Samples/s at k = 8 against diffusers' DDPMPipeline around the very same network."""
    import torch

    from mmdistill_core.artifact import load_model

    try:
        from diffusers import DDPMPipeline, DDPMScheduler
    except ImportError:
        raise UserError("diffusers is not installed", hint="pip install 'mmdistill[diffusers]'") from None

    torch.set_num_threads(1)
    k, n = 8, 256
    with tempfile.TemporaryDirectory() as scratch:
        job = job_of(config, Path(scratch), k=k)
        model = load_model(Path(scratch) / "teacher")
    label = torch.arange(n) % max(1, job.network["num_classes"])
    pipeline: Any = DDPMPipeline(unet=_as_unet(model, label), scheduler=DDPMScheduler(prediction_type="v_prediction"))
    pipeline.set_progress_bar_config(disable=True)
    systems = {
        "mmdistill": lambda: model.sample(n, label=label, k=k, batch=n),
        "diffusers": lambda: pipeline(batch_size=n, num_inference_steps=k, output_type="np"),
    }
    times = interleaved(systems, rounds=repeats)
    return {
        "k": k,
        "samples_per_second": {name: n / t["median"] for name, t in times.items()},
        "mmdistill_over_diffusers": ratio(times, "diffusers", "mmdistill"),
        "rounds": times,
    }


def _as_unet(model: Any, label: Any) -> Any:
    """The house network with the face of a UNet2DModel, for DDPMPipeline."""
    from types import SimpleNamespace

    import torch
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

    class HouseUNet(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, sample_size: int, in_channels: int) -> None:
            super().__init__()
            self.backbone = model.denoiser.backbone

        def forward(self, z: torch.Tensor, step: torch.Tensor) -> Any:
            t = (step.float() / 1000).expand(len(z))
            return SimpleNamespace(sample=self.backbone(z, t, label))

    return HouseUNet(sample_size=model.network.image_size, in_channels=model.network.channels).eval()


def ray_loop(config: dict[str, Any], rounds: int) -> dict[str, Any]:
    """On a Ray Train worker: training as it is, with the images of a data set and reports to the driver, against the floor."""
    from mmdistill_core.engine import fit
    from workflows.training.worker import set_up

    began = time.perf_counter()
    t = set_up(config)
    ready = time.perf_counter() - began
    floor, batch = floor_of(t.state, t.batches), t.job.batch

    def train() -> None:
        t.state.total_images = t.state.n_images + STEPS * batch
        fit(
            state=t.state,
            batches=t.batches,
            options=replace(t.options, checkpoint_every=0),
            report=t.report,
            asked=t.asked,
        )

    def data() -> None:
        for i in range(STEPS):
            t.batches(t.state.n_images + i * batch)

    times = interleaved({"floor": floor, "train": train, "data": data}, rounds=rounds)
    saves = []
    for _ in range(3):
        t.checkpoints.settle()
        began = time.perf_counter()
        t.save(t.state)
        saves.append(time.perf_counter() - began)
    return {"set_up": ready, "times": times, "checkpoint": statistics.median(saves)}


def loaded(source: Source) -> tuple[Any, Any]:
    """Images [n, c, h, w] in [0, 1] and labels [n] of a source that is no data set yet."""
    if source.load is None:
        raise UserError("bench: takes the images of a recipe's own source, such as digits, and no data set")
    return source.load(print)


def batches_of(config: RunConfig) -> Any:
    """The batches that a student of K steps is trained on."""
    import torch

    from mmdistill_core.engine import InMemoryBatches

    images, labels = loaded(source_of(config.data))
    return InMemoryBatches(
        x=torch.from_numpy(images).float() * 2 - 1,
        label=torch.from_numpy(labels),
        global_batch=config.distill.for_k(K).batch,
        seed=0,
    )


def bench_ray(config: RunConfig, repeats: int) -> dict[str, Any]:
    from workflows.cluster.session import Monitor, Workers, ray_session
    from workflows.dataset.shards import write_shards
    from workflows.training.crew import train

    source = source_of(config.data)
    images, labels = loaded(source)
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        folder = Path(scratch)
        job = job_of(_joint(config), folder, k=K)
        write_shards(folder / "data", source="bench", images=images, labels=labels, num_classes=source.num_classes,
                     holdout=0.2, rows=512)  # fmt: skip
        began = time.perf_counter()
        found = train(
            job,
            mailbox=Monitor().actor,
            workers=Workers(1, 1),
            use_gpu=False,
            loop=lambda settings: ray_loop(settings, repeats),
        )
        whole = time.perf_counter() - began
    times, per_checkpoint = found["times"], config.distill.checkpoint_every / config.distill.batch
    train_per_pair = times["train"]["median"] / STEPS + found["checkpoint"] / per_checkpoint
    floor_per_pair = times["floor"]["median"] / STEPS
    return {
        "seconds_per_pair": {"floor": floor_per_pair, "under Ray": train_per_pair},
        "ray_over_floor": train_per_pair / floor_per_pair,
        "target": 1.10,
        "share_of_data": times["data"]["median"] / STEPS / train_per_pair,
        "share_of_checkpoints": found["checkpoint"] / per_checkpoint / train_per_pair,
        "seconds_per_checkpoint": found["checkpoint"],
        "seconds_to_start": whole - sum(t["median"] * (repeats + 1) for t in times.values()) - 3 * found["checkpoint"],
        "rounds": times,
    }


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
        for name, said in (
            ("to_the_first_update", "from the command to the first update"),
            ("to_a_further_training", "to that of a further training"),
            ("to_the_end", "a whole smoke run"),
            ("cpu_seconds", "  CPU seconds, of all processes"),
            ("cpu_to_the_first_update", "  of these to the first update"),
        ):
            goal = f"{b['targets'][name]:.0f} s" if name in b["targets"] else ""
            table.add_row(said, f"{b[name]['median']:.1f} s", goal)
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
