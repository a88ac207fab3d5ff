"""MLflow's SQLite store: what `mlflow gc` does, but for single runs and models.

`mlflow gc` removes everything deleted, including the runs behind registered versions, and other people's deleted experiments.
"""

from __future__ import annotations

from typing import Any


def store_at(uri: str) -> Any:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    return SqlAlchemyStore(uri, default_artifact_root=None)


def deleted_runs(store: Any, older_than: int) -> list[str]:
    """The ids of runs that were deleted more than `older_than` milliseconds ago."""
    return list(store._get_deleted_runs(older_than=older_than))


def deleted_models(store: Any, older_than: int) -> list[str]:
    return list(store._get_deleted_logged_models(older_than=older_than))


def remove_run(store: Any, run_id: str) -> None:
    store._hard_delete_run(run_id)


def remove_model(store: Any, model_id: str) -> None:
    store._hard_delete_logged_model(model_id)
