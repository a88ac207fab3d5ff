"""The only file that knows fsspec, s3fs and boto3: files by path or URI, the same calls for both.

Credentials come by the standard chain alone (environment, profile, role). Everything else of S3 is read from the environment, where
the command line's options put it: AWS_ENDPOINT_URL, AWS_REGION, AWS_CA_BUNDLE, MMDISTILL_S3_ADDRESSING (auto, path, virtual) and
MMDISTILL_S3_TIMEOUT (seconds a request may be silent). A request that is refused for now (429, 5xx), cut off or silent is made
again, with growing pauses; what was written is compared with what the store says that it holds.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from workflows.runtime.errors import UserError

T = TypeVar("T")

PART = 50 * 1024**2
"""Bytes of a part of a multipart upload; objects of less than two go in one request."""
TRIES = 9
AT_ONCE = 8
TOLD = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_CA_BUNDLE",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "MMDISTILL_S3_ADDRESSING",
    "MMDISTILL_S3_TIMEOUT",
    "MMDISTILL_CACHE",
)
"""What workers on other machines are told of the driver's environment: no credential is among them."""

# Checksums in trailers, the default of the SDKs, are answered with 411 by servers that are not AWS.
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")


class Changed(OSError):
    """The store holds other bytes than were written."""


@dataclass(frozen=True)
class Entry:
    """A file as its store lists it; `tag` changes with its content."""

    size: int
    tag: str


def is_remote(uri: str | Path) -> bool:
    return "://" in str(uri) and not str(uri).startswith("file://")


def join(uri: str | Path, *parts: str) -> str:
    return "/".join([str(uri).rstrip("/"), *parts])


def shown(uri: str | Path) -> str:
    """The URI without credentials that it may hold, for screens and logs."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", str(uri))


def told() -> dict[str, str]:
    return {name: os.environ[name] for name in TOLD if name in os.environ}


def cache_folder() -> Path:
    """Where copies of remote files are kept on this machine."""
    named = os.environ.get("MMDISTILL_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named).expanduser() if named else Path(base) / "mmdistill"


@dataclass(frozen=True)
class S3Settings:
    endpoint: str | None
    region: str | None
    ca: str | None
    addressing: str
    timeout: float
    attempts: int = 5

    @staticmethod
    def of_environment() -> S3Settings:
        env = os.environ
        addressing = env.get("MMDISTILL_S3_ADDRESSING", "auto")
        if addressing not in ("auto", "path", "virtual"):
            raise UserError(f"MMDISTILL_S3_ADDRESSING: {addressing!r} is not one of auto, path, virtual")
        try:
            timeout = float(env.get("MMDISTILL_S3_TIMEOUT", 30))
        except ValueError:
            raise UserError(
                f"MMDISTILL_S3_TIMEOUT: {env['MMDISTILL_S3_TIMEOUT']!r} is not a number of seconds"
            ) from None
        ca = env.get("AWS_CA_BUNDLE")
        if ca and not Path(ca).is_file():
            raise UserError(f"AWS_CA_BUNDLE: {ca} is not a file")
        endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
        if endpoint and (urlsplit(endpoint).scheme not in ("http", "https") or "@" in endpoint):
            raise UserError(
                f"AWS_ENDPOINT_URL: {shown(endpoint)!r} should be http://HOST or https://HOST, without credentials in it"
            )
        return S3Settings(
            endpoint=endpoint,
            region=env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION"),
            ca=ca,
            addressing=addressing,
            timeout=timeout,
        )

    def config(self) -> dict[str, Any]:
        """botocore's Config."""
        return {
            "connect_timeout": min(10.0, self.timeout),
            "read_timeout": self.timeout,
            "retries": {"mode": "standard", "max_attempts": self.attempts},
            "s3": {"addressing_style": self.addressing},
            "max_pool_connections": 32,
        }


def filesystem(uri: str | Path, **changes: Any) -> tuple[Any, str]:
    """fsspec's file system for a path or URI, and the path within it; `changes` of S3's settings. Raises UserError for a protocol
    that is not known.
    """
    protocol, _, rest = str(uri).rpartition("://") if "://" in str(uri) else ("file", "", str(uri))
    if protocol == "file":
        return _filesystem("file", None), str(Path(rest).expanduser().absolute())
    settings = replace(S3Settings.of_environment(), **changes) if protocol in ("s3", "s3a") else None
    return _filesystem(protocol, settings), rest.rstrip("/")


