"""Finds and removes what an MLflow store in SQLite still holds of deleted runs and models."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from workflows.private.mlflow import deleted_models, deleted_runs, remove_model, remove_run, store_at
from workflows.registry.versions import Registry, pages

DAY = 86_400_000


@dataclass(frozen=True)
class Leftover:
    """A deleted run, or a logged model without a registered version. `folder` holds its artifacts if they are on this machine."""

    kind: str
    id: str
    folder: Path | None


def leftovers(registry: Registry, *, older_than_days: float = 0) -> list[Leftover]:
    """The deleted runs that no registered version refers to, and the logged models of this project's experiment that no version
    needs. A copy that MLflow makes of a version uses the files of the original model, so they are needed too.
    """
    store, age = store_at(registry.tracker.uri), int(older_than_days * DAY)
    versions = registry.versions()
    runs = {v.run_id for v in versions} | {v.tags.get("evaluation_run", "") for v in versions}
    found = []
    for run_id in deleted_runs(store, age):
        if run_id not in runs:
            found.append(Leftover("run", run_id, _folder(store.get_run(run_id).info.artifact_uri)))
    models = {v.source.removeprefix("models:/") for v in versions}
    needed = {registry.client.get_model_version_download_uri(v.name, v.version).rstrip("/") for v in versions}
    deleted = [store.get_logged_model(model_id, allow_deleted=True) for model_id in deleted_models(store, age)]
    logged = pages(lambda token: store.search_logged_models([registry.tracker.experiment], page_token=token))
    unchanged_since = time.time() * 1000 - age
    for model in [*(m for m in logged if m.last_updated_timestamp <= unchanged_since), *deleted]:
        unnamed = model.model_id not in models and model.artifact_location.rstrip("/") not in needed
        if unnamed and model.experiment_id == registry.tracker.experiment:
            found.append(Leftover("model", model.model_id, _folder(model.artifact_location)))
    return found


def forget(registry: Registry, leftover: Leftover) -> None:
    """Removes the leftover's rows from the store. The caller removes its files first, so that a retry still finds the rows."""
    remove = remove_run if leftover.kind == "run" else remove_model
    remove(store_at(registry.tracker.uri), leftover.id)


def _folder(uri: str) -> Path | None:
    """The path of a local URI, or its parent if its last part is `artifacts`. None for a remote URI."""
    parts = urlparse(uri)
    if parts.scheme not in ("", "file"):
        return None
    path = Path(unquote(parts.path))
    return path.parent if path.name == "artifacts" else path
