"""Imports point one way: diffusion <- networks <- {methods, samplers, metrics} <- engine <- workflows."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY = {
    "mmdistill_core.rng": set(),
    "mmdistill_core.diffusion": {"rng"},
    "mmdistill_core.networks": {"diffusion"},
    "mmdistill_core.methods": {"diffusion", "networks", "rng"},
    "mmdistill_core.samplers": {"diffusion", "networks", "rng"},
    "mmdistill_core.metrics": {"diffusion", "networks", "rng"},
    "mmdistill_core.engine": {"diffusion", "networks", "methods", "samplers", "metrics", "rng"},
    "mmdistill_core.artifact": {"diffusion", "networks", "samplers", "rng"},
}
ONLY = {
    "ray": None,
    "mlflow": {"tracking.py", "delivery.py", "registry.py", "leftovers.py", "pyfunc_model.py"},
    "boto3": {"s3.py"},
    "s3fs": {"s3.py"},
    "fsspec": {"s3.py", "files.py"},
    "transformers": {"encoders.py"},
}


@cache
def parsed(path):
    return ast.parse(path.read_text())


@cache
def imports(path):
    """(module, is at the top level) of every import, wherever it stands."""
    return tuple(_imports(parsed(path)))


def _imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in tree.body
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node in tree.body


@pytest.mark.parametrize("room", MAY)
def test_the_arrows_of_the_core(room):
    path = ROOT / room.replace(".", "/")
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        for module, _ in imports(file):
            if module.startswith("mmdistill_core."):
                part = module.split(".")[1]
                own = room.split(".")[1]
                assert part in MAY[room] | {own}, f"{file.relative_to(ROOT)} imports {module}"


def test_no_method_imports_another():
    base = {"base", "parts"}
    for file in (ROOT / "mmdistill_core/methods").glob("*.py"):
        if file.stem in (*base, "__init__"):
            continue
        for module, _ in imports(file):
            if module.startswith("mmdistill_core.methods"):
                assert module.split(".")[-1] in base, f"{file.name} imports {module}"


def test_the_core_knows_neither_ray_nor_mlflow_nor_the_command_line():
    for file in (ROOT / "mmdistill_core").rglob("*.py"):
        for module, _ in imports(file):
            assert module.split(".")[0] not in {
                "ray",
                "mlflow",
                "typer",
                "rich",
                "pydantic",
                "argparse",
                "workflows",
            }, file


def test_readers_of_sources_know_nothing_of_the_stages():
    for file in (ROOT / "workflows/ingest").glob("*.py"):
        for module, top in imports(file):
            if module.startswith("workflows."):
                assert module.startswith(("workflows.dataset.readers", "workflows.errors")), (
                    f"{file.name} imports {module}"
                )
            heavy = {"torch", "ray", "mlflow", "numpy", "PIL", "pyarrow", "fsspec", "diffusers", "transformers"}
            guarded = module.split(".")[0] in heavy and top
            assert not guarded, f"{file.name} imports {module} at once"


@pytest.mark.parametrize("library", [name for name, files in ONLY.items() if files is not None])
def test_a_library_is_known_in_one_place(library):
    for file in (ROOT / "workflows").rglob("*.py"):
        if file.name == "doctor.py":  # asks for every library's version
            continue
        for module, _ in imports(file):
            if module.split(".")[0] == library:
                assert file.name in ONLY[library], f"{file.relative_to(ROOT)} imports {module}"


def test_ray_s_jobs_are_known_in_one_place():
    for file in (ROOT / "workflows").rglob("*.py"):
        for module, _ in imports(file):
            if module.startswith("ray.job_submission"):
                assert file.name == "jobs.py", f"{file.relative_to(ROOT)} imports {module}"


def test_heavy_imports_are_lazy_on_the_way_to_help():
    heavy = {"torch", "ray", "mlflow", "pandas", "sklearn", "matplotlib", "boto3"}
    for name in (
        "cli.py",
        "cli_options.py",
        "cli_registry.py",
        "cli_jobs.py",
        "config.py",
        "pipeline.py",
        "stages/submit.py",
        "stages/watch.py",
        "runtime/jobs.py",
        "runtime/source.py",
        "runtime/workspace.py",
        "runtime/errors.py",
    ):
        for module, top in imports(ROOT / "workflows" / name):
            assert not (top and module.split(".")[0] in heavy), f"{name} imports {module}"


def test_nothing_is_unpickled():
    words = ("pickle.load", "torch.jit.load", "allow_pickle=True", "cloudpickle.load", "joblib.load")
    for folder in ("mmdistill_core", "workflows"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            for word in words:
                assert word not in text, f"{file}: {word}"
            for node in ast.walk(parsed(file)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), f"{file}: torch.load of more than weights"
