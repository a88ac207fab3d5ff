"""Makes of each instance that moto lists as running a machine: an address, a network, processes and a /tmp of its own, sshd.

What moto lists as terminated is ended with all that runs in it. Runs inside the cloud's namespaces; argv: the cloud's folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import boto3

HERE = Path(__file__).parent
FOLDER = Path(sys.argv[1])


def running() -> dict[str, str]:
    """Instance's id -> private address."""
    pages = boto3.client("ec2").get_paginator("describe_instances").paginate()
    instances = [one for page in pages for r in page["Reservations"] for one in r["Instances"]]
    return {one["InstanceId"]: one["PrivateIpAddress"] for one in instances if one["State"]["Name"] == "running"}


def boot(name: str, address: str) -> subprocess.Popen[bytes]:
    """Returns what holds the machine: when it is killed, all of the machine is."""
    keys = boto3.client("ec2").describe_key_pairs(IncludePublicKey=True)["KeyPairs"]
    (FOLDER / "authorized_keys").write_text("".join(f"{key['PublicKey'].strip()}\n" for key in keys))
    namespaces = ["--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
    with (FOLDER / f"{name}.log").open("w") as log:
        words = ["unshare", *namespaces, "bash", str(HERE / "machine.sh"), address, str(FOLDER)]
        machine = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children")
    while not children.read_text():
        time.sleep(0.02)
    first = children.read_text().split()[0]
    wire = f"w{name[-8:]}"
    ip = ["ip", "link"]
    subprocess.run([*ip, "add", wire, "type", "veth", "peer", "name", "eth0", "netns", first], check=True)
    subprocess.run([*ip, "set", wire, "master", "cloud", "up"], check=True)
    (FOLDER / "machines" / name).write_text(json.dumps({"address": address, "process": int(first)}))
    return machine


def main() -> None:
    machines: dict[str, subprocess.Popen[bytes]] = {}
    (FOLDER / "machines").mkdir(exist_ok=True)
    while True:
        instances = running()
        for name in instances.keys() - machines.keys():
            machines[name] = boot(name, instances[name])
        for name in machines.keys() - instances.keys():
            machines[name].kill()
            machines.pop(name).wait()
            os.rename(FOLDER / "machines" / name, FOLDER / f"{name}.gone")
        time.sleep(0.3)


if __name__ == "__main__":
    main()
