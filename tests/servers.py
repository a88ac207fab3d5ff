"""Servers of the tests, on the loopback: MLflow's, to be killed and started again; PostgreSQL; a proxy that spoils answers."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def free_port():
    """Below those that the kernel hands out: a server that is away for a while must find its own still free."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


class TrackingServer:
    """`mlflow server`, by default with SQLite in `folder`."""

    def __init__(self, folder, store=None):
        self.port, self.folder = free_port(), folder
        self.store = store or f"sqlite:///{folder}/server.db"
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        words = f"server --host 127.0.0.1 --port {self.port} --workers 1 --backend-store-uri {self.store}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words.split(), "--artifacts-destination", str(self.folder / "artifacts")],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
        end = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert time.monotonic() < end, "the tracking server does not answer"
                assert self.process.poll() is None, "the tracking server ended"
                time.sleep(0.2)

    def kill(self):
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class PostgreSQL:
    """A database of its own, as the user postgres where the tests run as root, who must get to its folder: none of pytest's."""

    def __init__(self):
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="postgresql-")), free_port()
        self.binaries = "/usr/lib/postgresql/15/bin"
        self.uri = f"postgresql+psycopg2://postgres@127.0.0.1:{self.port}/postgres"
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
        self._run("initdb", "-D", f"{self.folder}/data", "-A", "trust", "-U", "postgres", "--no-sync")
        self.start()

    def _run(self, name, *words):
        command = [f"{self.binaries}/{name}", *words]
        if os.getuid() == 0:
            command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]
        subprocess.run(command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _control(self, *words):
        self._run("pg_ctl", "-D", f"{self.folder}/data", "-l", f"{self.folder}/log", "-w", *words)

    def start(self):
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -c unix_socket_directories={self.folder}"
        self._control("-o", options, "start")

    def stop(self):
        """As if the machine had lost its power; nothing if it is stopped."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self._control("-m", "immediate", "stop")

    def close(self):
        self.stop()
        shutil.rmtree(self.folder)


class Proxy:
    """In front of a server. `status`: what it answers instead of it. `gone`: it hangs up. `cut(path)`: hand the request on, and
    hang up before the answer. `delay`: seconds before each answer. `seen`: (method, path, headers) of all requests.
    """

    def __init__(self, port):
        self.status, self.gone, self.delay = None, False, 0.0
        self.cut = lambda path: False
        self.seen = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self):
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = self._chunks()
                outer.seen.append((self.command, self.path, dict(self.headers)))
                if outer.gone:
                    return self._hang_up()
                if outer.status:
                    return self._send(outer.status, b"<html>no</html>", "text/html")
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                drop = {"transfer-encoding", "content-length"}
                headers = {name: value for name, value in self.headers.items() if name.lower() not in drop}
                upstream.request(self.command, self.path, body, headers)
                response = upstream.getresponse()
                content = response.read()
                upstream.close()
                time.sleep(outer.delay)
                if outer.cut(self.path):
                    return self._hang_up()
                self._send(response.status, content, response.headers.get("Content-Type", "application/json"))

            def _chunks(self):
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def _hang_up(self):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def _send(self, status, content, kind):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