@cache
def _filesystem(protocol: str, s3: S3Settings | None) -> Any:
    import fsspec

    try:
        if s3 is None:
            return fsspec.filesystem(protocol)
        client = {"region_name": s3.region, "verify": s3.ca}
        fs = fsspec.filesystem(
            "s3",
            endpoint_url=s3.endpoint,
            client_kwargs={name: value for name, value in client.items() if value},
            config_kwargs=s3.config(),
            use_listings_cache=False,
            default_block_size=PART,
        )
        fs.retries = 2  # botocore tries again below, `_again` above
        return fs
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{protocol}://: {str(error).splitlines()[0]}", hint="file paths and s3:// are always there"
        ) from error


def arrow_filesystem(uri: str | Path) -> tuple[Any, str]:
    """The same file system for those who want pyarrow's interface (Ray Train), and the path within it."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = filesystem(uri)
    return PyFileSystem(FSSpecHandler(fs)), path


# One file


def read(uri: str | Path) -> bytes:
    """Raises FileNotFoundError, UserError."""
    fs, path = filesystem(uri)
    return bytes(_again(lambda: fs.cat_file(path), uri))


def write(uri: str | Path, data: bytes) -> None:
    """Whole or not at all."""
    fs, path = filesystem(uri)
    if not is_remote(uri):
        _write_local(Path(path), data)
        return

    def put() -> None:
        fs.pipe_file(path, data, chunksize=PART)
        parts = (data[i : i + PART] for i in range(0, len(data), PART))
        _verify(fs, path, len(data), parts)

    _again(put, uri)


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def upload(path: Path, uri: str | Path) -> None:
    """A local file, whole or not at all; large ones in parts."""
    fs, there = filesystem(uri)
    if not is_remote(uri):
        target = Path(there)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        shutil.copyfile(path, partial)
        os.replace(partial, target)
        return

    def parts() -> Iterable[bytes]:
        with path.open("rb") as file:
            while part := file.read(PART):
                yield part

    def put() -> None:
        fs.put_file(str(path), there, chunksize=PART)
        _verify(fs, there, path.stat().st_size, parts())

    _again(put, uri)


def download(uri: str | Path, path: Path) -> None:
    """To a local file, whole or not at all. Raises FileNotFoundError, UserError."""
    fs, there = filesystem(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")

    def get() -> None:
        size = int(fs.size(there))
        fs.get_file(there, str(partial))
        if (got := partial.stat().st_size) != size:
            raise Changed(f"{got} bytes of {size} came")

    try:
        _again(get, uri)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def etag(parts: Iterable[bytes], size: int) -> str:
    """The tag that S3 gives to an object of `size` bytes that was uploaded in these parts, or in one request if it is small."""
    if size < 2 * PART:
        whole = hashlib.md5(usedforsecurity=False)
        for part in parts:
            whole.update(part)
        return whole.hexdigest()
    digests = [hashlib.md5(part, usedforsecurity=False).digest() for part in parts]
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def _verify(fs: Any, path: str, size: int, parts: Iterable[bytes]) -> None:
    """Raises Changed where the store holds something else, as its tag says if it is an MD5 (an encrypting store's is not)."""
    info = fs.info(path)
    if info["size"] != size:
        raise Changed(f"{size} bytes were written, the store has {info['size']}")
    tag = str(info.get("ETag", "")).strip('"')
    if "SSEKMSKeyId" not in info and re.fullmatch(r"[0-9a-f]{32}(-\d+)?", tag) and tag != etag(parts, size):
        raise Changed("the store holds other bytes than were written")


@cache
def _client(settings: S3Settings) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=settings.endpoint,
        region_name=settings.region,
        verify=settings.ca,
        config=Config(**settings.config()),
    )


def _object(uri: str) -> tuple[Any, dict[str, str]]:
    parts = urlsplit(uri)
    if parts.scheme not in ("s3", "s3a"):
        raise UserError(f"{shown(uri)}: only folders and s3:// can be held by one run at a time")
    return _client(S3Settings.of_environment()), {"Bucket": parts.netloc, "Key": parts.path.lstrip("/")}


def put_if(uri: str, data: bytes, tag: str | None) -> str | None:
    """Writes an object of s3:// if its tag is still this one (None: if there is none yet). The new tag, or None where it was not
    written.
    """
    client, where = _object(uri)
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}

    def put() -> str | None:
        try:
            return str(client.put_object(Body=data, **where, **condition)["ETag"]).strip('"')
        except client.exceptions.ClientError as error:
            if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409"):
                return None
            raise

    return _again(put, uri)


