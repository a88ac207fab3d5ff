"""Object stores to test against: moto's server in memory, quick; Ceph's, real."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.request import urlopen

PLANTED = "PLANTEDSECRETKEY0123456789"
"""What must be found nowhere."""
KEYS = {"AWS_ACCESS_KEY_ID": "AKTEST", "AWS_SECRET_ACCESS_KEY": "SKTESTSECRET", "AWS_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(url: str, seconds: float = 60) -> None:
    """Waits until there is an answer, whatever it is."""
    until = time.monotonic() + seconds
    while True:
        try:
            urlopen(url, timeout=2).close()
            return
        except OSError as error:
            if getattr(error, "code", None):
                return
            if time.monotonic() > until:
                raise
        time.sleep(0.1)


@contextmanager
def moto(**environment: str):
    """The address of a server of moto's, in a process of its own."""
    port = free_port()
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | KEYS | environment
    )
    try:
        answers(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def forget_clients() -> None:
    """The next use of a store reads the environment again."""
    import s3fs

    from workflows.storage import s3

    s3._filesystem.cache_clear()
    s3.client.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def use(monkeypatch, endpoint: str, **environment: str) -> None:
    """Points this process and those that it starts at a store."""
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": endpoint} | environment).items():
        monkeypatch.setenv(name, value)
    forget_clients()


def bucket(endpoint: str, name: str) -> str:
    import boto3

    boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name=KEYS["AWS_REGION"],
    ).create_bucket(Bucket=name)
    return f"s3://{name}"
