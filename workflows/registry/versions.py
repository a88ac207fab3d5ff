"""The MLflow model registry: registered versions, aliases and exports.

A version's lineage and metrics are tags of the version. Moves of an alias are tags of the registered model, so they outlive deleted
versions. Reading all of it needs only the address of the tracking store.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mmdistill_core.files import sha256_of
from workflows.errors import UserError
from workflows.tracking.tracker import EXPERIMENT, Tracker

WEIGHTS, WEIGHTS_FILE = "weights_sha256", "weights.safetensors"
"""The version tag with the SHA-256 of the weights, and the name of the weights file."""
MOVE, EXPORT = "mmdistill.move.", "mmdistill.export."
"""Prefixes of the tags that record moves and exports."""
MOST_TEXT = 1000
"""Maximum length of a `why`, in characters. MLflow limits a tag of a registered model to 5,000."""
REFERENCE = re.compile(r"^(?:models:/)?(?P<name>[^/@]+)(?:/(?P<version>[0-9]+)|@(?P<alias>[^/@]+))?$")
DUPLICATE = ("unique constraint", "duplicate key", "duplicate entry")
NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")


@dataclass(frozen=True)
class Version:
    name: str
    version: str
    tags: dict[str, str] = field(default_factory=dict)
    run_id: str = ""
    source: str = ""
    created: str = ""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def title(self) -> str:
        return f"{self.name} v{self.version}"


@dataclass(frozen=True)
class Move:
    """The record of an alias that moved from version `before` (None: the alias was new) to `version`.

    by    "gate" if the version passed the gate, "forced" if it was moved despite the gate
    done  False while the move is under way. It stays False if the process died: the alias may or may not have moved
    """

    alias: str
    version: str
    before: str | None
    when: str
    who: str
    why: str
    by: str
    done: bool = False


@dataclass(frozen=True)
class Export:
    """The record of a copy of a version outside the registry. `sha256` is the hash of its SHA256SUMS, or of its only file."""

    format: str
    where: str
    sha256: str
    when: str
    who: str


@dataclass(frozen=True)
class AliasState:
    """The version that an alias points to, and the keys of the moves that were recorded when it was read."""

    version: str | None
    known: frozenset[str]


class Registry:
    """The model registry of a tracking store. Every method raises UserError if the store does not answer."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.client = tracker, tracker.client
        self.uri = tracker.uri

    # Versions

    def register(self, *, run_id: str, name: str, folder: Path, tags: dict[str, str]) -> Version:
        """Logs the model folder as an MLflow pyfunc model and registers it as a version. Nothing is pickled: MLflow loads the
        model from code.
        """
        import mlflow
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
        tags = tags | {WEIGHTS: sha256_of(folder / WEIGHTS_FILE)}
        with self.tracker.reachable(), _silent():
            self.tracker.make_current()
            with mlflow.start_run(run_id=run_id, log_system_metrics=False):
                info = mlflow.pyfunc.log_model(
                    name=name.rsplit("-", 1)[-1],
                    python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                    artifacts={"model": folder.resolve().as_uri()},  # MLflow would parse a plain path as a URI
                    code_paths=[str(root / "mmdistill_core")],
                    signature=signature,
                    pip_requirements=[
                        f"torch=={torch.__version__.split('+')[0]}",
                        f"safetensors=={safetensors.__version__}",
                        f"numpy=={np.__version__}",
                        f"mlflow=={mlflow.__version__}",
                    ],
                    registered_model_name=None,
                )
            try:
                self.client.create_registered_model(name)
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            version = self.client.create_model_version(
                name, info.model_uri, run_id, tags=tags, model_id=info.model_id, await_creation_for=60
            )
        return _version(version)

    def names(self) -> list[str]:
        """The names of all registered models, sorted."""
        with self.tracker.reachable():
            return sorted(m.name for m in pages(lambda token: self.client.search_registered_models(page_token=token)))

    def versions(self, name: str | None = None, **tags: str) -> list[Version]:
        """The versions of `name`, or of all models, that have all of these tags. Sorted by name, then oldest first."""
        where = f"name = '{name}'" if name else None
        with self.tracker.reachable():
            found = pages(lambda token: self.client.search_model_versions(where, page_token=token))
            versions = [_version(v) for v in found if all(v.tags.get(key) == value for key, value in tags.items())]
        return sorted(versions, key=lambda v: (v.name, int(v.version)))

    def version(self, name: str, version: str) -> Version | None:
        return self._or_none(lambda: _version(self.client.get_model_version(name, version)))

    def find_version(self, name: str, tags: dict[str, str]) -> Version | None:
        """The newest version that has all of these tags, or None. Callers use it to avoid registering the same model twice."""
        return next(reversed(self.versions(name, **tags)), None)

    def set_tags(self, version: Version, tags: dict[str, str]) -> None:
        with self.tracker.reachable():
            for key, value in tags.items():
                self.client.set_model_version_tag(version.name, version.version, key, value)

    def resolve(self, model: str) -> list[Version]:
        """The versions that `model` names: one for models:/NAME/VERSION or models:/NAME@ALIAS, all for NAME, oldest first.

        Raises UserError, which lists the existing models, versions or aliases, if nothing matches.
        """
        parts, names = REFERENCE.match(model), self.names()
        if parts is None:
            raise UserError(
                f"{model}: not a reference to a registered model",
                hint="use models:/NAME/VERSION, models:/NAME@ALIAS, or a name",
            )
        name, number, alias = parts["name"], parts["version"], parts["alias"]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"{model}: there is no model {name}", hint=f"{guess}models in {self.uri}: {', '.join(names) or 'none'}"
            )
        versions, aliases = self.versions(name), self.aliases(name)
        matches = versions
        if alias or number:
            wanted = aliases.get(alias) if alias else number
            matches = [v for v in versions if v.version == wanted]
        if not matches:
            newest = ", ".join(v.version for v in versions[-20:]) or "none"
            targets = ", ".join(f"{a} (version {v})" for a, v in sorted(aliases.items())) or "none"
            missing = f"alias {alias}" if alias else f"version {number}" if number else "versions"
            raise UserError(f"{model}: {name} has no {missing}", hint=f"its versions: {newest}; its aliases: {targets}")
        return matches

    def one(self, model: str) -> Version:
        """The single version that `model` names (see `resolve`). Raises UserError for a bare name with several versions."""
        first, *others = self.resolve(model)
        if others:
            raise UserError(
                f"{model}: has versions {first.version} to {others[-1].version}; which?",
                hint=f"such as {others[-1].uri}",
            )
        return first

    def download(self, model_uri: str, into: Path) -> Path:
        """Downloads a model below `into` and returns its folder (weights.safetensors, model.json).

        Raises UserError if there is no such model, or if its weights are not the registered ones.
        """
        import mlflow

        with self.tracker.reachable():
            # Separates a store that does not answer from a missing model.
            self.client.get_experiment_by_name(EXPERIMENT)
        try:
            with _silent():
                self.tracker.make_current()
                local = mlflow.artifacts.download_artifacts(artifact_uri=model_uri, dst_path=str(into))
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise UserError(
                f"{model_uri}: {str(error).splitlines()[0]}",
                hint=f"models in {self.uri}: {', '.join(self.names()) or 'none'}",
            ) from error
        folders = [p.parent for p in Path(local).rglob("model.json")]
        if not folders:
            raise UserError(f"{model_uri}: is in the registry, but is not a model of mmdistill")
        self._check_weights(model_uri, folders[0])
        return folders[0]

    def _check_weights(self, model_uri: str, folder: Path) -> None:
        """Raises UserError if the hash of the weights differs from the one in the version's tag."""
        if not model_uri.startswith("models:/") or model_uri.count("/") + model_uri.count("@") == 1:
            return  # a run's artifact, or models:/ID of a logged model: no version's tag describes it
        version, weights = self.one(model_uri), folder / WEIGHTS_FILE
        if WEIGHTS in version.tags and not (weights.exists() and sha256_of(weights) == version.tags[WEIGHTS]):
            raise UserError(
                f"{version.title}: its weights in the store are not those that were registered",
                hint="delete the version and run the recipe again: it registers the weights of the stage, if that is still kept",
            )

    # Aliases and their moves

    def alias(self, name: str, alias: str) -> str | None:
        """The version that an alias points to, or None."""
        return self._or_none(lambda: str(self.client.get_model_version_by_alias(name, alias).version))

    def aliases(self, name: str) -> dict[str, str]:
        model = self._or_none(lambda: self.client.get_registered_model(name))
        return {alias: str(version) for alias, version in model.aliases.items()} if model else {}

    def alias_state(self, name: str, alias: str) -> AliasState:
        # Read the moves first. `move` then treats a move between the two reads as new.
        known = frozenset(self._records(name, alias))
        return AliasState(self.alias(name, alias), known)

    def move(self, version: Version, alias: str, state: AliasState, *, who: str, why: str, by: str) -> Move:
        """Moves the alias to the version, and returns the record of the move.

        `state` is the alias as it was when the caller decided. The record's `before` differs from it if someone else moved the
        alias since then.

        MLflow has no compare-and-set. So the record is written before the alias is set, and the other records are read after that.
        In a race, whoever sets the alias last finds the other record, and every move is recorded.
        """
        key = f"{MOVE}{alias}.{_stamp()}"
        move = Move(alias, version.version, state.version, now(), who, why[:MOST_TEXT], by)
        self._record(version.name, key, move)
        self.set_alias(version.name, alias, version.version)
        since = {k: m for k, m in self._records(version.name, alias).items() if k not in state.known and k != key}
        replaced = since[max(since)].version if since else state.version
        move = replace(move, before=replaced, done=True)
        self._record(version.name, key, move)
        return move

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Sets the alias without recording it; `move` records. If two processes create the same alias at once, MLflow fails one of
        them with a duplicate key error: that call is retried.
        """
        from mlflow.exceptions import MlflowException

        with self.tracker.reachable():
            for wait in (0.1, 0.3, 1.0, 0.0):
                try:
                    return self.client.set_registered_model_alias(name, alias, version)
                except MlflowException as error:
                    if not wait or not any(word in str(error).lower() for word in DUPLICATE):
                        raise
                    time.sleep(wait)

    def moves(self, name: str) -> list[Move]:
        """The moves of all aliases of the model, oldest first by the clocks of the machines that made them."""
        return [move for _, move in sorted(self._records(name).items(), key=lambda item: item[0].rsplit(".", 1)[-1])]

    def _record(self, name: str, key: str, move: Move) -> None:
        with self.tracker.reachable():
            self.client.set_registered_model_tag(name, key, json.dumps(asdict(move)))

    def _records(self, name: str, alias: str | None = None) -> dict[str, Move]:
        model = self._or_none(lambda: self.client.get_registered_model(name))
        return _read(model.tags if model else {}, f"{MOVE}{alias}." if alias else MOVE, Move)

    # Exports

    def record_export(self, version: Version, export: Export) -> None:
        """Records a copy of the version that is kept elsewhere. A download by `mmdistill sample` is not an export."""
        self.set_tags(version, {f"{EXPORT}{_stamp()}": json.dumps(asdict(export))})

    def _or_none(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, or None if the store answers that the object does not exist."""
        from mlflow.exceptions import MlflowException

        with self.tracker.reachable():
            try:
                return call()
            except MlflowException as error:
                if error.error_code in NOT_FOUND:
                    return None
                raise