def read_tagged(uri: str) -> tuple[bytes, str] | None:
    """An object of s3:// and the tag of these very bytes, or None."""
    client, where = _object(uri)

    def get() -> tuple[bytes, str] | None:
        try:
            found = client.get_object(**where)
        except client.exceptions.NoSuchKey:
            return None
        return found["Body"].read(), str(found["ETag"]).strip('"')  # Ceph knows its tags without their quotes alone

    return _again(get, uri)


# Folders


def listing(uri: str | Path) -> dict[str, Entry]:
    """All files below, by their path from there; empty if there is nothing."""
    fs, path = filesystem(uri)
    try:
        found = _again(lambda: fs.find(path, detail=True), uri)
    except FileNotFoundError:
        return {}
    entries = {}
    for name, info in found.items():
        if info["type"] == "file" and name.rstrip("/") != path:
            tag = info.get("ETag") or info.get("mtime") or info.get("created") or ""
            entries[name[len(path) :].lstrip("/")] = Entry(int(info["size"] or 0), str(tag).strip('"'))
    return entries


def exists(uri: str | Path) -> bool:
    fs, path = filesystem(uri)
    return bool(_again(lambda: fs.isfile(path), uri))


def delete(uri: str | Path) -> None:
    """A file, or all below a folder; nothing if it is not there."""
    fs, path = filesystem(uri)
    with_missing = lambda: fs.rm(path, recursive=True) if fs.exists(path) else None  # noqa: E731
    _again(with_missing, uri)


def publish(folder: Path, uri: str, *, skip: Callable[[str], bool] = lambda name: False, last: str = "") -> None:
    """All files of a local folder, below `uri`; `last` after all others, so that where it is the rest is whole."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if not skip(name) and name != last and not name.endswith(".partial")]
    _all([lambda name=name: upload(folder / name, join(uri, name)) for name in names])  # type: ignore[misc]
    if last:
        upload(folder / last, join(uri, last))


def pull(uri: str, folder: Path, *, skip: Callable[[str], bool] = lambda name: False) -> None:
    """All files below `uri`, into a local folder."""
    names = [name for name in listing(uri) if not skip(name)]
    _all([lambda name=name: download(join(uri, name), _within(folder, name)) for name in names])  # type: ignore[misc]


def fetch(uri: str | Path) -> Path:
    """A folder as a local one: itself if it is, else a copy on this machine, made once for what it holds now."""
    if not is_remote(uri):
        return Path(str(uri).removeprefix("file://"))
    entries = listing(uri)
    if not entries:
        raise UserError(f"{shown(uri)}: there is nothing")
    content = "\n".join(f"{name} {entry.size} {entry.tag}" for name, entry in sorted(entries.items()))
    target = cache_folder() / "copies" / hashlib.sha256(f"{uri}\n{content}".encode()).hexdigest()[:24]
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
        try:
            _all([lambda name=name: download(join(uri, name), _within(partial, name)) for name in entries])  # type: ignore[misc]
            try:
                partial.rename(target)
            except OSError:  # another process was faster
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _within(folder: Path, name: str) -> Path:
    """The path of `name` below `folder`. An object's name may say anything."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"{name!r}: a name that leads out of its folder")
    return path


