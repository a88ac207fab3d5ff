"""What an MLflow store in SQLite still holds of runs and models that were deleted, and its removal, as `mlflow gc` does it.

`mlflow gc` itself asks nobody: it would take runs that registered versions came from, and other people's deleted experiments.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from workflows.registry.versions import Registry

DAY = 86_400_000


@dataclass(frozen=True)
class Leftover:
    """A deleted run, or a logged model of which there is no version. `folder`: where its artifacts lie, if on this machine."""

    kind: str
    id: str
    folder: Path | None


def leftovers(registry: Registry, *, older_than_days: float = 0) -> list[Leftover]:
    """Runs that were deleted, but for those that a registered version names; and the models logged in this project's experiment of
    which no version is left in the registry, and no copy of one, which has the model's files for its own.
    """
    store, age = _store(registry), int(older_than_days * DAY)
    versions = registry.versions()
    runs = {v.run_id for v in versions} | {v.tags.get("evaluation_run", "") for v in versions}
    found = []
    for run_id in store._get_deleted_runs(older_than=age):
        if run_id not in runs:
            found.append(Leftover("run", run_id, _folder(store.get_run(run_id).info.artifact_uri, above="artifacts")))
    models = {v.source.removeprefix("models:/") for v in versions}
    needed = {registry.client.get_model_version_download_uri(v.name, v.version).rstrip("/") for v in versions}
    gone = {model_id: store.get_logged_model(model_id, allow_deleted=True) for model_id in _deleted_models(store, age)}
    for model in [*_logged(store, registry.tracker.experiment, age), *gone.values()]:
        unnamed = model.model_id not in models and model.artifact_location.rstrip("/") not in needed
        if unnamed and model.experiment_id == registry.tracker.experiment:
            found.append(Leftover("model", model.model_id, _folder(model.artifact_location, above="artifacts")))
    return found


def forget(registry: Registry, leftover: Leftover) -> None:
    """Its rows in the store; its files are the caller's to remove, and before this: a second try then still finds the rows."""
    store = _store(registry)
    if leftover.kind == "run":
        store._hard_delete_run(leftover.id)
    else:
        store._hard_delete_logged_model(leftover.id)


def _store(registry: Registry) -> Any:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    return SqlAlchemyStore(registry.tracker.uri, default_artifact_root=None)


def _deleted_models(store: Any, age: int) -> list[str]:
    return list(store._get_deleted_logged_models(older_than=age))


def _logged(store: Any, experiment: str, age: int) -> list[Any]:
    """The models that are not deleted, and were not changed for `age` milliseconds."""
    found, token = [], None
    while True:
        page = store.search_logged_models([experiment], page_token=token)
        found += [m for m in page if m.last_updated_timestamp <= time.time() * 1000 - age]
        if not (token := page.token):
            return found


def _folder(uri: str, *, above: str) -> Path | None:
    """A file's address as a path: the folder over one called `above`."""
    parts = urlparse(uri)
    if parts.scheme not in ("", "file"):
        return None
    path = Path(unquote(parts.path))
    return path.parent if path.name == above else path
