"""Which Ray a run uses: what RAY_ADDRESS may say, who answers there, and what a Ray of our own needs. None is started here."""

import os
import socket
import subprocess
import sys
import threading
from concurrent import futures
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from small import ROOT

from workflows.cluster import addresses
from workflows.cluster.addresses import (
    OWN,
    check_address,
    check_environment,
    check_sockets,
    check_token,
    explained,
    find_place,
    refusal,
)
from workflows.errors import ConfigError, UserError


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    """A user with a home and a folder of Ray's of its own."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/ray-of-tests")


@contextmanager
def web_server():
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def silence():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def head(code=None, service="NodeInfoGcsService"):
    """A gRPC server that answers as the head of a Ray does, or with an error."""
    import grpc
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated import gcs_service_pb2_grpc as services

    class Alive(services.NodeInfoGcsServiceServicer):
        def CheckAlive(self, request, context):
            if code:
                context.abort(code, "no")
            return messages.CheckAliveReply()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    if service:
        services.add_NodeInfoGcsServiceServicer_to_server(Alive(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("myhead", "such as myhead:6379"),
        ("myhead/", "such as myhead:6379"),
        ("myhead:", "should be HOST:PORT"),
        ("myhead:http", "should be HOST:PORT"),
        ("myhead:99999", "should be HOST:PORT"),
        (":6379", "should be HOST:PORT"),
        ("my head:6379", "should be HOST:PORT"),
        ("tcp://myhead:6379", "should be HOST:PORT"),
        ("http://myhead:8265", "of the head, such as myhead:6379"),
        ("http://myhead:8265/", "of the head, such as myhead:6379"),
        ("https://myhead", "of the head, such as myhead:6379"),
    ],
)
def test_what_is_no_address_is_refused_before_anything_is_asked(monkeypatch, address, said):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS: ") as caught:
        check_environment()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        find_place()


@pytest.mark.parametrize("address", ["myhead:6379", "10.0.0.1:6379", "[::1]:6379", "ray://my-head.example:10001"])
def test_what_is_one(address):
    check_address(address)


def test_a_head_answers(monkeypatch):
    monkeypatch.setattr(addresses, "_has_node", lambda: True)
    with head() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert find_place() == addresses.Place(address)


def test_who_answers_as_no_head_does(monkeypatch):
    import grpc

    refused = grpc.StatusCode.UNAUTHENTICATED
    for place, said in (
        (web_server(), "what answers there is not Ray"),
        (head(service=None), "what answers there is not the head of a Ray"),
        (head(refused), "it wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH"),
    ):
        with place as address:
            monkeypatch.setenv("RAY_ADDRESS", address)
            with pytest.raises(UserError, match=f"ray: no cluster answers at {address} .{said}") as caught:
                find_place()
            assert "RAY_ADDRESS" in caught.value.hint
    with silence() as address:
        assert refusal(address, patience=0.5) == "it accepts connections, but did not answer within 0.5 s"
    assert refusal("127.0.0.1:9") == "Connection refused"
    assert refusal("nobody.invalid:6379", patience=2)


def test_a_token_that_is_wanted_and_not_there_is_a_line(monkeypatch):
    """Ray's own error of that is of ten lines."""
    from ray.exceptions import AuthenticationError

    def none(address):
        raise AuthenticationError(
            "RAY_AUTH_TOKEN_PATH is set but file cannot be opened: /nowhere. " + "And so on. " * 50
        )

    monkeypatch.setattr("ray._private.grpc_utils.init_grpc_channel", none)
    with silence() as address:
        assert "cannot be opened: /nowhere." in (refusal(address) or "")
        assert len(refusal(address) or "") <= 120


def test_a_cluster_without_a_node_here_is_a_line(monkeypatch):
    """Ray itself would look for one for a minute."""
    monkeypatch.setattr("ray._private.services.find_node_ids", lambda: set())
    monkeypatch.setattr(addresses, "PATIENCE", 0.1)
    with head() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=f"no node of the cluster at {address} runs on this machine"):
            find_place()


