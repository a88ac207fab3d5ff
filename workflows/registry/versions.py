"""The model registry in MLflow: versions with their lineage as tags, aliases whose every move is recorded, exports.

What a version came from and how it was measured are tags of the version; moves of an alias are tags of the registered model, and
so outlive the versions. A machine that has the store's address alone can read all of it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from workflows.errors import UserError
from workflows.storage.integrity import sha256_of
from workflows.tracking.tracker import EXPERIMENT, Tracker

WEIGHTS, WEIGHTS_FILE = "weights_sha256", "weights.safetensors"
"""The tag of a version, and the file of its model that the tag is the hash of."""
MOVE, EXPORT = "mmdistill.move.", "mmdistill.export."
MOST_TEXT = 1000
"""Characters of a `why`: a tag of a registered model holds 5,000."""
NAMED = re.compile(r"^(?:models:/)?(?P<name>[^/@]+)(?:/(?P<version>[0-9]+)|@(?P<alias>[^/@]+))?$")
TAKEN = ("unique constraint", "duplicate key", "duplicate entry")
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")


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
    """An alias went from version `before` (None: from none) to `version`.

    by    "gate", or "forced" past it
    done  False while it is under way, or where the mover died: then the alias may or may not have been moved
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
    """A copy of a version that left the registry. sha256 is that of the copy's SHA256SUMS, or of its one file."""

    format: str
    where: str
    sha256: str
    when: str
    who: str


@dataclass(frozen=True)
class Held:
    """The version that an alias points at, and the moves of it that were recorded when that was read."""

    version: str | None
    known: frozenset[str]


