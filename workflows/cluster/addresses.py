"""Finds the Ray cluster that a run uses, before Ray is called. Ray itself tries for minutes where nobody answers, and fails on what
an earlier cluster left behind.

RAY_ADDRESS names a cluster (HOST:PORT of its head node, or auto), or is "local". Without it, a cluster that `ray start` started on
this machine is joined if it answers; otherwise one is started for the length of the run.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from workflows.errors import ConfigError, UserError, home, in_a_line

OWN = "local"
PATIENCE = 10.0
"""Seconds to wait for a head node."""
SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
LONGEST = 107
"""The most bytes that the path of a socket may have on Linux."""
LOCAL = "RAY_ADDRESS=local starts a Ray for this run alone, on this machine"


@dataclass(frozen=True)
class Place:
    """`address` is passed to `ray.init`. `notice` is shown where the user may have expected another cluster."""

    address: str
    notice: str = ""

    @property
    def own(self) -> bool:
        """Whether this run starts Ray, and shuts it down."""
        return self.address == OWN


def find_place(*, own: bool = False) -> Place:
    """The cluster that the environment asks for; with `own` always a Ray started by this run. Raises ConfigError for a value that
    can't be an address, UserError if no cluster answers, or Ray can't be started.
    """
    named = OWN if own else _named_address()
    place = Place(OWN) if named == OWN else _place_at(named) if named else _place_here()
    if place.own:
        check_own()
    return place


def _named_address() -> str:
    return os.environ.get("RAY_ADDRESS", "").strip()


def _place_at(address: str) -> Place:
    if address == "auto":
        from workflows.private.ray import heads_on_this_machine

        started = _started_here()
        if not started and not heads_on_this_machine():
            raise UserError("ray: RAY_ADDRESS=auto: no Ray runs on this machine", hint=LOCAL)
        if started and (why := refusal(started)):
            raise UserError(
                f"ray: RAY_ADDRESS=auto: what was started on this machine, at {started}, is gone ({why})", hint=LOCAL
            )
        return Place("auto")
    check_address(address)
    if why := refusal(address):
        raise UserError(
            f"ray: no cluster answers at {address} ({why})",
            hint=f"check RAY_ADDRESS: HOST:PORT of the cluster's head, by default port 6379; {LOCAL}",
        )
    if "://" not in address and not _has_node():
        raise UserError(
            f"ray: no node of the cluster at {address} runs on this machine, and a run has to start on one",
            hint="run it there, or send it there with `mmdistill submit`; or join this machine by `ray start --address`",
        )
    return Place(address)


def _place_here() -> Place:
    """Joins the Ray that `ray start` started here, if it answers. Ray notes its address in a file, which outlives a killed Ray."""
    address = _started_here()
    if address is None:
        return Place(OWN)
    from workflows.private.ray import load_token

    load_token()
    if why := refusal(address):
        notice = (
            f"the one that was started on this machine does not answer at {address} ({why}): this run starts its own"
        )
        return Place(OWN, notice)
    return Place("auto", f"joins the one that was started on this machine, at {address}; {LOCAL}")


def _started_here() -> str | None:
    """The address that the last `ray start` on this machine noted."""
    try:
        return (ray_folder() / "ray_current_cluster").read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def check_address(address: str) -> None:
    """Raises ConfigError for an address that is neither HOST:PORT nor ray://HOST:PORT."""
    scheme, _, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        host = rest.partition("/")[0].rpartition(":")[0] or rest.partition("/")[0]
        raise ConfigError(
            f"RAY_ADDRESS: {address!r} is a dashboard's address, which `mmdistill submit` takes (RAY_API_SERVER_ADDRESS); "
            f"a run needs that of the head, such as {host or 'HOST'}:6379"
        )
    host, colon, port = rest.rpartition(":")
    numbered = colon and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 2**16
    if scheme in ("", "ray") and numbered and re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", host):
        return
    known = rest.rstrip("/") if re.fullmatch(r"[\w.-]+/?", rest) else "HOST"
    raise ConfigError(f"RAY_ADDRESS: {address!r} should be HOST:PORT, such as {known}:6379, auto, or local")