def noted(monkeypatch, tmp_path, address):
    """As `ray start` notes its address."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(addresses, "SOCKET", "")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)


def test_a_ray_that_was_started_here_is_joined(monkeypatch, tmp_path):
    with head() as address:
        noted(monkeypatch, tmp_path, address)
        place = find_place()
        assert (place.address, place.own) == ("auto", False)
        assert f"joins the one that was started on this machine, at {address}" in place.notice
        assert find_place(own=True) == addresses.Place(OWN)
        monkeypatch.setenv("RAY_ADDRESS", "local")
        assert find_place() == addresses.Place(OWN)
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        assert find_place() == addresses.Place("auto")


def test_one_that_was_killed_is_not_waited_for(monkeypatch, tmp_path):
    noted(monkeypatch, tmp_path, "127.0.0.1:9")
    place = find_place()
    assert place.own
    assert "does not answer at 127.0.0.1:9 (Connection refused): this run starts its own" in place.notice
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(
        UserError, match=r"RAY_ADDRESS=auto: what was started on this machine, at 127\.0\.0\.1:9, is gone"
    ):
        find_place()


def test_auto_where_there_is_none(monkeypatch):
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: set())
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UserError, match="RAY_ADDRESS=auto: no Ray runs on this machine"):
        find_place()


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_too_long_for_sockets_is_refused(monkeypatch, name):
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv(name, "/tmp/" + "x" * 95)
    with pytest.raises(ConfigError, match=f"^{name}: /tmp/x+ is .* too long .* set RAY_TMPDIR to a short one"):
        check_sockets()
    monkeypatch.setenv(name, "/tmp/" + "x" * 20)
    check_sockets()
    os.rmdir("/tmp/" + "x" * 20 + "/ray")
    os.rmdir("/tmp/" + "x" * 20)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("value", ["", "scratch", "~/scratch"])
def test_a_folder_that_means_another_to_each_process_is_refused(monkeypatch, tmp_path, name, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{name}: '{value}' should be an absolute path"):
        check_sockets()
    assert not list(tmp_path.iterdir())


def test_the_longest_socket_is_as_long_as_rays(monkeypatch):
    from ray._private.utils import validate_socket_filepath

    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * (addresses.LONGEST - len("/ray/") - len(addresses.SOCKET) - 1))
    longest = str(addresses.ray_folder() / addresses.SOCKET)
    validate_socket_filepath(longest)
    with pytest.raises(OSError, match="AF_UNIX"):
        validate_socket_filepath(longest + "x")


def test_a_folder_that_cannot_be_written_is_refused(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(addresses, "SOCKET", "")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file/ray cannot be written") as caught:
        check_sockets()
    assert "RAY_TMPDIR" in caught.value.hint


NAMELESS = """
import sys
from workflows.cluster.addresses import check_token
from workflows.errors import UserError
try:
    check_token()
except UserError as error:
    print(error, error.hint, sep="; ")
"""


@pytest.mark.parametrize(
    ("home", "said"),
    [
        (
            "/",
            "/.ray/auth_token, where Ray keeps its token, cannot be written (Permission denied): HOME is /; set HOME",
        ),
        (None, "HOME is not set, and this user has no home by name; set HOME to a folder of yours"),
        ("/proc", "/proc/.ray/auth_token, where Ray keeps its token, cannot be written"),
    ],
)
@pytest.mark.skipif(os.getuid() != 0, reason="another user's number takes root")
def test_a_user_without_a_home(home, said):
    environment = {k: v for k, v in os.environ.items() if k != "HOME"} | {"PYTHONPATH": str(ROOT)}
    environment |= {"HOME": home} if home else {}
    words = ["setpriv", "--reuid=54321", "--clear-groups", sys.executable, "-c", NAMELESS]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert said in done.stdout, done.stderr
    assert ("RAY_AUTH_TOKEN_PATH to a file" in done.stdout) == bool(home)


def test_a_token_that_is_there_is_enough(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/proc")
    with pytest.raises(UserError):
        check_token()
    for name, value in (("RAY_AUTH_TOKEN", "x" * 32), ("RAY_AUTH_MODE", "disabled")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            check_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match=r"RAY_AUTH_TOKEN_PATH: .* is not a readable file"):
        check_token()
    (tmp_path / "token").write_text("x" * 32)
    check_token()


def test_rays_errors_are_a_line_each():
    from ray.exceptions import AuthenticationError

    own, named = addresses.Place(OWN), addresses.Place("head:6379")
    for error, place, said, hint in (
        (Exception("The current node timed out during startup. This could happen."), own, "timed out", "less busy"),
        (OSError(28, "No space left on device", "/tmp/x"), own, "the disk is full (/tmp/x)", "RAY_TMPDIR"),
        (PermissionError(13, "Permission denied", "/tmp/x"), own, "/tmp/x: Permission denied", "RAY_TMPDIR"),
        (ValueError("two\n\x1b[31mlines\x1b[0m"), own, "two lines", "run it again"),
        (ConnectionError(""), named, "ConnectionError", "check RAY_ADDRESS"),
        (AuthenticationError("Token is missing"), named, "Token is missing", "RAY_AUTH_TOKEN_PATH"),
    ):
        told = explained(error, place)
        assert said in str(told)
        assert hint in told.hint
        assert "\n" not in str(told) + told.hint
