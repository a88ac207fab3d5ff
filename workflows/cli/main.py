"""The command line: `mmdistill COMMAND ...` or `python -m workflows COMMAND ...`. Heavy libraries are imported only when needed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import typer
from typer import Argument, Option

from workflows.cli.jobs import app as submission
from workflows.cli.jobs import jobs
from workflows.cli.options import (
    DEFAULT_WORKSPACE,
    Recipe,
    Set,
    Smoke,
    Tracking,
    TrackingWait,
    Workspace_,
    checked,
    command,
    finite,
    say,
)
from workflows.cli.registry import app as registry
from workflows.cli.sweep import app as sweeps

USAGE: Any = typer.BadParameter.__base__
"""A usage error, such as an unknown option or a malformed number."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Few-step diffusion students by moment matching: train a teacher, distill it, measure, register, report.",
)


@app.callback()
def _options(
    s3_endpoint_url: str | None = Option(None, help="URL of an S3 server other than AWS; default: AWS_ENDPOINT_URL."),
    s3_region: str | None = Option(None, help="Region of the S3 server; default: AWS_REGION."),
    s3_path_style: bool | None = Option(
        None, "--s3-path-style/--s3-virtual-style", help="Address buckets by path or by host name; default: tries both."
    ),
    s3_ca: str | None = Option(None, help="File with the CA of the S3 server's certificate."),
) -> None:
    addressing = None if s3_path_style is None else "path" if s3_path_style else "virtual"
    given = {
        "AWS_ENDPOINT_URL": s3_endpoint_url,
        "AWS_REGION": s3_region,
        "AWS_CA_BUNDLE": s3_ca,
        "MMDISTILL_S3_ADDRESSING": addressing,
    }
    os.environ.update({name: value for name, value in given.items() if value})


@command(app, continues=True)
def run(
    recipe: Recipe = "digits",
    set_: Set = None,
    smoke: Smoke = False,
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    tracking_uri: Tracking = None,
    tracking_wait: TrackingWait = None,
    teacher: str | None = Option(None, help="Teacher to distil, with --data, in place of a recipe: as for init."),
    data: str | None = Option(None, help="Images for --teacher: a folder, dataset://..., or the name of a source."),
    workers: str | None = Option(
        None, help="Workers of each training, or fewest:most such as 2:8; default: as many as fit now."
    ),
    checkpoint_every: str | None = Option(
        None, help="Images, or minutes such as 10m; default: the recipe's images, or 15 minutes."
    ),
    at_once: int | None = Option(None, help="Students trained at once; default: as many as fit now.", min=1),
    gpu: bool | None = Option(None, "--gpu/--no-gpu", help="Use GPUs or not; default: use them if there are any."),
    force: list[str] | None = Option(None, help="Redo this stage; may be repeated."),
    until: str = Option("report", help="Stop after this stage."),
    trainings: int = Option(1, help="Repeat the run with so many seeds, for means and spreads over trainings.", min=1),
    as_json: bool = Option(False, "--json", help="Print the summary as JSON."),
) -> None:
    """Turn images into few-step students: prepare, teacher, distill, evaluate, register, report.

    Finished stages are reused; an interrupted run continues where it stopped.
    """
    from workflows.config.loading import load_config
    from workflows.errors import ConfigError
    from workflows.pipeline.run import check_options, run_pipeline
    from workflows.rendering.screen import Screen
    from workflows.session.options import RunOptions

    if teacher or data:
        from workflows.tools.init import recipe_of_command

        recipe = str(recipe_of_command(workspace, teacher, data))
    config = load_config(recipe, set_, smoke=smoke)
    options = RunOptions(
        workspace=workspace,
        tracking_uri=tracking_uri,
        tracking_wait=tracking_wait,
        workers=workers,
        checkpoint_every=checkpoint_every,
        at_once=at_once,
        gpu=gpu,
        force=tuple(force or ()),
        until=until,
    )
    check_options(config, options)
    checked(config)
    screen = Screen()
    if smoke:
        images = "made images, as no data.path is given" if config.data.source == "made" else config.data.source
        screen.line(
            f"[yellow]smoke[/]  three training steps a stage, on {images}: this shows that it runs, not how well"
        )
    if trainings > 1:
        from workflows.pipeline.trainings import run_trainings, show

        if until != "report":
            raise ConfigError("--trainings: compares finished runs; leave out --until")
        summary = run_trainings(config, options, screen, trainings=trainings)
    else:
        summary = run_pipeline(config, options, screen)
    if as_json:
        print(json.dumps(summary, indent=2))
    elif trainings > 1:
        show(summary, screen)
    elif "students" in summary:
        from workflows.stages.report import last_screen

        last_screen(summary, screen, workspace, tracking_uri)


