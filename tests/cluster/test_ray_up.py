"""cluster/aws.yaml really brought up, without a cloud: moto's EC2, machines that are namespaces of this one, Ray's own launcher.

The file is the one that is shipped, but for the minutes that an idle machine stays. Not real here: Docker (bin/docker runs what
it is told in this repository's own Python), Systems Manager's tunnel, GPUs, and what AWS itself would refuse.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aws_cloud import Cloud, why_not
from services import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
JOB = "http://127.0.0.1:8265"


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="cloud", dir="/tmp"))  # Ray's sockets and ssh's want a short path
    one = Cloud(folder)
    try:
        yield one
    finally:
        one.close()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def file(cloud: Cloud) -> str:
    """cluster/aws.yaml with idle machines going after 12 s, and the token made as README says."""
    text = (ROOT / "cluster/aws.yaml").read_text()
    quick = text.replace("idle_timeout_minutes: 5\n", "idle_timeout_minutes: 0.2\n")
    assert quick != text
    (cloud.folder / "aws.yaml").write_text(quick)
    return str(cloud.folder / "aws.yaml")


def wait(what: str, seconds: float, of: Callable[[], Any]) -> Any:
    """What `of` gives, once it is true."""
    end = time.monotonic() + seconds
    while not (found := of()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(1)
    return found


def told(cloud: Cloud) -> dict[str, dict]:
    """The steps that hold.py has told of."""
    shown = cloud.run("ray", "job", "logs", "hold", "--address", JOB, check=False).stdout
    return {line["step"]: line for line in map(json.loads, re.findall(r"^\{.*\}$", shown, re.M))}


def ask(cloud: Cloud, url: str, token: str = "") -> str:
    """The answer's status, or the name of the error."""
    header = f"{{'Authorization': 'Bearer {token}'}}" if token else "{}"
    script = f"""
import requests
try:
    print(requests.get({url!r}, headers={header}, timeout=10).status_code)
except requests.RequestException as error:
    print(type(error).__name__)"""
    return cloud.run(sys.executable, "-c", script).stdout.strip()


@dataclass
class Up:
    """The cluster, brought up; the tunnel to its head stands at JOB. `took`: seconds of each step, shown at the end."""

    head: str
    address: str
    token: str
    took: dict[str, float] = field(default_factory=dict)


@contextmanager
def timed(up: Up, step: str) -> Iterator[None]:
    since = time.monotonic()
    yield
    up.took[step] = round(time.monotonic() - since)


@pytest.fixture(scope="module")
def up(cloud: Cloud, file: str) -> Iterator[Up]:
    cloud.run("bash", "-c", "umask 077; ray get-auth-token --generate >/dev/null")
    assert "ready for ray up" in cloud.run("mmdistill", "doctor", "--cluster", file, COLUMNS="200").stdout
    since = time.monotonic()
    cloud.run("ray", "up", "--yes", "--no-config-cache", file)
    ((head, of_head),) = cloud.instances().items()
    assert of_head["type"] == "head"
    one = Up(head, of_head["address"], (cloud.home / ".ray/auth_token").read_text().strip())
    one.took["up"] = round(time.monotonic() - since)
    tunnel = cloud.start("ray", "dashboard", "--no-config-cache", file, log="tunnel.log")
    wait("the tunnel", 60, lambda: ask(cloud, f"{JOB}/api/jobs/", one.token) == "200")
    yield one
    tunnel.terminate()
    tunnel.wait()
    print("seconds:", one.took)


def test_without_a_token_nothing_is_asked_for(cloud: Cloud, file: str) -> None:
    done = cloud.run("mmdistill", "doctor", "--cluster", file, check=False, COLUMNS="200")
    assert done.returncode == 1
    assert "~/.ray/auth_token is not there: make it with `ray get-auth-token --generate`" in done.stdout


def test_nobody_comes_in_but_with_the_token_and_through_the_tunnel(cloud: Cloud, up: Up) -> None:
    assert ask(cloud, f"{JOB}/api/jobs/") == "401"
    assert ask(cloud, f"{JOB}/api/jobs/", "0" * 64) in ("401", "403")
    assert ask(cloud, f"http://{up.address}:8265/api/jobs/", up.token) == "ConnectionError", (
        "the dashboard is on loopback"
    )
    used = cloud.ec2(f"ec2.describe_instances(InstanceIds=['{up.head}'])['Reservations'][0]['Instances'][0]")
    assert not used.get("PublicIpAddress")
    ours = {group["GroupId"] for group in used["SecurityGroups"]}
    for group in cloud.ec2("ec2.describe_security_groups()['SecurityGroups']"):
        if group["GroupId"] in ours:
            assert all(not rule["IpRanges"] and not rule["Ipv6Ranges"] for rule in group["IpPermissions"]), group


