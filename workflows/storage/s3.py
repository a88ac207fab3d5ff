"""How an object store is reached, and what its errors mean. No other file uses s3fs or boto3.

Credentials come from the standard chain alone (environment, profile, role). All other settings of S3 are environment variables,
which the command line's options set: AWS_ENDPOINT_URL, AWS_REGION, AWS_CA_BUNDLE, MMDISTILL_S3_ADDRESSING (auto, path, virtual) and
MMDISTILL_S3_TIMEOUT (seconds a request may be silent). A request that is refused for now (429, 5xx), cut off or silent is retried,
with growing pauses.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from workflows.errors import ConfigError, UserError, chain_of, expanded, seconds_of
from workflows.storage.uri import is_remote, shown

T = TypeVar("T")

PART = 50 * 1024**2
"""Bytes of a part of a multipart upload. Objects of less than two parts go in one request."""
TRIES = 14
"""Calls that `retry` makes before it gives up. Their pauses add up to about a minute."""
TRIES_OF_A_REQUEST = 8
"""For calls of many requests, such as reading an archive: retrying them as a whole would fail again at another request. s3fs
counts the request and the reading of its answer apart, so a store that is down is given up after about 80 seconds.
"""
TRIES_OF_A_KEY = 5
"""Calls with an access key that the server says it doesn't know. Ceph says so as well when it can't read the account for now, and
AWS of a key that is seconds old. The pauses add up to about two seconds.
"""

SHARED = (
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
"""The driver's variables that workers on other machines get. No credential is among them."""

# By default the SDKs send checksums in trailers. Servers other than AWS answer those with 411.
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")


class Changed(OSError):
    """A transfer or a deletion did not have the effect that it should have. `retry` calls again."""


def shared_environment() -> dict[str, str]:
    """The variables by which this process reaches the store, for processes that it starts on other machines."""
    return {name: os.environ[name] for name in SHARED if name in os.environ}


@dataclass(frozen=True)
class S3Settings:
    endpoint: str | None
    region: str | None
    ca: str | None
    addressing: str
    timeout: float
    attempts: int = 1
    """botocore's tries of each request. One, since layers of retries would multiply."""
    tries: int = 1
    """s3fs's tries of each request. One if `retry` is above it."""

    @staticmethod
    def of_environment() -> S3Settings:
        env = os.environ
        addressing = env.get("MMDISTILL_S3_ADDRESSING", "auto")
        if addressing not in ("auto", "path", "virtual"):
            raise ConfigError(f"MMDISTILL_S3_ADDRESSING: {addressing!r} is not one of auto, path, virtual")
        ca = env.get("AWS_CA_BUNDLE")
        if ca and not Path(ca).is_file():
            raise UserError(f"AWS_CA_BUNDLE: {ca} is not a file")
        endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
        if endpoint and (urlsplit(endpoint).scheme not in ("http", "https") or "@" in endpoint):
            raise ConfigError(
                f"AWS_ENDPOINT_URL: {shown(endpoint)!r} should be http://HOST or https://HOST, without credentials in it"
            )
        return S3Settings(
            endpoint=endpoint,
            region=env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION"),
            ca=ca,
            addressing=addressing,
            timeout=seconds_of("MMDISTILL_S3_TIMEOUT", 30, least=0.1),
        )

    def config(self) -> dict[str, Any]:
        """The arguments of botocore's Config."""
        return {
            "connect_timeout": min(10.0, self.timeout),
            "read_timeout": self.timeout,
            "retries": {"mode": "standard", "total_max_attempts": self.attempts},
            "s3": {"addressing_style": self.addressing},
            "max_pool_connections": 32,
        }


def filesystem(uri: str | Path, **changes: Any) -> tuple[Any, str]:
    """fsspec's file system for a path or URI, and the path within it. `changes`: fields of S3Settings. Raises UserError for an
    unknown protocol.
    """
    protocol, _, rest = str(uri).rpartition("://") if "://" in str(uri) else ("file", "", str(uri))
    if protocol == "file":
        return _filesystem("file", None), str(expanded(rest).absolute())
    settings = replace(S3Settings.of_environment(), **changes) if protocol in ("s3", "s3a") else None
    return _filesystem(protocol, settings), rest.rstrip("/")


@cache
def _filesystem(protocol: str, s3: S3Settings | None) -> Any:
    import fsspec

    try:
        if s3 is None:
            return fsspec.filesystem(protocol)
        from s3fs.core import set_custom_error_handler

        set_custom_error_handler(_is_transient)
        client = {"region_name": s3.region, "verify": s3.ca}
        fs = fsspec.filesystem(
            "s3",
            endpoint_url=s3.endpoint,
            client_kwargs={name: value for name, value in client.items() if value},
            config_kwargs=s3.config(),
            use_listings_cache=False,
            default_block_size=PART,
            skip_instance_cache=True,  # fsspec would share one among all values of `tries`
        )
        fs.retries = s3.tries
        return fs
    except (ValueError, ImportError, TypeError, OSError) as error:
        raise UserError(
            f"{protocol}://: {str(error).splitlines()[0]}", hint="file paths and s3:// are always there"
        ) from error