@command(app)
def init(
    file: Path = Argument(..., help="New .yaml file for the recipe."),
    teacher: str = Option(..., help="Teacher: a folder or s3://... of diffusers or of mmdistill."),
    data: str = Option(..., help="Images: a folder, dataset://..., or the name of a source."),
) -> None:
    """Write a recipe that distils a teacher of yours on images of yours."""
    from workflows.tools.init import write_recipe

    print(write_recipe(file, teacher, data))


@command(app, continues=True)
def prepare(
    source: str = Argument(
        ..., help="Folder or s3://BUCKET/PREFIX of images, zips, Parquet, WebDataset tars, or a Hugging Face data set."
    ),
    dest: str = Argument(..., help="Folder or s3://BUCKET/PREFIX for the data set."),
    size: int = Option(..., help="Side of the images in pixels.", min=1),
    channels: int = Option(3, help="Channels: 3, or 1 for grey."),
    crop: str = Option("center", help="Square to cut out: center, or random (the same in every run)."),
    flip: bool = Option(False, "--flip", help="Add the mirror image of each image."),
    labels: str | None = Option(
        None, help="Labels: none, folders, or a JSON or CSV file; default: those of the source."
    ),
    captions: str | None = Option(None, help="Captions: none, or a file; default: those of the source."),
    label_column: str | None = Option(None, help="Label column of a table, or key in the samples' JSON."),
    image_column: str | None = Option(None, help="Image column of a table."),
    caption_column: str | None = Option(None, help="Caption column of a table, or key in the samples' JSON."),
    encoding: str = Option("png", help="Encoding of the images: png is small, uint8 is fast to read."),
    split: str = Option("train,holdout=0.1", help="Held-out share: train,holdout=0.1, or train for none."),
    limit: int | None = Option(None, help="Maximum number of images.", min=1),
    max_bad: str = Option("1%", help="Share of unreadable or unlabelled images above which the command fails."),
    latents: str | None = Option(None, help="Folder of a diffusers VAE: adds a column with its latents of the images."),
    text_encoder: str | None = Option(
        None, help="Folder of a transformers CLIP or T5 encoder: adds its embeddings of the captions."
    ),
    extractor: str | None = Option(
        None,
        help="Add reference statistics for all runs on the data set: inception, random, pixels, classifier or mixture.",
    ),
    extractor_weights: str | None = Option(None, help="File with the weights of inception."),
    shard_mb: float = Option(64, help="MB of images in a shard, before compression.", min=0.1, callback=finite),
    seed: int = Option(0, help="Seed of random crops.", min=0),
    as_json: bool = Option(False, "--json", help="Print the manifest as JSON, without its shards."),
) -> None:
    """Turn images into a data set for `--set data.source=dataset://DEST`. Run again, it continues where it stopped."""
    from workflows.cluster.session import ray_session
    from workflows.ingest.options import Preparation, parse_share, parse_split
    from workflows.ingest.prepare import prepare_data_set, shown_manifest
    from workflows.rendering.screen import Screen

    preparation = Preparation(
        source=source,
        dest=dest,
        size=size,
        channels=channels,
        crop=crop,  # type: ignore[arg-type]
        flip=flip,
        labels=labels,
        captions=captions,
        label_column=label_column,
        image_column=image_column,
        caption_column=caption_column,
        encoding=encoding,
        holdout=parse_split(split),
        limit=limit,
        max_bad=parse_share("--max-bad", max_bad),
        latents=latents,
        text_encoder=text_encoder,
        extractor=extractor,
        extractor_weights=extractor_weights,
        shard_mb=shard_mb,
        seed=seed,
    )
    checked()
    screen = Screen()
    with ExitStack() as stack:
        with screen.status("starting Ray"):
            stack.enter_context(ray_session())
        manifest = prepare_data_set(preparation, screen)
    if as_json:
        print(json.dumps(shown_manifest(manifest), indent=2))


@command(app)
def config(recipe: Recipe = "digits", set_: Set = None, smoke: Smoke = False) -> None:
    """Print a recipe's resolved configuration as YAML."""
    from workflows.config.loading import load_config

    print(load_config(recipe, set_, smoke=smoke, only_shown=True).yaml(), end="")


