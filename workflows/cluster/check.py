"""Checks cluster files for `ray up` before a machine is paid for: keys, values, parameters of the cloud's API, the token."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from workflows.errors import expanded

# Ray's schema allows any key in `provider`. These are valid, though the schema does not list them.
PROVIDER_KEYS = {"key_pair", "aws_credentials", "coordinator_address", "foreground_node_launch", "external_head_ip"}
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` puts the completed file on the head node, on which the drivers of jobs run."""
ROOM = "MMDISTILL_ROOM"
"""Variable of a head node without such a file, as on Kubernetes: what `possible` returns, such as {"CPU": 160, "GPU": 16}."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_cluster(path: Path) -> list[str]:
    """All that is wrong with the file, one line each; [] if nothing is. Uses no network."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    except yaml.YAMLError as error:
        return [f"{path}: not YAML: {' '.join(str(error).split())}"]
    if not isinstance(config, dict):
        return [f"{path}: holds no keys"]
    return list(_keys(config)) or [
        *_ray_checks(config),
        *_node_configs(config),
        *_mounts(config),
        *_exposed(config),
        *_todo(config),
    ]


def possible(bootstrap: Path = BOOTSTRAP) -> dict[str, float]:
    """The CPUs and GPUs of as many machines as the cluster's file allows; {} without a file. For use on the head node. Ray itself
    knows these figures, but does not report them.
    """
    if given := os.environ.get(ROOM):
        return {name: float(most) for name, most in json.loads(given).items()}
    file = expanded(bootstrap)
    if not file.exists():
        return {}
    config = json.loads(file.read_text())
    most = {}
    for name in ("CPU", "GPU"):
        left, most[name] = config["max_workers"], 0.0
        groups = [group for key, group in config["available_node_types"].items() if key != config["head_node_type"]]
        for group in sorted(groups, key=lambda group: -group["resources"].get(name, 0)):
            machines = min(left, group["max_workers"])
            left, most[name] = left - machines, most[name] + machines * group["resources"].get(name, 0)
    return most


def _keys(config: dict[str, Any]) -> Iterator[str]:
    """Checks keys against Ray's own schema, and in `provider`, where the schema allows any key, against the known names."""
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    provider = config.get("provider")
    for error in jsonschema.Draft7Validator(schema).iter_errors(config):
        where = ".".join(map(str, error.absolute_path))
        if error.validator == "additionalProperties":
            yield from _unknown(where, error.instance, error.schema["properties"])
        else:
            yield f"{where}: {error.message}" if where else error.message
    if isinstance(provider, dict):
        yield from _unknown("provider", provider, {*schema["properties"]["provider"]["properties"], *PROVIDER_KEYS})
        if provider.get("type") == "local" and not {"head_ip", "worker_ips"} <= provider.keys():
            yield "provider: machines of your own need head_ip and worker_ips"


def _unknown(where: str, given: Any, known: Any) -> Iterator[str]:
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), list(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(known))}"
            yield f"{where + '.' if where else ''}{key}: no such key; {hint}"


def _ray_checks(config: dict[str, Any]) -> Iterator[str]:
    """Ray's own checks of the whole file, with its defaults filled in."""
    from workflows.private.ray import check_cluster_config

    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)
    try:
        check_cluster_config(config)
    except (ValueError, RuntimeError, AssertionError, KeyError) as error:
        yield f"{error}"
    for name, node in (config.get("available_node_types") or {}).items():
        if node.get("min_workers", 0) > node.get("max_workers", config.get("max_workers", 0)):
            yield f"available_node_types.{name}: min_workers is above max_workers"


def _node_configs(config: dict[str, Any]) -> Iterator[str]:
    check = {"aws": _aws, "gcp": _gcp}.get(config["provider"]["type"])
    for name, node in (config.get("available_node_types") or {}).items():
        if check:
            yield from check(f"available_node_types.{name}.node_config", node["node_config"])


def _aws(where: str, given: dict[str, Any]) -> Iterator[str]:
    """Checks against the parameters of EC2's RunInstances. SubnetIds is a key of Ray's own. Ray also fills in the counts."""
    from botocore.validate import ParamValidator

    wanted = {key: value for key, value in given.items() if key != "SubnetIds"} | {"MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(wanted, _run_instances()).generate_report()
    for line in report.splitlines():
        if found := re.fullmatch(r'Unknown parameter in (\S+): "(.+)", must be one of: (.*)', line):
            inside = where if found[1] == "input" else f"{where}.{found[1]}"
            yield from _unknown(inside, [found[2]], found[3].split(", "))
        else:
            yield f"{where}: {line}"


@cache
def _run_instances() -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _gcp(where: str, given: dict[str, Any]) -> Iterator[str]:
    """Checks against the fields of a Compute Engine instance, as described in the files of Google's client."""
    try:
        schemas = _compute_engine()
    except ImportError:
        yield "ray up needs Google's client for this provider: pip install 'mmdistill[gcp]'"
        return

    def walk(where: str, value: Any, shape: dict[str, Any]) -> Iterator[str]:
        shape = schemas[shape["$ref"]] if "$ref" in shape else shape
        if isinstance(value, list):
            for i, one in enumerate(value):
                yield from walk(f"{where}[{i}]", one, shape.get("items", {}))
        elif isinstance(value, dict) and "properties" in shape:
            yield from _unknown(where, value, shape["properties"])
            for key in value.keys() & shape["properties"].keys():
                yield from walk(f"{where}.{key}", value[key], shape["properties"][key])

    yield from walk(where, given, {"$ref": "Instance"})


@cache
def _compute_engine() -> dict[str, Any]:
    from googleapiclient.discovery_cache import get_static_doc

    schemas: dict[str, Any] = json.loads(get_static_doc("compute", "v1"))["schemas"]
    return schemas


def _mounts(config: dict[str, Any]) -> Iterator[str]:
    for remote, local in (config.get("file_mounts") or {}).items():
        file, token = expanded(local), str(remote).endswith("auth_token")
        if not file.exists():
            make = ": make it with `ray get-auth-token --generate`" if token else ""
            yield f"file_mounts: {local} is not there{make}"
        elif token and file.stat().st_mode & 0o077:
            yield f"file_mounts: {local} can be read by others: chmod 600 {local}"


def _exposed(config: dict[str, Any]) -> Iterator[str]:
    """Finds a head node that anybody could use: one without the token, or with its dashboard on every address."""
    for side in ("head", "worker"):
        key = f"{side}_start_ray_commands"
        commands = " ; ".join(config.get(key) or [])
        if "RAY_AUTH_MODE=token" not in commands:
            yield f"{key}: RAY_AUTH_MODE=token is not set before ray start: Ray would ask nobody for the token"
        for host in re.findall(r"--dashboard-host[= ](\S+)", commands):
            if host not in LOOPBACK:
                yield f"{key}: --dashboard-host {host} can be reached from outside; use 127.0.0.1 and `ray dashboard`"


def _todo(config: dict[str, Any]) -> Iterator[str]:
    if found := sorted(set(re.findall(r"\bYOUR-[A-Z]+\b", json.dumps(config)))):
        yield f"{', '.join(found)} is still to be filled in"
