"""Which Ray a run uses, found out before Ray is asked for anything: Ray itself tries for minutes where nobody answers, and falls
over what an earlier one left behind.

RAY_ADDRESS names a cluster (HOST:PORT of its head, or auto), or says "local". Without it a Ray that `ray start` began on this
machine is joined if it answers; else one is started for the length of the run.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflows.errors import ConfigError, UserError, home, in_a_line

OWN = "local"
PATIENCE = 10.0
"""Seconds that a head is waited for."""
SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
LONGEST = 107
"""Bytes of a socket's path, on Linux."""
LOCAL = "RAY_ADDRESS=local is a Ray of this run's own, on this machine"


@dataclass(frozen=True)
class Place:
    """`address` is what `ray.init` is to be given; `said`, for the screen, where the user may have expected another one."""

    address: str
    said: str = ""

    @property
    def own(self) -> bool:
        """Whether Ray is started by this run, and ends with it."""
        return self.address == OWN


def find_place(*, own: bool = False) -> Place:
    """What the environment says; `own`: one of our own in any case. Raises ConfigError for a value that can't be an address,
    UserError where no cluster answers, or where Ray can't be started.
    """
    named = OWN if own else _named_address()
    place = Place(OWN) if named == OWN else _named(named) if named else _of_this_machine()
    if place.own:
        check_own()
    return place


def _named_address() -> str:
    return os.environ.get("RAY_ADDRESS", "").strip()


def _named(address: str) -> Place:
    if address == "auto":
        from ray._private.services import find_gcs_addresses

        found = _started_here()
        if not found and not find_gcs_addresses():
            raise UserError("ray: RAY_ADDRESS=auto: no Ray runs on this machine", hint=LOCAL)
        if found and (why := refusal(found)):
            raise UserError(
                f"ray: RAY_ADDRESS=auto: what was started on this machine, at {found}, is gone ({why})", hint=LOCAL
            )
        return Place("auto")
    checked(address)
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


def _of_this_machine() -> Place:
    """Joins what `ray start` began here, if it is there. Ray notes its address in a file, and leaves it when it is killed."""
    found = _started_here()
    if found is None:
        return Place(OWN)
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as ray.init does before it joins
    if why := refusal(found):
        return Place(
            OWN, f"the one that was started on this machine does not answer at {found} ({why}): starts its own"
        )
    return Place("auto", f"joins the one that was started on this machine, at {found}; {LOCAL}")


def _started_here() -> str | None:
    """The address that the last `ray start` on this machine noted."""
    try:
        return (ray_folder() / "ray_current_cluster").read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def checked(address: str) -> None:
    """Raises ConfigError for what is not HOST:PORT, or ray://HOST:PORT."""
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
    """What can be told without asking anybody. Raises ConfigError, UserError."""
    home()
    named = _named_address()
    if named not in ("", "auto", OWN):
        checked(named)
    elif named == OWN or (not named and _started_here() is None):
        check_own()


def check_own() -> None:
    """Whether a Ray of our own can be started here. Raises ConfigError, UserError."""
    check_sockets()
    check_token()


def refusal(address: str, *, patience: float | None = None) -> str | None:
    """Why the head at this address is none, or does not answer; None for one that does."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
    from ray.exceptions import AuthenticationError

    request: Any = gcs_service_pb2

    patience = PATIENCE if patience is None else patience
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=patience).close()
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    try:
        channel = init_grpc_channel(place)
    except AuthenticationError as error:
        return in_a_line(str(error), 120)
    try:
        NodeInfoGcsServiceStub(channel).CheckAlive(request.CheckAliveRequest(), timeout=patience)
    except grpc.RpcError as error:
        code = error.code()
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return "it wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the one it was started with"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"it takes connections, but says nothing for {patience:g} s"
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return None if scheme == "ray" else "what answers there is not the head of a Ray"
        return "what answers there is not Ray"
    except AuthenticationError as error:  # there is none to be shown
        return in_a_line(str(error), 120)
    finally:
        channel.close()
    return None


def _has_node() -> bool:
    """Whether a node of some cluster runs here; one that was just started may take a moment."""
    from ray._private.services import find_node_ids

    end = time.monotonic() + PATIENCE
    while not find_node_ids():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def ray_folder() -> Path:
    """Where Ray has its sockets and logs."""
    return Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))) / "ray"


def check_sockets() -> None:
    """Raises ConfigError where Ray's sockets can't be: their paths have a limit, mean the same to all of its processes, and their
    folder has to be there.
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
    """Raises UserError where the token of a Ray of our own can neither be read nor be written: Ray makes one in the user's home."""
    env = os.environ
    if env.get("RAY_AUTH_MODE", "token").lower() != "token" or env.get("RAY_AUTH_TOKEN"):
        return
    hint = "set HOME to a folder of yours, or RAY_AUTH_TOKEN_PATH to a file with a token, any 32 letters"
    if named := env.get("RAY_AUTH_TOKEN_PATH"):
        if not os.access(named, os.R_OK):
            raise UserError(f"ray: RAY_AUTH_TOKEN_PATH: {named} is no file that can be read", hint=hint)
        return
    token = home() / ".ray" / "auth_token"
    if os.access(token, os.R_OK):
        return
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
    """What `ray.init` raised, by kind, in a line."""
    from ray.exceptions import AuthenticationError

    said = in_a_line(str(error)) or type(error).__name__
    if isinstance(error, AuthenticationError):
        hint = "set RAY_AUTH_TOKEN_PATH to a file with the token that the cluster was started with"
    elif not place.own:
        hint = f"check RAY_ADDRESS; {LOCAL}"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        said, hint = (
            f"the disk is full ({error.filename or ray_folder()})",
            "free space, or set RAY_TMPDIR; run it again",
        )
    elif isinstance(error, OSError) and error.filename:
        said, hint = f"{error.filename}: {error.strerror}", "set RAY_TMPDIR to a folder of yours with a short name"
    else:
        hint = f"run it again, when the machine is less busy; Ray's own logs are in {ray_folder() / 'session_latest' / 'logs'}"
    what = "it could not be started here: " if place.own else ""
    return UserError(f"ray: {what}{said}", hint=hint)