def test_two_workers_come_one_is_replaced_and_both_go(cloud: Cloud, up: Up) -> None:
    with timed(up, "two workers"):
        job = ["ray", "job", "submit", "--address", JOB, "--submission-id", "hold", "--no-wait"]
        cloud.run(*job, "--working-dir", str(Path(__file__).parent / "cloud/job"), "--", "python", "hold.py")
        placed = wait("both groups", 420, lambda: told(cloud).get("placed"))
    workers = {one["type"]: name for name, one in cloud.instances().items() if name != up.head}
    addresses = {one["type"]: one["address"] for one in cloud.instances().values()}
    assert (placed["cpu"], placed["gpu"]) == (addresses["cpu"], addresses["gpu"]), "one machine of each group"
    most = told(cloud)["begun"]["most"]
    assert (most["CPU"], most["GPU"]) == (8 * 16 + 16 * 8, 16), "a driver learns what the cluster can ever place"
    for worker in workers.values():
        mode = cloud.on(worker, "stat", "-c", "%a", "/home/mmdistill/.ray/auth_token")
        assert mode.strip() == "600", "the head gave it the token"
    no_secret(cloud, [up.head, *workers.values()], up.token)

    with timed(up, "replaced"):
        assert kill_raylet(cloud, workers["gpu"]) == 1
        replaced = wait("another machine", 420, lambda: told(cloud).get("replaced"))
    now = {one["type"]: (name, one["address"]) for name, one in cloud.instances().items()}
    assert replaced["gpu"] == now["gpu"][1] != placed["gpu"]
    assert workers["gpu"] not in cloud.instances(), "the old one costs nothing more"

    with timed(up, "back to zero"):
        wait("idle machines to go", 300, lambda: set(cloud.instances()) == {up.head})
    done = cloud.run("ray", "job", "status", "hold", "--address", JOB)
    assert "succeeded" in (done.stdout + done.stderr).lower()


def test_a_distillation_begins_without_a_worker_and_ends_with_a_student(cloud: Cloud, up: Up) -> None:
    """All stages, three steps each. The workspace is a folder that all machines share: the only one they do."""
    workspace = cloud.folder / "shared"
    words = ["--recipe", "digits", "--smoke", "--set", "distill.k=[2]", "--workspace", str(workspace), "--workers", "2"]
    with timed(up, "distillation"):
        cloud.run("mmdistill", "submit", "run", *words, "--no-gpu", "--address", JOB, timeout=600)
    assert (workspace / "reports/digits-smoke/report.html").exists()
    listed = cloud.run("mmdistill", "jobs", "list", "--address", JOB, COLUMNS="200").stdout
    assert "run-digits-smoke" in listed
    assert up.token not in listed


def test_down_ends_all(cloud: Cloud, file: str, up: Up) -> None:
    with timed(up, "down"):
        cloud.run("ray", "down", "--yes", file)
        wait("the head to go", 60, lambda: not cloud.instances())


OWN = """
import boto3, sys
sys.argv = ["hypervisor", {folder!r}]
sys.path.insert(0, {here!r})
import hypervisor
boto3.client("ec2").import_key_pair(KeyName="own", PublicKeyMaterial=open({key!r}).read())
hypervisor.boot("own-0001", "10.42.9.1")
hypervisor.boot("own-0002", "10.42.9.2")
"""


def test_machines_of_ones_own(cloud: Cloud, up: Up) -> None:
    """cluster/local.yaml, with the addresses of two machines that nobody started for it."""
    key = cloud.home / ".ssh/id_ed25519"
    cloud.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    here = str(Path(__file__).parent / "cloud")
    cloud.run(sys.executable, "-c", OWN.format(folder=str(cloud.folder), here=here, key=f"{key}.pub"))
    text = (ROOT / "cluster/local.yaml").read_text().replace("192.168.1.10", "10.42.9.1")
    text = text.replace("[192.168.1.11, 192.168.1.12]", "[10.42.9.2]").replace("~/.ssh/id_ed25519", str(key))
    # ssh finds a home by the user's number, which here several users share.
    link = "mkdir -p /home/mmdistill; ln -s /home/ubuntu/ray_bootstrap_key.pem /home/mmdistill"
    cloud.on("own-0001", "bash", "-c", link)
    file = cloud.folder / "local.yaml"
    file.write_text(text)
    cloud.run("mmdistill", "doctor", "--cluster", str(file))
    with timed(up, "own machines up"):
        cloud.run("ray", "up", "--yes", "--no-config-cache", str(file))
        status = ("ray", "exec", "--no-config-cache", str(file), "RAY_AUTH_MODE=token /opt/mmdistill/bin/ray status")
        wait("both machines", 300, lambda: "2 local.cluster.node" in cloud.run(*status, check=False).stdout)
    assert ask(cloud, "http://10.42.9.1:8265/api/jobs/", up.token) == "ConnectionError", "the dashboard is on loopback"
    cloud.run("ray", "down", "--yes", str(file))


def no_secret(cloud: Cloud, machines: list[str], token: str) -> None:
    """The token is in no log, no command line and no configuration, but in its own file."""
    for machine in machines:
        files = "/proc/[0-9]*/cmdline /tmp/docker.log /home/mmdistill/ray_bootstrap_config.yaml /tmp/ray/session_latest/logs/*"
        seen = cloud.on(machine, "bash", "-c", f"cat {files} 2>/dev/null; true")
        assert "raylet" in seen
        assert token not in seen
    answered = cloud.run("ray", "job", "list", "--address", JOB).stdout
    assert token not in answered


def kill_raylet(cloud: Cloud, machine: str) -> int:
    """The raylet of this one machine, by its process id there. Returns how many there were."""
    script = """
import os, signal
from pathlib import Path
found = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/comm") if p.read_text().strip() == "raylet"]
for one in found: os.kill(one, signal.SIGKILL)
print(len(found))"""
    return int(cloud.on(machine, sys.executable, "-c", script))
