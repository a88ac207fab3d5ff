"""The `doctor` command: checks packages, devices, Ray, the tracking store and the object store."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workflows.errors import ConfigError, UserError
from workflows.rendering.screen import show_table

PACKAGES = (
    "torch",
    "ray",
    "mlflow",
    "safetensors",
    "fsspec",
    "s3fs",
    "boto3",
    "scikit-learn",
    "matplotlib",
    "diffusers",
)
OPTIONAL = {"diffusers": "only `mmdistill bench sampler` needs it: pip install 'mmdistill[diffusers]'"}
Line = tuple[bool | None, str, str]
"""(ok, subject, finding or advice). ok is None where the finding is neither good nor bad."""


def examine(workspace: str, tracking_uri: str | None, cluster: Path | None = None) -> bool:
    """Prints a table with the result of each check. Returns True if none failed.

    cluster  a file for `ray up`: only this file is checked
    """
    console = Console(highlight=False)
    marks = {True: "[green]OK[/]", False: "[red]to do[/]", None: "[dim]-[/]"}
    table = Table(box=None, show_header=False, pad_edge=False)
    fine = True
    checks: dict[str, Callable[[], Iterator[Line]]] = {
        "packages": _packages,
        "devices": _devices,
        "workspace": lambda: _workspace(workspace),
        "Ray": _ray,
        "tracking store": lambda: _tracking(workspace, tracking_uri),
        "object store": _object_store,
    }
    if cluster is not None:
        checks = {"cluster file": lambda: _cluster(cluster)}
    for name, check in checks.items():
        with console.status(name):
            for ok, subject, found in check():
                table.add_row(marks[ok], f"[bold]{escape(subject)}[/]", escape(found))
                fine = fine and ok is not False
    show_table(console, table)
    return fine


def _packages() -> Iterator[Line]:
    yield True, "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in PACKAGES:
        try:
            yield True, name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in OPTIONAL:
                yield None, name, f"not installed; {OPTIONAL[name]}"
            else:
                yield False, name, f"not installed: pip install {name}"


def _devices() -> Iterator[Line]:
    import torch

    yield True, "cpu", f"{os.cpu_count()} cores"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            yield True, f"gpu {i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    elif torch.version.cuda:
        yield (
            False,
            "gpu",
            f"this torch is built for CUDA {torch.version.cuda}, but no device answers: check the driver",
        )
    else:
        yield None, "gpu", "none: this torch is a CPU build, which is enough for the digits"


def _workspace(path: str) -> Iterator[Line]:
    from workflows.storage.workspace import Workspace

    try:
        space = Workspace(path)
        yield True, "workspace", f"{space.uri}, {shutil.disk_usage(space.root).free / 2**30:.0f} GiB free"
    except (ConfigError, UserError) as error:
        yield False, "workspace", _message(error)


def _ray() -> Iterator[Line]:
    from workflows.cluster.session import ray_session

    messages: list[str] = []
    where = os.environ.get("RAY_ADDRESS") or "one of its own on this machine"
    try:
        with ray_session(say=lambda text: messages.append(text.removeprefix("ray: "))) as resources:
            have = ", ".join(f"{resources.get(n, 0):g} {n}s" for n in ("CPU", "GPU"))
            yield True, "ray", f"{'; '.join(messages) or where}: {have}"
    except (ConfigError, UserError) as error:
        yield False, "ray", _message(error)


def _tracking(workspace: str, given: str | None) -> Iterator[Line]:
    """Opens the store read-only: nothing is created in it."""
    from workflows.storage.workspace import Workspace
    from workflows.tracking.tracker import Tracker, address_of, origin, store_exists

    try:
        space = Workspace(workspace)
        uri = address_of(given, space.default_tracking_uri)
        if uri == space.default_tracking_uri and not store_exists(uri):
            yield None, "tracking", f"{uri}: does not exist yet; the first run creates it"
            return
        yield True, "tracking", f"{Tracker(uri, read_only=True).uri}{origin(uri)} answers"
    except (ConfigError, UserError) as error:
        yield False, "tracking", _message(error)


def _message(error: Exception) -> str:
    return "; ".join(filter(None, (str(error), getattr(error, "hint", ""))))


def _object_store() -> Iterator[Line]:
    from workflows.storage.s3 import object_store_status

    try:
        ok, found = object_store_status()
    except (ConfigError, UserError) as error:
        ok, found = False, _message(error)
    yield ok, "object store", found


def _cluster(file: Path) -> Iterator[Line]:
    from workflows.cluster.check import check_cluster

    problems = check_cluster(file)
    for problem in problems:
        yield False, "cluster", problem
    if not problems:
        yield True, "cluster", f"{file}: ready for ray up"
