"""Private parts of Ray's core."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any


def heads_on_this_machine() -> set[str]:
    """Addresses of the clusters whose head runs on this machine. `ray.init` finds them too, but joins one."""
    from ray._private.services import find_gcs_addresses

    found: set[str] = find_gcs_addresses()
    return found


def nodes_on_this_machine() -> Any:
    """Ids of the nodes on this machine, of any cluster. Ray's public list covers only the cluster that was joined."""
    from ray._private.services import find_node_ids

    return find_node_ids()


def load_token() -> None:
    """Loads the token of a cluster on this machine. `ray.init` does so too, but only before it joins."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def head_channel(place: str) -> Any:
    """A gRPC channel to the head at HOST:PORT, with the token. `ray.init` would wait for minutes if nobody answers."""
    from ray._private.grpc_utils import init_grpc_channel

    return init_grpc_channel(place)


def most_resources() -> dict[str, float]:
    """The cluster's resources once its autoscaler has added all nodes that it may add; {} if unknown."""
    from ray._private.state import state

    return dict(state.get_max_resources_from_cluster_config() or {})


def actors_of_this_driver(*class_names: str) -> Iterator[Any]:
    """Handles of this driver's living actors of these classes. Ray's public list omits unnamed actors, as Ray Train's are."""
    import ray
    from ray._private.state import actors
    from ray._private.worker import global_worker

    driver: Any = global_worker
    own = ray.get_runtime_context().get_job_id()
    for name, actor in actors().items():
        if actor["ActorClassName"] in class_names and (actor["JobID"], actor["State"]) == (own, "ALIVE"):
            yield driver.core_worker.get_actor_handle(ray.ActorID.from_hex(name))


def check_cluster_config(config: dict[str, Any]) -> None:
    """The checks of `ray up` on its file, before it calls the cloud. Raises ValueError and others."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


def job_client(address: str, headers: dict[str, str], *, seconds: Any) -> Any:
    """A client for the jobs at this address, whose requests have a time-out. Ray's client has none, and prefers the environment's
    address to its argument.
    """
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": seconds} | options)

    kept = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        return Client(address, headers=dict(headers))
    finally:
        os.environ.update(kept)


def keep_credentials_from_trials() -> None:
    """Stops Tune from passing the driver's AWS keys in the environment of trials, which Ray logs. No option prevents it."""
    from ray.tune.execution import class_cache

    passed = class_cache.ENV_VARS_TO_PROPAGATE
    passed.difference_update({name for name in passed if name.startswith("AWS_")})