@command(app)
def plan(
    recipe: str = Argument("digits", help="Name of a recipe, or a YAML file."),
    set_: Set = None,
    gpus: int = Option(8, help="Number of GPUs, with one worker each.", min=1),
    gpu_memory: float = Option(80, help="Memory of each GPU in GiB.", min=0.1, callback=finite),
    only: list[str] | None = Option(
        None, help="One of the choices that the method compares; may be repeated. Default: all."
    ),
    bench: Path | None = Option(
        None, help="FILE of `mmdistill bench engine --out FILE` on such a GPU, to estimate hours."
    ),
    as_json: bool = Option(False, "--json", help="Print the plan as JSON."),
) -> None:
    """Estimate what a recipe costs: memory, batches that fit, network evaluations, hours. Nothing is run."""
    from workflows.plan.plan import run_plan

    run_plan(recipe, overrides=set_, gpus=gpus, gib=gpu_memory, only=only or [], bench=bench, as_json=as_json)


@app.command()
def recipes() -> None:
    """List the recipes."""
    from workflows.config.loading import RECIPES, recipe_names

    for name in recipe_names():
        first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
        print(f"{name:14} {first.lstrip('# ')}")


@command(app)
def sample(
    model: str = Argument(..., help="Model: models:/NAME/VERSION, models:/NAME@ALIAS, runs:/..., or a model folder."),
    n: int = Option(64, help="Number of images.", min=1),
    labels: str | None = Option(
        None, help="Classes to draw: numbers such as 3,5, or names if the data had names; default: all in turn."
    ),
    seed: int = Option(0, help="Seed. Image i depends on the seed, on i and on its class.", min=0, max=2**63 - 1),
    steps: int | None = Option(None, help="Sampling steps; default: the model's own.", min=1, max=2**24),
    out: str = Option(
        "grid.png", help="Output: a .png for a grid, a .npy for the images, or FOLDER/ for a .png of each."
    ),
    columns: int | None = Option(None, help="Images in a row of the grid.", min=1),
    guidance: float | None = Option(
        None, help="Strength of classifier-free guidance, 0 for none; default: the model's own.", min=0, callback=finite
    ),
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    tracking_uri: Tracking = None,
) -> None:
    """Draw samples from a teacher or a student."""
    from workflows.rendering.screen import Screen
    from workflows.tools.sample import Wanted, draw

    wanted = Wanted(n, labels, seed, steps, columns, guidance)
    print(draw(model, wanted, out=out, workspace=workspace, tracking_uri=tracking_uri, screen=Screen()))


@app.command()
def doctor(
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    tracking_uri: Tracking = None,
    cluster: Path | None = Option(
        None, metavar="FILE", help="Check only this file for `ray up`, before it costs anything."
    ),
) -> None:
    """Check this machine: packages, devices, Ray, the tracking store, the object store."""
    from workflows.tools.doctor import examine

    raise typer.Exit(0 if examine(workspace, tracking_uri, cluster) else 1)


@command(app)
def ui(
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    port: int = Option(5000, help="Port on this machine."),
) -> None:
    """Open MLflow's web page for the workspace's own tracking store, on this machine only."""
    from workflows.storage.workspace import Workspace

    space = Workspace(workspace)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    words = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", space.default_tracking_uri]
    words += ["--default-artifact-root", space.default_artifacts.as_uri()]
    os.execv(sys.executable, [sys.executable, *words])


@command(app)
def bench(
    what: str = Argument(
        "all", help="Benchmark: engine, sampler, start, ray, scaling, tracking, memory, data, or all."
    ),
    recipe: Recipe = "digits",
    repeats: int = Option(15, help="Rounds; the systems take turns in each.", min=3),
    out: Path | None = Option(None, help="File for the figures as JSON."),
    place: str | None = Option(None, help="For data: s3://BUCKET/PREFIX to read from as well."),
    workers: str = Option("1,2", help="For scaling: numbers of workers, each with one thread."),
) -> None:
    """Benchmark this machine: an update against its floor, samples/s against diffusers, Ray's overhead, memory, reading images."""
    checked()
    from workflows.storage.outputs import check_out
    from workflows.tools.checkout import benchmark

    if out:
        check_out(out, str(out))
    benchmark("run").run_bench(what, recipe=recipe, repeats=repeats, out=out, place=place, workers=workers)


app.registered_commands += registry.registered_commands + submission.registered_commands + sweeps.registered_commands
app.add_typer(jobs, name="jobs")


def main(arguments: list[str] | None = None) -> None:
    """The entry point. Usage errors print one line and exit with 2. Characters that a stream can't encode are escaped, as \\xe9."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    program: Callable[..., Any] = app
    try:
        code = program(args=arguments, prog_name="mmdistill", standalone_mode=False)
    except USAGE as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # that one has shown the help
            say(f"error: {error.format_message()}")
            if error.ctx is not None:
                say(f"       {error.ctx.command_path} --help shows the usage")
        code = error.exit_code
    except typer.Abort:  # at a question
        say("aborted")
        code = 1
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