def reading_filesystem(uri: str | Path) -> Any:
    """fsspec's file system for calls of many requests. It retries each request, so `retry` is not needed."""
    return filesystem(uri, tries=TRIES_OF_A_REQUEST)[0]


def arrow_filesystem(uri: str | Path) -> tuple[Any, str]:
    """The same file system with pyarrow's interface, which Ray Train needs, and the path within it. Ray Train calls it without
    `retry`, so that botocore retries here.
    """
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = filesystem(uri, attempts=5)
    return PyFileSystem(FSSpecHandler(fs)), path


@cache
def client(settings: S3Settings) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=settings.endpoint,
        region_name=settings.region,
        verify=settings.ca,
        config=Config(**settings.config()),
    )


# Errors


def retry(call: Callable[[], T], uri: str | Path, *, tries: int | None = None) -> T:
    """Calls up to `tries` times (TRIES), with growing pauses after transient errors. Errors of local files are raised as they are.

    Raises FileNotFoundError for a missing object, UserError for every other error of a store.
    """
    tries = tries or TRIES
    for attempt in range(tries):
        try:
            return call()
        except Exception as error:
            if not is_remote(uri):
                raise
            if isinstance(error, FileNotFoundError) and code_of(error) != "NoSuchBucket":
                raise
            if isinstance(error, UserError):  # of a call within this one, which was retried already
                raise
            unknown = code_of(error) == "InvalidAccessKeyId" and attempt < TRIES_OF_A_KEY - 1
            if not (unknown or _is_transient(error)) or attempt == tries - 1:
                raise explained(error, uri) from error
        time.sleep(random.uniform(0.5, 1) * min(0.2 * 2**attempt, 10))
    raise AssertionError


def _response(error: BaseException) -> dict[str, Any]:
    return next((e.response for e in chain_of(error) if isinstance(getattr(e, "response", None), dict)), {})  # type: ignore[attr-defined]


def code_of(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed: the request was refused for now, cut off, silent, or damaged on the way."""
    from aiohttp import ClientError as Dropped
    from botocore.exceptions import ConnectionError as NoAnswer
    from botocore.exceptions import HTTPClientError, IncompleteReadError, SSLError
    from botocore.parsers import ResponseParserError
    from fsspec.exceptions import FSTimeoutError

    if any(isinstance(e, SSLError) for e in chain_of(error)):
        return False
    if response := _response(error):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        transient = ("SlowDown", "RequestTimeout", "BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody")
        return status in (429, 500, 502, 503, 504) or code_of(error) in transient
    kinds = (Dropped, NoAnswer, HTTPClientError, IncompleteReadError, ResponseParserError, FSTimeoutError, Changed)
    return any(isinstance(e, (*kinds, ConnectionError, TimeoutError)) for e in chain_of(error))


NO_PERMISSION = ("no permission", "the credentials need s3:ListBucket, GetObject, PutObject and DeleteObject there")
REASONS = {
    "NoSuchBucket": ("there is no such bucket", "create it, or correct the name; --s3-endpoint-url names the server"),
    "AccessDenied": NO_PERMISSION,
    "403": NO_PERMISSION,
    "InvalidAccessKeyId": ("the server does not know the access key", "check AWS_PROFILE or AWS_ACCESS_KEY_ID"),
    "SignatureDoesNotMatch": ("the server refuses the secret key", "check AWS_SECRET_ACCESS_KEY, and the clock"),
    "QuotaExceeded": ("the object store is full", "free some space, run it again"),
    "InsufficientCapacity": ("the object store is full", "free some space, run it again"),
}


def explained(error: BaseException, uri: str | Path) -> UserError:
    """The error in one line: where, what, and what to do. It contains nothing of the request's headers."""
    from botocore.exceptions import EndpointConnectionError, NoCredentialsError, PartialCredentialsError, SSLError

    for e in chain_of(error):
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
    code = code_of(error)
    if code in REASONS or isinstance(error, PermissionError):
        reason, hint = REASONS.get(code, NO_PERMISSION)
        return UserError(f"{shown(uri)}: {reason}" + (f" ({code})" if code else ""), hint=hint)
    reason = shown((str(error).splitlines() or [type(error).__name__])[0])[:200]
    return UserError(f"{shown(uri)}: {reason}", hint="run it again: what was finished is kept")


def object_store_status() -> tuple[bool | None, str]:
    """(status, text): True if the store answers, False if it is configured and does not, None if it is not configured."""
    settings = S3Settings.of_environment()
    credentials = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN")
    if not settings.endpoint and not any(os.environ.get(name) for name in credentials):
        how = "set AWS_PROFILE or keys, and AWS_ENDPOINT_URL if not AWS"
        return None, f"not configured; needed only for s3:// data: {how}"
    from botocore.exceptions import BotoCoreError, ClientError

    where = shown(settings.endpoint or "AWS S3")
    try:
        buckets = client(replace(settings, timeout=5)).list_buckets()["Buckets"]
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "error")
        if code == "AccessDenied":
            return True, f"{where} answers; listing buckets is not allowed, and not needed"
        return False, f"{where} refuses the credentials ({code})"
    except (BotoCoreError, ValueError) as error:
        return False, f"{where}: {shown(str(error).splitlines()[0])}"
    return True, f"{where} answers, {len(buckets)} buckets"
