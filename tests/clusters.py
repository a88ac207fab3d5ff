"""A Ray cluster of several nodes on this machine, of which any may be killed as a spot machine is."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time

QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "15",
}
"""So that a node that is gone is missed within seconds, where Ray's own numbers make it half a minute and more; and one that is
told to go does.
"""


LOOKS_EVERY = 21
"""Seconds between looks of Ray Train's autoscaler for nodes, and one. It lives as long as the cluster: a run that may have fewer
workers and begins sooner begins with those that there was room for before.
"""


class LocalCluster:
    """A head, and nodes with addresses of their own; `environment` is what a driver needs to join."""

    def __init__(self, folder, *, cpus=1, **environment):
        """`folder`: short, for Ray's sockets; `cpus` of the head; what the nodes know, as the keys of a store."""
        self.folder, self.nodes = folder, []
        token = os.path.join(folder, "token")
        with open(token, "w") as file:
            file.write("0123456789abcdef" * 2)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_TRACKING"))}
        self.environment = kept | environment | QUICK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
        words = f"--head --port 0 --include-dashboard false --temp-dir {folder} --num-cpus {cpus}"
        self.head, shown = self._start("127.0.0.1", words, r"--address='([\d.]+:\d+)'")
        self.environment["RAY_ADDRESS"] = shown

    def _start(self, ip, words, until):
        command = [
            f"{os.path.dirname(sys.executable)}/ray",
            "start",
            "--block",
            "--node-ip-address",
            ip,
            *words.split(),
        ]
        process = subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        shown = ""
        for line in process.stdout:
            shown += line
            if found := re.search(until, shown):
                return process, found[0] if not found.groups() else found[1]
        raise AssertionError(shown)

    def add(self, *, cpus, noticed=False):
        """A node more; its number. `noticed`: once Ray Train knows of it as well, which has looked before."""
        ip = f"127.0.0.{2 + len(self.nodes)}"
        words = f"--address {self.environment['RAY_ADDRESS']} --num-cpus {cpus}"
        self.nodes.append(self._start(ip, words, r"Ray runtime started")[0])
        if noticed:
            time.sleep(LOOKS_EVERY)
        return len(self.nodes) - 1

    def kill(self, number):
        """As a machine that is switched off: all its processes at once."""
        end(self.nodes[number], signal.SIGKILL)

    def stop(self):
        for process in (*self.nodes, self.head):
            end(process, signal.SIGKILL)


def end(process, how):
    """Its session: Ray's processes of a node."""
    if process.poll() is None:
        for member in _session(process.pid):
            try:
                os.kill(member, how)
            except ProcessLookupError:
                continue
        process.wait(timeout=60)


def _session(leader):
    members = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.getsid(int(name)) == leader:
                    members.append(int(name))
            except ProcessLookupError:
                continue
    return members


def temporary_folder():
    return tempfile.TemporaryDirectory(prefix="ray", dir="/tmp")
