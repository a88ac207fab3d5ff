"""Paths and URIs: joining, checking, resolving, and hiding the credentials in them."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from workflows.errors import ConfigError, expanded

USER = re.compile(
    r"""
    (?<=://)[^/\s]*@
    | (?:  # a slash in the password, as databases allow; after http this may be a port and a path
        (?<=://) (?<!http://) (?<!https://) [^:/\s@]*
      | (?<=://) [^:/\s@[]* (?=:(?!\d*/))
      | (?<=\w:/) [^:/\s@]+  # one slash is missing
    ) : [^@\s]* @ (?:[^/\s]*@)?
    """,
    re.VERBOSE,
)
"""The user and password in an address, or in a text with addresses."""
QUERIED = re.compile(r"(?<=[?&])((?:user|username|password|passwd|pwd|sslpassword)=)([^&\s]*)", re.IGNORECASE)
"""The same as query parameters."""
SLIP = re.compile(r"[A-Za-z][\w+.-]*:/(?!/)")
"""The beginning of an address that lacks a slash. Taken as a path, it would silently create a folder of that name."""


def is_remote(uri: str | Path) -> bool:
    return "://" in str(uri) and not str(uri).startswith("file://")


def join(uri: str | Path, *parts: str) -> str:
    return "/".join([str(uri).rstrip("/"), *parts])


def check_name(what: str, uri: str | Path) -> None:
    """Raises ConfigError for an empty name, or one with characters that can't be shown. In an object store also for a missing
    bucket, or characters with a meaning in addresses or glob patterns, which would lead elsewhere.
    """
    text = str(uri)
    if not text.strip() or not text.isprintable():
        raise ConfigError(f"{what}: {text!r} is not a folder name: empty, or with characters that can't be shown")
    if SLIP.match(text):
        raise ConfigError(f"{what}: {shown(text)} lacks a slash: write s3://BUCKET/PREFIX or file:///FOLDER")
    if is_remote(uri) and not urlsplit(text).netloc:
        raise ConfigError(f"{what}: {shown(text)}: names no bucket")
    if is_remote(uri) and (wrong := sorted(set("?#[]*") & set(text))):
        raise ConfigError(
            f"{what}: {shown(text)}: a prefix in an object store can't have {' '.join(wrong)} in its name"
        )


def check_here(what: str, path: str | Path) -> None:
    """Raises ConfigError for an address where only a path on this machine is allowed."""
    if is_remote(path) or SLIP.match(str(path)):
        raise ConfigError(f"{what}: {shown(path)} is an address, and should be a path on this machine")


def shown(uri: str | Path) -> str:
    """The URI, or a text with URIs, without users and passwords: safe to show and to store."""
    return QUERIED.sub(r"\1***", USER.sub("", str(uri)))


def secrets(uri: str) -> list[str]:
    """What `shown` removes from an address: users with their passwords, and the passwords alone."""
    users = [found[0] for found in USER.finditer(uri)]
    asked = [value for name, value in QUERIED.findall(uri) if not name.lower().startswith("user")]
    return [*users, *(user[:-1].partition(":")[2] for user in users), *asked]


def absolute(path: str | Path) -> Path:
    """A local path, or its file:// address, with ~ and links resolved. Raises ConfigError."""
    local = expanded(str(path).removeprefix("file://"))
    try:
        return local.resolve()
    except (OSError, RuntimeError):  # RuntimeError: Python below 3.13
        raise ConfigError(f"{path}: its links form a loop, or its name is too long") from None


def resolved(uri: str | Path) -> str:
    """A local path as an absolute one, valid for tasks in other folders of this machine; a URI as it is."""
    return str(uri).rstrip("/") if is_remote(uri) else str(absolute(uri))
