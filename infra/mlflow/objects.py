"""MLflow's artifacts in the S3 store, below the prefix mlflow/ of the bucket MMDISTILL_BUCKET.

check           1 if the bucket can't be listed
save FOLDER     every object as FOLDER/objects/<hash>, and FOLDER/objects.jsonl: {"key", "size", "sha256"} a line
list FOLDER     objects.jsonl alone
verify FOLDER   1 if an object of the list is missing there or is not what its hash says
load FOLDER     puts the objects of such a folder back, and looks whether they are there

A failure is a line on standard output.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

PREFIX = "mlflow/"
BLOCK = 1 << 22


def fail(message: str) -> NoReturn:
    """For the script that called: one line on standard output, and 1."""
    print(message)
    sys.exit(1)


def bucket() -> tuple[Any, str]:
    """(client, name)."""
    import boto3
    from botocore.config import Config

    config = Config(connect_timeout=5, read_timeout=120, retries={"max_attempts": 4})
    return boto3.client("s3", config=config), os.environ["MMDISTILL_BUCKET"].removeprefix("s3://")


def check() -> None:
    """Fails if the bucket does not answer."""
    from botocore.exceptions import BotoCoreError, ClientError

    client, name = bucket()
    try:
        client.list_objects_v2(Bucket=name, Prefix=PREFIX, MaxKeys=1)
    except (BotoCoreError, ClientError, ValueError) as error:
        fail(str(error).splitlines()[0])


def keys(client: Any, name: str) -> Iterator[tuple[str, int]]:
    """(key, size) of all artifacts."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name, Prefix=PREFIX):
        for entry in page.get("Contents", []):
            yield entry["Key"], entry["Size"]


def save(folder: Path, *, contents: bool) -> tuple[int, int]:
    """Reads every object, hashes it, and keeps it if `contents`. Returns (objects, bytes)."""
    client, name = bucket()
    objects = folder / "objects"
    if contents:
        objects.mkdir()
    number = total = 0
    with (folder / "objects.jsonl").open("w") as listing:
        for key, size in keys(client, name):
            digest, length = hashlib.sha256(), 0
            part = objects / "part"
            try:
                body = client.get_object(Bucket=name, Key=key)["Body"]
            except client.exceptions.NoSuchKey:  # deleted since it was listed
                continue
            with part.open("wb") if contents else open(os.devnull, "wb") as file:
                for block in body.iter_chunks(BLOCK):
                    digest.update(block)
                    length += len(block)
                    file.write(block)
                file.flush()
                if contents:
                    os.fsync(file.fileno())
            if length != size:
                fail(f"{key}: {length} bytes came of {size}: it changed meanwhile; start the backup again")
            if contents:
                part.rename(objects / digest.hexdigest())
            print(json.dumps({"key": key, "size": size, "sha256": digest.hexdigest()}), file=listing)
            number, total = number + 1, total + size
    return number, total


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "objects.jsonl").read_text().splitlines()]


def verify(folder: Path) -> None:
    """Every object of the list is there, whole. Fails with the first that isn't."""
    seen: set[str] = set()
    for entry in entries(folder):
        path = folder / "objects" / entry["sha256"]
        if not entry["key"].startswith(PREFIX):
            fail(f"{entry['key']}: is not below {PREFIX}")
        if entry["sha256"] in seen:
            continue
        if not path.is_file() or path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
            fail(f"{entry['key']}: its object {path.name} is missing or damaged")
        seen.add(entry["sha256"])


def load(folder: Path) -> int:
    """Puts every object back under its key. Returns their number."""
    client, name = bucket()
    found = entries(folder)
    for entry in found:
        client.upload_file(str(folder / "objects" / entry["sha256"]), name, entry["key"])
    sizes = dict(keys(client, name))
    for entry in found:
        if sizes.get(entry["key"]) != entry["size"]:
            fail(f"{entry['key']}: is not in the store as it was put there")
    return len(found)


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    if command == "check":
        check()
    elif command in ("save", "list"):
        number, total = save(Path(folders[0]), contents=command == "save")
        print(f"{number} objects, {total} bytes")
    elif command == "verify":
        verify(Path(folders[0]))
    elif command == "load":
        print(f"{load(Path(folders[0]))} objects")
    else:
        fail(f"objects.py: no command {command}")
