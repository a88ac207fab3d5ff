"""AWS as far as `ray up` needs it, on one host and without a container engine: moto answers for EC2 and IAM, and each instance
that it lists as running becomes a machine of its own, with an address, processes, files and sshd (cloud/hypervisor.py).

All of it lives in namespaces that end with one process: nothing outside sees it, and nothing is left of it. Wants root.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from services import ROOT

HERE = Path(__file__).parent / "cloud"
GATEWAY = "10.42.0.1"
PROGRAMS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "sshd": "openssh-server",
            "ssh": "openssh-client", "rsync": "rsync"}  # fmt: skip
SSHD = """
Port 22
ListenAddress 0.0.0.0
HostKey {folder}/hostkey
AuthorizedKeysFile .ssh/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
PidFile none
MaxStartups 50
MaxSessions 50
Subsystem sftp internal-sftp
"""


def why_not() -> str:
    """Why it can't be made here; "" if it can."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if os.getuid() != 0:
        return "the test's cloud needs root, for namespaces"
    if missing := {package for program, package in PROGRAMS.items() if not shutil.which(program)}:
        return f"the test's cloud needs {', '.join(sorted(missing))}"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--fork", "ip", "link", "add", "x", "type", "veth"],
        capture_output=True,
        text=True,
    )
    return f"no network namespaces with veth here: {tried.stderr.strip()}" if tried.returncode else ""


def image_environment() -> dict[str, str]:
    """What ENV says in infra/docker/Dockerfile."""
    text = (ROOT / "infra/docker/Dockerfile").read_text().replace("\\\n", " ")
    lines = re.findall(r"^ENV (.*)$", text, re.M)
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))


class Cloud:
    """`folder`: where everything lies, its path short. The user's own machine is part of it: see `run`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "laptop"
        (self.home / ".ssh").mkdir(parents=True)
        self.account = {
            "AWS_ENDPOINT_URL": f"http://{GATEWAY}:5000",
            "AWS_ACCESS_KEY_ID": "AKTEST",
            "AWS_SECRET_ACCESS_KEY": "SKTEST",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._files()
        namespaces = ["--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(["unshare", *namespaces, sys.executable, str(HERE / "init.py")])
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        while not children.read_text():
            time.sleep(0.02)
        self._first = children.read_text().split()[0]
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends all that runs in it."""
        self._holder.kill()
        self._holder.wait()

    def run(
        self, *words: str, check: bool = True, timeout: float = 300, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """A command on the user's machine. `more`: environment."""
        done = subprocess.run(self._inside(words), env=self._environment() | more, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=timeout, cwd=ROOT)  # fmt: skip
        assert not check or done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def start(self, *words: str, log: str, **more: str) -> subprocess.Popen[bytes]:
        """The same in the background."""
        with (self.folder / log).open("w") as out:
            return subprocess.Popen(self._inside(words), env=self._environment() | more, stdout=out, stderr=out,
                                    stdin=subprocess.DEVNULL, cwd=ROOT)  # fmt: skip

    def ec2(self, script: str) -> Any:
        """What a line of Python gives, JSON, that has a client of EC2 as `ec2`."""
        line = f"import boto3, json; ec2 = boto3.client('ec2'); print(json.dumps({script}, default=str))"
        return json.loads(self.run(sys.executable, "-c", line).stdout)

    def instances(self) -> dict[str, dict[str, str]]:
        """Of those that run, by id: their `type` in the file, and `address`."""
        found = self.ec2("[i for r in ec2.describe_instances()['Reservations'] for i in r['Instances']]")
        out = {}
        for one in found:
            if one["State"]["Name"] == "running":
                tags = {tag["Key"]: tag["Value"] for tag in one.get("Tags", [])}
                out[one["InstanceId"]] = {
                    "type": tags.get("ray-user-node-type", ""),
                    "address": one["PrivateIpAddress"],
                }
        return out

    def machine(self, instance: str) -> int:
        """The process 1 of a machine, as the cloud numbers it."""
        return int(json.loads((self.folder / "machines" / instance).read_text())["process"])

    def on(self, instance: str, *words: str) -> str:
        """What a command on a machine prints."""
        enter = ["nsenter", "-t", str(self.machine(instance)), "--net", "--pid", "--mount"]
        return self.run(*enter, *words).stdout

    def _inside(self, words: tuple[str, ...]) -> list[str]:
        return ["nsenter", "-t", self._first, "--net", "--pid", "--mount", f"--wd={ROOT}", *words]

    def _environment(self) -> dict[str, str]:
        given = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_", "MLFLOW_", "MMDISTILL_"))}
        path = f"/usr/local/sbin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return (
            given
            | self.account
            | {"HOME": str(self.home), "PATH": path, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"}
        )

    def _files(self) -> None:
        image = image_environment()
        container = image | self.account | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        keep = [str(ROOT), sys.prefix, sys.base_prefix, str(self.folder)]
        quoted = lambda words: "(" + " ".join(map(shlex.quote, words)) + ")"  # noqa: E731
        lines = {
            "KEEP": quoted(keep),
            "PYTHON_BIN": shlex.quote(str(Path(sys.executable).parent)),
            "IMAGE_ENV": shlex.quote(json.dumps([f"{k}={v}" for k, v in image.items()])),
            "CONTAINER_HOME": shlex.quote(image["HOME"]),
            "CONTAINER_ENV": quoted([f"{k}={v}" for k, v in container.items()]),
        }
        (self.folder / "environment").write_text("".join(f"{k}={v}\n" for k, v in lines.items()))
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        # ssh asks here for a user's home. All are root by another name: what is asked of the image's user and of `ubuntu` works.
        ours = f"mmdistill:*:0:0::{image['HOME']}:/bin/bash\nubuntu:*:0:0::/home/ubuntu:/bin/bash\n"
        (self.folder / "passwd").write_text(ours + Path("/etc/passwd").read_text())
        shutil.copy(HERE / "session.py", self.folder)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "hostkey")], check=True)

    def _set_up(self) -> None:
        for line in (
            "ip link set lo up",
            "ip link add cloud type bridge",
            f"ip address add {GATEWAY}/16 dev cloud",
            "ip link set cloud up",
            f"ip route add default via {GATEWAY}",
            f"mount --bind {self.folder} /srv",
            f"bash -ec '. /srv/environment; . {HERE / 'fresh.sh'}; fresh /tmp; fresh /opt'",
            f"ln -s {sys.prefix} /opt/mmdistill",
            f"mount --bind {HERE / 'bin'} /usr/local/sbin",
            f"mount --bind {self.folder / 'passwd'} /etc/passwd",
        ):
            self.run(*shlex.split(line))
        moto = [sys.executable, "-m", "moto.server", "-H", GATEWAY, "-p", "5000"]
        self.start(*moto, log="moto.log")
        ask = f"import urllib.request as u; u.urlopen('http://{GATEWAY}:5000/moto-api/', timeout=2)"
        for _ in range(100):
            if self.run(sys.executable, "-c", ask, check=False).returncode == 0:
                break
            time.sleep(0.3)
        self.run(sys.executable, str(HERE / "ground.py"))
        self.start(sys.executable, str(HERE / "hypervisor.py"), str(self.folder), log="hypervisor.log")
