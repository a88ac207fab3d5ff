"""The command line: `mmdistill STAGE ...`, or `python -m workflows STAGE ...`. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from workflows.cli.jobs import app as submission
from workflows.cli.jobs import jobs
from workflows.cli.options import (
    DEFAULT_WORKSPACE,
    Debug,
    Recipe,
    Set,
    Smoke,
    Tracking,
    TrackingWait,
    Workspace_,
    checked,
    errors,
    finite,
    say,
)
from workflows.cli.registry import app as registry
from workflows.cli.sweep import app as sweeps

USAGE: Any = typer.BadParameter.__base__
"""A command line that can't be: an option that is not there, a number that is none."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Few-step diffusion students by moment matching: train a teacher, distill it, measure, register, report.",
)


@app.callback()
def _options(
    s3_endpoint_url: Annotated[
        str | None, typer.Option(help="An S3 server that is not AWS; else AWS_ENDPOINT_URL.")
    ] = None,
    s3_region: Annotated[str | None, typer.Option(help="Else AWS_REGION.")] = None,
    s3_path_style: Annotated[
        bool | None,
        typer.Option("--s3-path-style/--s3-virtual-style", help="How buckets are named; by default both are tried."),
    ] = None,
    s3_ca: Annotated[str | None, typer.Option(help="File of the CA that signed the server's certificate.")] = None,
) -> None:
    addressing = None if s3_path_style is None else "path" if s3_path_style else "virtual"
    given = {
        "AWS_ENDPOINT_URL": s3_endpoint_url,
        "AWS_REGION": s3_region,
        "AWS_CA_BUNDLE": s3_ca,
        "MMDISTILL_S3_ADDRESSING": addressing,
    }
    os.environ.update({name: value for name, value in given.items() if value})