def _all(calls: list[Callable[[], None]]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()


# Errors


def _again(call: Callable[[], T], uri: str | Path, *, tries: int | None = None) -> T:
    """Calls until it succeeds, with growing pauses after errors that may pass. Raises FileNotFoundError, or UserError."""
    tries = tries or TRIES
    for attempt in range(tries):
        try:
            return call()
        except Exception as error:
            if not is_remote(uri):
                raise
            if isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket":
                raise
            if not _passing(error) or attempt == tries - 1:
                raise explained(error, uri) from error
        time.sleep(random.uniform(0.5, 1) * min(0.2 * 2**attempt, 10))
    raise AssertionError


def _chain(error: BaseException) -> Iterable[BaseException]:
    inner: BaseException | None = error
    while inner is not None:
        yield inner
        inner = inner.__cause__ or inner.__context__


def _response(error: BaseException) -> dict[str, Any]:
    return next((e.response for e in _chain(error) if isinstance(getattr(e, "response", None), dict)), {})  # type: ignore[attr-defined]


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _passing(error: BaseException) -> bool:
    """Whether another try may do: refused for now, cut off, silent, or damaged on the way."""
    from aiohttp import ClientError as Dropped
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from botocore.parsers import ResponseParserError
    from fsspec.exceptions import FSTimeoutError

    if response := _response(error):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        passing = ("SlowDown", "RequestTimeout", "BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody")
        return status in (429, 500, 502, 503, 504) or _code(error) in passing
    kinds = (Dropped, HTTPClientError, IncompleteReadError, ResponseParserError, FSTimeoutError, Changed)
    return any(isinstance(e, (*kinds, ConnectionError, TimeoutError)) for e in _chain(error))


REASONS = {
    "NoSuchBucket": ("there is no such bucket", "create it, or mend the name; --s3-endpoint-url names the server"),
    "AccessDenied": (
        "no permission",
        "the credentials need s3:ListBucket, GetObject, PutObject and DeleteObject there",
    ),
    "403": ("no permission", "the credentials need s3:ListBucket, GetObject, PutObject and DeleteObject there"),
    "InvalidAccessKeyId": ("the server does not know the access key", "check AWS_PROFILE or AWS_ACCESS_KEY_ID"),
    "SignatureDoesNotMatch": ("the server refuses the secret key", "check AWS_SECRET_ACCESS_KEY, and the clock"),
    "QuotaExceeded": ("the object store is full", "free some space, run it again"),
    "InsufficientCapacity": ("the object store is full", "free some space, run it again"),
}


def explained(error: BaseException, uri: str | Path) -> UserError:
    """The error in a line: where, what, and what to do. Nothing of a request's headers is in it."""
    from botocore.exceptions import EndpointConnectionError, NoCredentialsError, PartialCredentialsError, SSLError

    for e in _chain(error):
        if isinstance(e, UserError):
            return e
        if isinstance(e, (NoCredentialsError, PartialCredentialsError)):
            return UserError(f"{shown(uri)}: no credentials found", hint="set AWS_PROFILE, keys, or use a role")
        if isinstance(e, SSLError):
            return UserError(
                f"{shown(uri)}: the server's certificate is not trusted", hint="--s3-ca names the CA's file"
            )
        if isinstance(e, EndpointConnectionError):
            where = S3Settings.of_environment().endpoint or "AWS S3"
            return UserError(f"{shown(uri)}: nothing answers at {shown(where)}", hint="check --s3-endpoint-url")
    code = _code(error)
    if code in REASONS or isinstance(error, PermissionError):
        said, hint = REASONS.get(code, REASONS["AccessDenied"])
        return UserError(f"{shown(uri)}: {said}" + (f" ({code})" if code else ""), hint=hint)
    said = shown((str(error).splitlines() or [type(error).__name__])[0])[:200]
    return UserError(f"{shown(uri)}: {said}", hint="run it again: what was finished is kept")


def check(uri: str | Path) -> None:
    """Raises UserError in a few seconds where nothing can be written below `uri`."""
    probe = join(uri, f".probe-{os.getpid()}")
    fs, path = filesystem(probe, attempts=2)
    if not is_remote(uri):
        return
    if not urlsplit(str(uri)).netloc:
        raise UserError(f"{uri}: names no bucket")

    def put_and_remove() -> None:
        fs.pipe_file(path, b"")
        fs.rm_file(path)

    try:
        _again(put_and_remove, uri, tries=2)
    except FileNotFoundError as error:
        raise explained(error, uri) from error


def object_store_status() -> tuple[bool | None, str]:
    """(True answers, False configured but does not answer, None not configured; what to do)."""
    settings = S3Settings.of_environment()
    configured = settings.endpoint or any(
        os.environ.get(n) for n in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN")
    )
    if not configured:
        return (
            None,
            "not configured; needed only for s3:// data: set AWS_PROFILE or keys, and AWS_ENDPOINT_URL if not AWS",
        )
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    where = shown(settings.endpoint or "AWS S3")
    config = Config(**replace(settings, attempts=1, timeout=5).config())
    try:
        buckets = boto3.client("s3", config=config).list_buckets()["Buckets"]
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "error")
        if code == "AccessDenied":
            return True, f"{where} answers; listing buckets is not allowed, which is no harm"
        return False, f"{where} refuses the credentials ({code})"
    except (BotoCoreError, ValueError) as error:
        return False, f"{where}: {shown(str(error).splitlines()[0])}"
    return True, f"{where} answers, {len(buckets)} buckets"