def check_environment() -> None:
    """Checks what can be checked without a connection. Raises ConfigError, UserError."""
    home()
    named = _named_address()
    if named not in ("", "auto", OWN):
        check_address(named)
    elif named == OWN or (not named and _started_here() is None):
        check_own()


def check_own() -> None:
    """Checks whether Ray can be started on this machine. Raises ConfigError, UserError."""
    check_sockets()
    check_token()


def refusal(address: str, *, patience: float | None = None) -> str | None:
    """Why there is no usable head node at this address, or None if one answers."""
    import grpc
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
    from ray.exceptions import AuthenticationError

    from workflows.private.ray import head_channel

    patience = PATIENCE if patience is None else patience
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=patience).close()
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    try:
        with closing(head_channel(place)) as channel:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=patience)
    except AuthenticationError as error:  # there is no token to send
        return in_a_line(str(error), 120)
    except grpc.RpcError as error:
        code = error.code()
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return "it wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the one it was started with"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"it accepts connections, but did not answer within {patience:g} s"
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return None if scheme == "ray" else "what answers there is not the head of a Ray"
        return "what answers there is not Ray"
    return None


def _has_node() -> bool:
    """Whether a node of some cluster runs on this machine. A node that was just started may take a moment to appear."""
    from workflows.private.ray import nodes_on_this_machine

    end = time.monotonic() + PATIENCE
    while not nodes_on_this_machine():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def ray_folder() -> Path:
    """The folder of Ray's sockets and logs."""
    return Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))) / "ray"


def check_sockets() -> None:
    """Raises ConfigError if the path of Ray's sockets is too long, or relative (all of Ray's processes use it). Raises UserError if
    their folder can't be written.
    """
    folder = ray_folder()
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    if not folder.is_absolute():
        raise ConfigError(f"{name}: {os.environ[name]!r} should be an absolute path: Ray keeps its sockets below it")
    length = len(os.fsencode(folder / SOCKET))
    if length > LONGEST:
        raise ConfigError(
            f"{name}: {folder.parent} is {length - LONGEST} characters too long for the sockets that Ray keeps below it; "
            "set RAY_TMPDIR to a short one, such as /tmp"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"ray: {folder} cannot be written ({error.strerror}), where Ray keeps its sockets and logs",
            hint="set RAY_TMPDIR to a folder of yours with a short name",
        ) from error


def check_token() -> None:
    """Raises UserError if the token of a Ray started here can be neither read nor written. Ray creates one in the user's home."""
    env = os.environ
    if env.get("RAY_AUTH_MODE", "token").lower() != "token" or env.get("RAY_AUTH_TOKEN"):
        return
    hint = "set HOME to a folder of yours, or RAY_AUTH_TOKEN_PATH to a file with a token, any 32 letters"
    named = env.get("RAY_AUTH_TOKEN_PATH")
    token = Path(named) if named else home() / ".ray" / "auth_token"
    if os.access(token, os.R_OK):
        return
    if named:
        raise UserError(f"ray: RAY_AUTH_TOKEN_PATH: {named} is not a readable file", hint=hint)
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        if token.exists() or not os.access(token.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"ray: {token}, where Ray keeps its token, cannot be written ({error.strerror}): "
            f"HOME is {env.get('HOME') or 'not set'}",
            hint=hint,
        ) from error


def explained(error: Exception, place: Place) -> UserError:
    """An error of `ray.init` in one line, with a hint for its kind."""
    from ray.exceptions import AuthenticationError

    reason = in_a_line(str(error)) or type(error).__name__
    if isinstance(error, AuthenticationError):
        hint = "set RAY_AUTH_TOKEN_PATH to a file with the token that the cluster was started with"
    elif not place.own:
        hint = f"check RAY_ADDRESS; {LOCAL}"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"the disk is full ({error.filename or ray_folder()})"
        hint = "free space, or set RAY_TMPDIR; run it again"
    elif isinstance(error, OSError) and error.filename:
        reason, hint = f"{error.filename}: {error.strerror}", "set RAY_TMPDIR to a folder of yours with a short name"
    else:
        hint = f"run it again, when the machine is less busy; Ray's own logs are in {ray_folder() / 'session_latest' / 'logs'}"
    what = "it could not be started here: " if place.own else ""
    return UserError(f"ray: {what}{reason}", hint=hint)