@app.command()
def run(
    recipe: Recipe = "digits",
    set_: Set = None,
    smoke: Smoke = False,
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    tracking_uri: Tracking = None,
    tracking_wait: TrackingWait = None,
    workers: Annotated[
        str | None,
        typer.Option(
            help="Workers of each training, or fewest:most, as 2:8; by default as many as there is room for now."
        ),
    ] = None,
    checkpoint_every: Annotated[
        str | None,
        typer.Option(help="Images, or minutes such as 10m; by default the recipe's images, or 15 minutes."),
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(help="Students trained at once; by default as many as there is room for now.", min=1)
    ] = None,
    gpu: Annotated[
        bool | None, typer.Option("--gpu/--no-gpu", help="By default GPUs are used if there are any.")
    ] = None,
    force: Annotated[list[str] | None, typer.Option(help="Redo this stage; may be repeated.")] = None,
    until: Annotated[str, typer.Option(help="Stop after this stage.")] = "report",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Images to few-step students: prepare, teacher, distill, evaluate, register, report.

    Finished stages are reused; an interrupted run goes on where it was.
    """
    with errors(debug, continues=True):
        from workflows.config.schema import load_config
        from workflows.pipeline.run import RunOptions, check_options, run_pipeline
        from workflows.rendering.screen import Screen

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
        summary = run_pipeline(config, options, screen)
        if as_json:
            print(json.dumps(summary, indent=2))
        elif "students" in summary:
            from workflows.stages.report import last_screen

            last_screen(summary, screen, workspace, tracking_uri)


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or s3://BUCKET/PREFIX of images, zips, Parquet, WebDataset tars, or Hugging Face's."
        ),
    ],
    dest: Annotated[str, typer.Argument(help="Folder or s3://BUCKET/PREFIX of the data set.")],
    size: Annotated[int, typer.Option(help="Pixels of a side.", min=1)],
    channels: Annotated[int, typer.Option(help="3, or 1 for grey.")] = 3,
    crop: Annotated[str, typer.Option(help="center, or random (the same at every run).")] = "center",
    flip: Annotated[bool, typer.Option("--flip", help="Add the mirror image of each.")] = False,
    labels: Annotated[
        str | None, typer.Option(help="none, folders, or a JSON or CSV file; by default what the source brings.")
    ] = None,
    captions: Annotated[str | None, typer.Option(help="none, or a file; by default what the source brings.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Of a table or of samples' JSON.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Of a table.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Of a table or of samples' JSON.")] = None,
    encoding: Annotated[str, typer.Option(help="png is small, uint8 is fast to read.")] = "png",
    split: Annotated[
        str, typer.Option(help="Share that is held out: train,holdout=0.1; or train for none.")
    ] = "train,holdout=0.1",
    limit: Annotated[int | None, typer.Option(help="At most so many images.", min=1)] = None,
    max_bad: Annotated[str, typer.Option(help="Images that can't be read, above which it stops.")] = "1%",
    latents: Annotated[
        str | None,
        typer.Option(help="Folder of a VAE (diffusers): its latents of the images, in a column of their own."),
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Folder of a CLIP or T5 encoder (transformers): its embeddings of the captions.")
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(help="Add reference statistics for all runs on it: classifier, mixture, inception or pixels."),
    ] = None,
    extractor_weights: Annotated[str | None, typer.Option(help="File of inception's weights.")] = None,
    shard_mb: Annotated[
        float, typer.Option(help="MB of a shard's images before compression.", min=0.1, callback=finite)
    ] = 64,
    seed: Annotated[int, typer.Option(help="Of random crops.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON, without its shards.")] = False,
    debug: Debug = False,
) -> None:
    """Images from wherever they are to a data set for `--set data.source=dataset://DEST`. Goes on where it was if run again."""
    with errors(debug, continues=True):
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


@app.command()
def config(recipe: Recipe = "digits", set_: Set = None, smoke: Smoke = False, debug: Debug = False) -> None:
    """Print a recipe's resolved configuration as YAML."""
    with errors(debug):
        from workflows.config.schema import load_config

        print(load_config(recipe, set_, smoke=smoke, only_shown=True).yaml(), end="")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a YAML file.")] = "digits",
    set_: Set = None,
    gpus: Annotated[int, typer.Option(help="GPUs, each with a worker.", min=1)] = 8,
    gpu_memory: Annotated[float, typer.Option(help="GiB of each.", min=0.1, callback=finite)] = 80,
    update: Annotated[
        list[str] | None, typer.Option(help="alternating, joint or instant; may be repeated. By default all.")
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(help="Figures of `mmdistill bench engine --out FILE` on such a GPU, for the hours.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """What a recipe would cost: memory, batches that fit, network evaluations, hours. Nothing is run."""
    with errors(debug):
        from workflows.plan.plan import run_plan

        run_plan(
            recipe,
            overrides=set_,
            gpus=gpus,
            gib=gpu_memory,
            updates=update or [],
            bench=bench,
            as_json=as_json,
        )


@app.command()
def recipes() -> None:
    """List the recipes."""
    from workflows.config.schema import RECIPES, recipe_names

    for name in recipe_names():
        first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
        print(f"{name:14} {first.lstrip('# ')}")


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(help="models:/NAME/VERSION, models:/NAME@ALIAS, runs:/..., or a model folder.")
    ],
    n: Annotated[int, typer.Option(help="How many images.", min=1)] = 64,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Classes to draw, such as 3,5, or by name, as far as the data had names; by default all in turn."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i depends on it, on i and on its class.", min=0, max=2**63 - 1)] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; by default the model's own.", min=1, max=2**24)
    ] = None,
    out: Annotated[
        str, typer.Option(help="A .png for a grid, a .npy for the images, or FOLDER/ for a .png of each.")
    ] = "grid.png",
    columns: Annotated[int | None, typer.Option(help="Images in a row of the grid.", min=1)] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Strength of classifier-free guidance; 0 is none. By default the model's own.", min=0, callback=finite
        ),
    ] = None,
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    tracking_uri: Tracking = None,
    debug: Debug = False,
) -> None:
    """Draw samples from a teacher or a student."""
    with errors(debug):
        from workflows.rendering.screen import Screen
        from workflows.tools.sample import Wanted, draw

        wanted = Wanted(n, labels, seed, steps, columns, guidance)
        print(draw(model, wanted, out=out, workspace=workspace, tracking_uri=tracking_uri, screen=Screen()))


@app.command()
def doctor(
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    tracking_uri: Tracking = None,
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Check this file for `ray up` instead, before it costs anything."),
    ] = None,
) -> None:
    """Check this machine: packages, devices, Ray, the tracking store, the object store."""
    from workflows.tools.doctor import examine

    raise typer.Exit(0 if examine(workspace, tracking_uri, cluster) else 1)


@app.command()
def ui(
    workspace: Workspace_ = DEFAULT_WORKSPACE,
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
    debug: Debug = False,
) -> None:
    """Open MLflow's web page for the workspace's own tracking store, on this machine only."""
    with errors(debug):
        from workflows.storage.workspace import Workspace

        space = Workspace(workspace)
        os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        words = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        words += ["--backend-store-uri", space.default_tracking_uri]
        words += ["--default-artifact-root", space.default_artifacts.as_uri()]
        os.execv(sys.executable, [sys.executable, *words])


@app.command()
def bench(
    what: Annotated[
        str, typer.Argument(help="engine, sampler, start, ray, scaling, tracking, memory, data, or all.")
    ] = "all",
    recipe: Recipe = "digits",
    repeats: Annotated[int, typer.Option(help="Rounds; the systems take turns within each.", min=3)] = 15,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    place: Annotated[str | None, typer.Option(help="data: s3://BUCKET/PREFIX, to be measured from too.")] = None,
    workers: Annotated[str, typer.Option(help="scaling: numbers of workers, each with one thread.")] = "1,2",
    debug: Debug = False,
) -> None:
    """Measure on this machine: an update against its floor, samples/s against diffusers, Ray's share, memory, reading images."""
    with errors(debug):
        checked()
        from benchmarks.bench import run_bench
        from workflows.tools.sample import check_out

        if out:
            check_out(out, str(out))
        run_bench(what, recipe=recipe, repeats=repeats, out=out, place=place, workers=workers)


app.registered_commands += registry.registered_commands + submission.registered_commands + sweeps.registered_commands
app.add_typer(jobs, name="jobs")


def main(arguments: list[str] | None = None) -> None:
    """The entry point. typer's own usage errors exit with 2, in a line. What a stream can't show is written out, as \\xe9."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    command: Callable[..., Any] = app
    try:
        code = command(args=arguments, prog_name="mmdistill", standalone_mode=False)
    except USAGE as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # which has shown the help
            say(f"error: {error.format_message()}")
            if error.ctx is not None:
                say(f"       {error.ctx.command_path} --help tells what there is")
        code = error.exit_code
    except typer.Abort:  # at a question
        say("aborted")
        code = 1
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
