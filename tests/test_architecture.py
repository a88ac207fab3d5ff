"""Imports point one way, and what is heavy, private or dangerous stands in one place."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ONLY = {
    "ray": None,
    "mlflow": {"tracker.py", "delivery.py", "versions.py", "mlflow.py", "pyfunc_model.py"},
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


def test_the_arrows():
    """pyproject.toml's contracts: which room may import which, and no circles."""
    from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS


def test_no_method_imports_another():
    base = {"base", "parts"}
    for file in (ROOT / "mmdistill_core/methods").glob("*.py"):
        if file.stem in (*base, "__init__"):
            continue
        for module, _ in imports(file):
            if module.startswith("mmdistill_core.methods"):
                assert module.split(".")[-1] in base, f"{file.name} imports {module}"


def test_readers_of_sources_know_nothing_of_the_stages():
    for file in (ROOT / "workflows/dataset/readers").glob("*.py"):
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
                assert file.name in ("client.py", "ray.py"), f"{file.relative_to(ROOT)} imports {module}"


def test_heavy_imports_are_lazy_on_the_way_to_help():
    heavy = {"torch", "ray", "mlflow", "pandas", "sklearn", "matplotlib", "boto3"}
    for name in (
        *(f"cli/{name}.py" for name in ("main", "options", "registry", "jobs", "sweep")),
        "config/schema.py",
        "pipeline/run.py",
        "session/options.py",
        "jobs/submit.py",
        "jobs/watch.py",
        "jobs/client.py",
        "jobs/package.py",
        "storage/workspace.py",
        "errors.py",
    ):
        for module, top in imports(ROOT / "workflows" / name):
            assert not (top and module.split(".")[0] in heavy), f"{name} imports {module}"


def test_private_parts_of_libraries_stand_in_one_place():
    private = ("ray._private", "ray.autoscaler._private", "ray.train.v2._internal", "ray.tune.execution.class_cache")
    for folder in ("workflows", "benchmarks", "mmdistill_core"):
        for file in (ROOT / folder).rglob("*.py"):
            if file.parent.name == "private":
                continue
            for module, _ in imports(file):
                assert not module.startswith(private), f"{file.relative_to(ROOT)} imports {module}"
            for word in ("_hard_delete_", "_do_request", "core_worker", "class_cache", "_get_deleted_"):
                assert word not in file.read_text(), f"{file.relative_to(ROOT)}: {word}"


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


def test_the_workflow_names_no_method_s_options_roles_or_samplers():
    """Teachers and students are what a pipeline makes; guidance and dropout are fields of its own."""
    from mmdistill_core.diffusion.schedules import Cosine
    from mmdistill_core.methods import METHODS
    from mmdistill_core.networks.config import NETWORKS, network_class
    from mmdistill_core.options import options_of
    from mmdistill_core.samplers.samplers import SAMPLERS

    names = {*METHODS, *SAMPLERS, *NETWORKS}
    for method in METHODS.values():
        names |= {*method.learners, *method.extra_names, *(role.name for role in method(schedule=Cosine()).roles)}
        names |= {option.name for option in options_of(method)}
    names |= {option.name for kind in NETWORKS for option in options_of(network_class(kind))}
    names -= {"teacher", "student", "guidance", "dropout"}
    assert {"auxiliary", "pairing", "ancestral", "label_dropout"} <= names
    of_others = {"update", "pull", "width"}
    """Attributes of these names that others have: dictionaries, bars, the terminal."""
    for file in (ROOT / "workflows").rglob("*.py"):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names, f"{file.relative_to(ROOT)}:{node.lineno}: {node.value!r}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in names - of_others, f"{file.relative_to(ROOT)}:{node.lineno}: .{node.attr}"