def exports(version: Version) -> list[Export]:
    """The recorded exports of a version, oldest first."""
    return [export for _, export in sorted(_read(version.tags, EXPORT, Export).items())]


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _stamp() -> str:
    """A unique string that sorts by time, so that concurrent writers never write the same tag."""
    return datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S%fZ") + "-" + secrets.token_hex(2)


def _read(tags: dict[str, str], prefix: str, kind: Any) -> dict[str, Any]:
    """The records among `tags`, by key. Skips values that can't be parsed, such as those written by other programs."""
    out = {}
    for key, text in tags.items():
        if key.startswith(prefix):
            try:
                out[key] = kind(**json.loads(text))
            except (ValueError, TypeError):
                continue
    return out


def pages(search: Callable[[Any], Any]) -> list[Any]:
    """Everything that a search in MLflow finds. `search` takes the token of a page."""
    results, token = [], None
    while True:
        page = search(token)
        results += page
        if not (token := page.token):
            return results


def _version(entity: Any) -> Version:
    """The Version of an MLflow ModelVersion."""
    created = datetime.fromtimestamp((entity.creation_timestamp or 0) / 1000, timezone.utc)
    return Version(
        name=entity.name,
        version=str(entity.version),
        tags=dict(entity.tags),
        run_id=entity.run_id or "",
        source=entity.source or "",
        created=created.isoformat(timespec="seconds"),
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Turns off MLflow's warnings."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda *_, **__: None  # MLflow sets its own filters, so "ignore" is not enough
        logger = logging.getLogger("mlflow")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