class Registry:
    """The registry of a tracking store. Raises UserError when it does not answer, from every call."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.client = tracker, tracker.client
        self.uri = tracker.uri

    # Versions

    def register(self, *, run_id: str, name: str, folder: Path, tags: dict[str, str]) -> Version:
        """Logs the model folder as a loadable pyfunc model (models from code: nothing is pickled) and registers a version."""
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
                    artifacts={"model": folder.resolve().as_uri()},  # a path would be read as an address
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
            made = self.client.create_model_version(
                name, info.model_uri, run_id, tags=tags, model_id=info.model_id, await_creation_for=60
            )
        return _version(made)

    def names(self) -> list[str]:
        """All registered models."""
        with self.tracker.reachable():
            return sorted(m.name for m in _pages(lambda token: self.client.search_registered_models(page_token=token)))

    def versions(self, name: str | None = None, **tags: str) -> list[Version]:
        """The versions of a model, or of all, that have all of these tags; the oldest first."""
        where = f"name = '{name}'" if name else None
        with self.tracker.reachable():
            found = _pages(lambda token: self.client.search_model_versions(where, page_token=token))
            versions = [_version(v) for v in found if all(v.tags.get(key) == value for key, value in tags.items())]
        return sorted(versions, key=lambda v: (v.name, int(v.version)))

    def version(self, name: str, version: str) -> Version | None:
        return self._or_none(lambda: _version(self.client.get_model_version(name, version)))

    def find_version(self, name: str, tags: dict[str, str]) -> Version | None:
        """The newest version that has all of these tags: registering twice leaves one version."""
        return next(reversed(self.versions(name, **tags)), None)

    def version_tags(self, name: str, version: str) -> dict[str, str]:
        with self.tracker.reachable():
            return dict(self.client.get_model_version(name, version).tags)

    def set_tags(self, version: Version, tags: dict[str, str]) -> None:
        with self.tracker.reachable():
            for key, value in tags.items():
                self.client.set_model_version_tag(version.name, version.version, key, value)

    def resolve(self, model: str) -> list[Version]:
        """models:/NAME/VERSION or models:/NAME@ALIAS -> that version; NAME -> all of its versions, the oldest first.

        Raises UserError that says what there is.
        """
        parts, names = NAMED.match(model), self.names()
        if parts is None:
            raise UserError(
                f"{model}: not a model of a registry", hint="models:/NAME/VERSION, models:/NAME@ALIAS, or a name"
            )
        name, number, alias = parts["name"], parts["version"], parts["alias"]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"{model}: there is no model {name}", hint=f"{guess}models in {self.uri}: {', '.join(names) or 'none'}"
            )
        versions, aliases = self.versions(name), self.aliases(name)
        wanted = aliases.get(alias) if alias else number
        found = versions if wanted is None and not alias else [v for v in versions if v.version == wanted]
        if not found:
            have = ", ".join(v.version for v in versions[-20:]) or "none"
            marks = ", ".join(f"{a} (version {v})" for a, v in sorted(aliases.items())) or "none"
            lacks = f"alias {alias}" if alias else f"version {number}" if number else "versions"
            raise UserError(f"{model}: {name} has no {lacks}", hint=f"its versions: {have}; its aliases: {marks}")
        return found

    def one(self, model: str) -> Version:
        """The version that models:/NAME/VERSION or models:/NAME@ALIAS names; a bare name that has but one means that."""
        found = self.resolve(model)
        if len(found) > 1:
            raise UserError(
                f"{model}: has versions {found[0].version} to {found[-1].version}; which?",
                hint=f"such as {found[-1].uri}",
            )
        return found[0]

    def download(self, model_uri: str, into: Path) -> Path:
        """The model folder (weights.safetensors, model.json) of a registry URI, below `into`."""
        import mlflow

        with self.tracker.reachable():
            self.client.get_experiment_by_name(EXPERIMENT)  # tells "not there" from "does not answer"
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
            raise UserError(f"{model_uri}: is in the registry, but is not a model of mmdistill's")
        self._check_weights(model_uri, folders[0])
        return folders[0]

    def _check_weights(self, model_uri: str, folder: Path) -> None:
        """Raises UserError where they are not those that the version was registered with."""
        if not model_uri.startswith("models:/") or model_uri.count("/") + model_uri.count("@") == 1:
            return
        version, weights = self.one(model_uri), folder / WEIGHTS_FILE
        if WEIGHTS in version.tags and not (weights.exists() and sha256_of(weights) == version.tags[WEIGHTS]):
            raise UserError(
                f"{version.title}: its weights in the store are not those that were registered",
                hint="the stage that made them has them still, where it is kept: delete the version, and run the recipe again",
            )

    # Aliases and their moves

    def alias(self, name: str, alias: str) -> str | None:
        """The version an alias points at."""
        return self._or_none(lambda: str(self.client.get_model_version_by_alias(name, alias).version))

    def aliases(self, name: str) -> dict[str, str]:
        found = self._or_none(lambda: self.client.get_registered_model(name))
        return {alias: str(version) for alias, version in found.aliases.items()} if found else {}

    def held(self, name: str, alias: str) -> Held:
        # Moves first: one that comes between the two reads is then among those that `move` finds to be new.
        known = frozenset(self._records(name, alias))
        return Held(self.alias(name, alias), known)

    def move(self, version: Version, alias: str, held: Held, *, who: str, why: str, by: str) -> Move:
        """Moves the alias to the version and records it. `held` is what the decision was made on; the record, which is returned,
        says what was replaced: another version, if somebody else moved the alias since.

        MLflow has no compare-and-set. So the record is written before the alias is set, and the others' are read afterwards:
        of two who race, the one who sets last is sure to find the other's record, and no move goes unrecorded.
        """
        key = f"{MOVE}{alias}.{_stamp()}"
        move = Move(alias, version.version, held.version, now(), who, why[:MOST_TEXT], by)
        self._record(version.name, key, move)
        self.set_alias(version.name, alias, version.version)
        since = {k: m for k, m in self._records(version.name, alias).items() if k not in held.known and k != key}
        replaced = since[max(since)].version if since else held.version
        move = replace(move, before=replaced, done=True)
        self._record(version.name, key, move)
        return move

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Without a record: for `move`. MLflow fails one of two who create an alias at once, as its row is there: tried again."""
        from mlflow.exceptions import MlflowException

        with self.tracker.reachable():
            for wait in (0.1, 0.3, 1.0, 0.0):
                try:
                    return self.client.set_registered_model_alias(name, alias, version)
                except MlflowException as error:
                    if not wait or not any(word in str(error).lower() for word in TAKEN):
                        raise
                    time.sleep(wait)

    def moves(self, name: str) -> list[Move]:
        """Of all of the model's aliases, the oldest first, by the movers' clocks."""
        return [move for _, move in sorted(self._records(name).items(), key=lambda item: item[0].rsplit(".", 1)[-1])]

    def _record(self, name: str, key: str, move: Move) -> None:
        with self.tracker.reachable():
            self.client.set_registered_model_tag(name, key, json.dumps(asdict(move)))

    def _records(self, name: str, alias: str | None = None) -> dict[str, Move]:
        found = self._or_none(lambda: self.client.get_registered_model(name))
        return _read(found.tags if found else {}, f"{MOVE}{alias}." if alias else MOVE, Move)

    # Exports

    def record_export(self, version: Version, export: Export) -> None:
        """A copy of the version that is kept somewhere else. What `mmdistill sample` fetches for itself is none."""
        self.set_tags(version, {f"{EXPORT}{_stamp()}": json.dumps(asdict(export))})

    def _or_none(self, call: Callable[[], Any]) -> Any:
        """What the call gives, or None where the store answers that there is no such thing."""
        from mlflow.exceptions import MlflowException

        with self.tracker.reachable():
            try:
                return call()
            except MlflowException as error:
                if error.error_code in ABSENT:
                    return None
                raise


def exports(version: Version) -> list[Export]:
    """The oldest first."""
    return [export for _, export in sorted(_read(version.tags, EXPORT, Export).items())]


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _stamp() -> str:
    """Sorts by time, and no two are the same: two who write at once write two records."""
    return datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S%fZ") + "-" + secrets.token_hex(2)


def _read(tags: dict[str, str], prefix: str, kind: Any) -> dict[str, Any]:
    """The records among tags; what is not one, written by someone else, is left out."""
    out = {}
    for key, text in tags.items():
        if key.startswith(prefix):
            try:
                out[key] = kind(**json.loads(text))
            except (ValueError, TypeError):
                continue
    return out


def _pages(search: Callable[[Any], Any]) -> list[Any]:
    found, token = [], None
    while True:
        page = search(token)
        found += list(page)
        token = page.token
        if not token:
            return found


def _version(found: Any) -> Version:
    created = datetime.fromtimestamp((found.creation_timestamp or 0) / 1000, timezone.utc)
    return Version(
        found.name,
        str(found.version),
        dict(found.tags),
        found.run_id or "",
        found.source or "",
        created.isoformat(timespec="seconds"),
    )


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
