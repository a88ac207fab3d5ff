"""register with a registry that has changed: versions that are gone are registered again."""

import io
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

import pytest
from registered import Shelf
from rich.console import Console

from workflows.config.loading import load_config
from workflows.errors import UserError
from workflows.rendering.screen import Screen
from workflows.session.context import Done
from workflows.stages.register import register
from workflows.storage.workspace import Workspace

TEACHER, STUDENT = "mmdistill-digits-teacher", "mmdistill-digits-student"


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """(context, the arguments of `register`) with tiny models in the place of trained ones."""
    folder = tmp_path_factory.mktemp("register")
    shelf = Shelf(folder)
    screen = Screen(Console(file=io.StringIO(), width=200))
    context = SimpleNamespace(
        workspace=Workspace(folder / "workspace"), tracker=shelf.tracker, pipeline="p", force=frozenset(), screen=screen,
        parent_run=None, config=load_config("digits", ["distill.k=[1]"]), settle=lambda: None,
    )  # fmt: skip

    def done(name, k, **result):
        model = shelf.model(k)
        parent = folder / name
        parent.mkdir()
        model.rename(parent / "model")
        run_id = shelf.tracker.start_run(name)
        return Done(name, parent, str(parent), {"identity": name} | result, run_id, 1.0, True)

    figures = {"frechet": {"mean": 0.1, "spread": 0.01}, "recall": {"mean": 0.9}}
    rows = [
        {"who": who, "sampler": "ancestral", "plain": True, "k": k, "nfe": k} | figures
        for who, k in (("teacher", 1), ("teacher", 64), ("student", 1))
    ]
    about = {
        "rows": rows,
        "compared_by": "ancestral",
        "features": "pixels",
        "samples": 10,
        "seeds": 1,
        "reference": {"fingerprint": "f"},
    }
    measured = Done(
        "evaluate", folder, str(folder), {"identity": "e", "reference_count": 9} | about, "0" * 32, 1.0, True
    )
    prepared = SimpleNamespace(result={"fingerprint": "f", "count": 9, "shape": [1, 4, 4]})
    return context, shelf.registry, (prepared, done("teacher", 64), {1: done("student", 1)}, measured)


def test_versions_that_are_gone_are_registered_again(stages):
    context, registry, arguments = stages
    assert not register(context, *arguments).reused
    assert register(context, *arguments).reused
    registry.client.delete_registered_model_alias(STUDENT, "k1-champion")
    registry.client.delete_model_version(STUDENT, "1")
    again = register(context, *arguments)
    assert not again.reused
    assert again.result["students"] == {"1": f"models:/{STUDENT}/2"}
    assert again.result["teacher"] == f"models:/{TEACHER}/1"
    assert registry.alias(STUDENT, "k1-champion") == "2"
    assert register(context, *arguments).reused
    for name in (TEACHER, STUDENT):  # as in a store that was made anew
        registry.client.delete_registered_model(name)
    assert register(context, *arguments).result["students"] == {"1": f"models:/{STUDENT}/1"}
    registry.client.set_model_version_tag(TEACHER, "1", "identity", "another")
    assert "has no mmdistill-digits-teacher v1 of this run" in context.screen.console.file.getvalue()
    assert not register(context, *arguments).reused


def test_weights_in_the_store_that_are_others_are_not_drawn_from(stages, tmp_path):
    context, registry, arguments = stages
    register(context, *arguments)
    version = registry.versions(STUDENT)[-1]
    assert (registry.download(version.uri, tmp_path / "one") / "weights.safetensors").exists()
    where = Path(urlparse(registry.client.get_model_version_download_uri(STUDENT, version.version)).path)
    (weights,) = where.rglob("weights.safetensors")
    before = weights.read_bytes()
    for content in (b"", before[:-1], before[:-1] + b"x"):
        weights.write_bytes(content)
        for model in (version.uri, f"models:/{STUDENT}@k1-champion"):
            with pytest.raises(
                UserError, match=f"{version.title}: its weights in the store are not those that were registered"
            ):
                registry.download(model, tmp_path / "other")
    weights.write_bytes(before)
    assert registry.download(version.uri, tmp_path / "three")
