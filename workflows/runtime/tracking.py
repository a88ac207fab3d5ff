"""The only file that knows MLflow: runs, metrics, artifacts, the model registry.

One parent run for the pipeline, a child for each stage. A metric is logged once per step: when training resumes from a
checkpoint and replays steps that had been logged, they are not logged again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflows.runtime.errors import UserError

os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

EXPERIMENT = "mmdistill"


@dataclass(frozen=True)
class Registered:
    name: str
    version: str
    uri: str


class Tracker:
    """A tracking store. Raises UserError when it does not answer, from every call."""

    def __init__(self, uri: str, *, artifacts: Path | None = None, experiment: str = EXPERIMENT) -> None:
        """`artifacts`: where a store without a server keeps files; a server decides for itself."""
        import logging

        import mlflow
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.uri, self._mlflow = uri, mlflow
        with self._reachable():
            self._point()
            self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            found = self.client.get_experiment_by_name(experiment)
            if found is None:
                location = artifacts.as_uri() if artifacts is not None and not uri.startswith("http") else None
                self.experiment = self.client.create_experiment(experiment, artifact_location=location)
            else:
                self.experiment = found.experiment_id

    def _point(self) -> None:
        """MLflow at this store. It writes the address to the environment, where the next run of this process would find it."""
        before = os.environ.get("MLFLOW_TRACKING_URI")
        self._mlflow.set_tracking_uri(self.uri)
        self._mlflow.set_registry_uri(self.uri)
        if before is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None and not self.uri.startswith("http"):
                raise
            reason = str(error).splitlines()[0]
            if len(reason) > 160:
                reason = reason[:157] + "..."
            raise UserError(
                f"tracking: {self.uri} failed: {reason}",
                hint="finished stages and the last checkpoints are kept in the workspace: when the store is back, "
                "run the same command again (or give another --tracking-uri); it goes on where it was",
            ) from error

    def start_run(self, name: str, *, parent: str | None = None, tags: dict[str, str] | None = None) -> str:
        """The id of a new run."""
        with self._reachable():
            tags = {"mlflow.runName": name, "mlflow.source.name": "mmdistill"} | (tags or {})
            if parent:
                tags["mlflow.parentRunId"] = parent
            return self.client.create_run(self.experiment, tags=tags).info.run_id

    def resume_run(self, run_id: str) -> bool:
        """Marks the run as running again; False if this store does not know it (or it was deleted)."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
            if run.info.lifecycle_stage != "active":
                return False
            self.client.update_run(run_id, status="RUNNING")
            return True
        except MlflowException:
            with self._reachable():  # tells "not there" from "does not answer"
                self.client.get_experiment(self.experiment)
            return False

    def log_params(self, run_id: str, params: dict[str, Any]) -> None:
        """Nested dictionaries become dotted names. Parameters that are already there are left."""
        from mlflow.entities import Param

        flat = _flatten(params)
        with self._reachable():
            known = self.client.get_run(run_id).data.params
            new = [Param(key, str(value)[:6000]) for key, value in flat.items() if key not in known]
            for start in range(0, len(new), 100):
                self.client.log_batch(run_id, params=new[start : start + 100])

    def log_metrics(self, run_id: str, rows: list[tuple[int, dict[str, float]]]) -> None:
        """rows of (step, metrics), in batches of at most 1,000 values."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(_metric_name(key), value, now, step) for step, row in rows for key, value in row.items()]
        with self._reachable():
            for start in range(0, len(values), 1000):
                self.client.log_batch(run_id, metrics=values[start : start + 1000])

    def steps(self, run_id: str, *metrics: str) -> set[int]:
        """The steps at which one of `metrics` was logged."""
        with self._reachable():
            return {m.step for name in metrics for m in self.client.get_metric_history(run_id, _metric_name(name))}

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        with self._reachable():
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), folder)
            else:
                self.client.log_artifact(run_id, str(path), folder)

    def log_text(self, run_id: str, text: str, file: str) -> None:
        with self._reachable():
            self.client.log_text(run_id, text, file)

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        with self._reachable():
            for key, value in tags.items():
                self.client.set_tag(run_id, key, value)

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        with self._reachable():
            self.client.set_terminated(run_id, status)

    # The registry

    def register(self, *, run_id: str, name: str, folder: Path, tags: dict[str, str]) -> Registered:
        """Logs the model folder as a loadable pyfunc model (models from code: nothing is pickled) and registers a version."""
        import numpy as np
        import safetensors
        import torch
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

        network = json.loads((folder / "model.json").read_text())["network"]
        shape = (-1, network["channels"], network["image_size"], network["image_size"])
        signature = ModelSignature(
            inputs=Schema([ColSpec(DataType.long, "label")]),
            outputs=Schema([TensorSpec(np.dtype("float32"), shape)]),
            params=ParamSchema([ParamSpec("seed", DataType.long, 0), ParamSpec("guidance", DataType.double, -1.0)]),
        )
        root = Path(__file__).resolve().parents[2]
        with self._reachable(), _silent():
            self._point()
            with self._mlflow.start_run(run_id=run_id, log_system_metrics=False):
                info = self._mlflow.pyfunc.log_model(
                    name=name.rsplit("-", 1)[-1],
                    python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                    artifacts={"model": str(folder)},
                    code_paths=[str(root / "mmdistill_core")],
                    signature=signature,
                    pip_requirements=[
                        f"torch=={torch.__version__.split('+')[0]}",
                        f"safetensors=={safetensors.__version__}",
                        f"numpy=={np.__version__}",
                        f"mlflow=={self._mlflow.__version__}",
                    ],
                    registered_model_name=None,
                )
            try:
                self.client.create_registered_model(name)
            except self._mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            version = self.client.create_model_version(
                name, info.model_uri, run_id, tags=tags, model_id=info.model_id, await_creation_for=60
            )
        return Registered(name, str(version.version), f"models:/{name}/{version.version}")

    def find_version(self, name: str, tags: dict[str, str]) -> Registered | None:
        """The newest version that has all of these tags: registering twice leaves one version."""
        with self._reachable():
            found = [
                v
                for v in self.client.search_model_versions(f"name = '{name}'")
                if all(v.tags.get(key) == value for key, value in tags.items())
            ]
        if not found:
            return None
        newest = max(found, key=lambda v: int(v.version))
        return Registered(name, str(newest.version), f"models:/{name}/{newest.version}")

    def version_tags(self, name: str, version: str) -> dict[str, str]:
        with self._reachable():
            return dict(self.client.get_model_version(name, version).tags)

    def alias(self, name: str, alias: str) -> str | None:
        """The version an alias points at."""
        from mlflow.exceptions import MlflowException

        try:
            return str(self.client.get_model_version_by_alias(name, alias).version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
                return None
            with self._reachable():
                raise

    def set_alias(self, name: str, alias: str, version: str) -> None:
        with self._reachable():
            self.client.set_registered_model_alias(name, alias, version)

    def download(self, model_uri: str, into: Path) -> Path:
        """The model folder (weights.safetensors, model.json) of a registry URI, below `into`."""
        with self._reachable():
            self.client.get_experiment(self.experiment)  # tells "not there" from "does not answer"
        try:
            with _silent():
                local = self._mlflow.artifacts.download_artifacts(artifact_uri=model_uri, dst_path=str(into))
        except (self._mlflow.exceptions.MlflowException, OSError) as error:
            names = sorted(m.name for m in self.client.search_registered_models())
            raise UserError(
                f"{model_uri}: {str(error).splitlines()[0]}",
                hint=f"models in {self.uri}: {', '.join(names) or 'none'}",
            ) from error
        folders = [p.parent for p in Path(local).rglob("model.json")]
        if not folders:
            raise UserError(f"{model_uri}: is in the registry, but is not a model of mmdistill's")
        return folders[0]


@contextmanager
def _silent() -> Iterator[None]:
    """MLflow's progress bars and warnings off."""
    import logging
    import warnings

    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    with warnings.catch_warnings():
        warnings.showwarning = lambda *_, **__: None  # MLflow sets filters of its own, so "ignore" is not enough
        level = logging.getLogger("mlflow").level
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logging.getLogger("mlflow").setLevel(level)


def _metric_name(name: str) -> str:
    return name.replace("@", "_at_")


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            out |= _flatten(value, f"{name}.")
        else:
            out[name] = value
    return out
