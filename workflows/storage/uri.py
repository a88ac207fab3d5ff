"""Where something is: a path, or a URI of a protocol."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from workflows.errors import ConfigError, expanded

USER = re.compile(
    r"""
    (?<=://)[^/\s]*@
    | (?:  # with a slash in the password, as databases have it; after http it may be a port and a path
        (?<=://) (?<!http://) (?<!https://) [^:/\s@]*
      | (?<=://) [^:/\s@[]* (?=:(?!\d*/))
      | (?<=\w:/) [^:/\s@]+  # a slash too few
    ) : [^@\s]* @ (?:[^/\s]*@)?
    """,
    re.VERBOSE,
)
"""A user with a password, in an address or a text with addresses."""
QUERIED = re.compile(r"(?<=[?&])((?:user|username|password|passwd|pwd|sslpassword)=)([^&\s]*)", re.IGNORECASE)
"""The same, as parameters."""
SLIP = re.compile(r"[A-Za-z][\w+.-]*:/(?!/)")
"""The beginning of an address with a slash too few. As a path it would be a folder of that name, made without a word."""


def is_remote(uri: str | Path) -> bool:
    return "://" in str(uri) and not str(uri).startswith("file://")


def join(uri: str | Path, *parts: str) -> str:
    return "/".join([str(uri).rstrip("/"), *parts])


def check_name(what: str, uri: str | Path) -> None:
    """Raises ConfigError for a place that can't be one: without a name, or with characters that can't be shown; in an object store
    also without a bucket, or with those that mean something in an address or a pattern of names, and would lead elsewhere.
    """
    text = str(uri)
    if not text.strip() or not text.isprintable():
        raise ConfigError(f"{what}: {text!r} is no name of a folder: empty, or with characters that can't be shown")
    if SLIP.match(text):
        raise ConfigError(f"{what}: {shown(text)}: has a slash too few, of s3://BUCKET/PREFIX or file:///FOLDER")
    if is_remote(uri) and not urlsplit(text).netloc:
        raise ConfigError(f"{what}: {shown(text)}: names no bucket")
    if is_remote(uri) and (wrong := sorted(set("?#[]*") & set(text))):
        raise ConfigError(
            f"{what}: {shown(text)}: a prefix in an object store can't have {' '.join(wrong)} in its name"
        )


def check_here(what: str, path: str | Path) -> None:
    """Raises ConfigError for an address, where only a path on this machine can be."""
    if is_remote(path) or SLIP.match(str(path)):
        raise ConfigError(f"{what}: {shown(path)} is an address, and should be a path on this machine")


def shown(uri: str | Path) -> str:
    """The URI, or a text with URIs, without users and passwords: as it may be shown and stored."""
    return QUERIED.sub(r"\1***", USER.sub("", str(uri)))


def secrets(uri: str) -> list[str]:
    """What `shown` leaves out of an address, as it stands there: users with their passwords, and passwords."""
    users = [found[0] for found in USER.finditer(uri)]
    asked = [value for name, value in QUERIED.findall(uri) if not name.lower().startswith("user")]
    return [*users, *(user[:-1].partition(":")[2] for user in users), *asked]


def absolute(path: str | Path) -> Path:
    """A local path, or its file:// address, with ~ and links written out. Raises ConfigError."""
    local = expanded(str(path).removeprefix("file://"))
    try:
        return local.resolve()
    except (OSError, RuntimeError):  # the latter of Python below 3.13
        raise ConfigError(f"{path}: links in a circle, or a name that is too long") from None


def resolved(uri: str | Path) -> str:
    """A local path as an absolute one, so that tasks elsewhere on this machine mean the same; a URI as it is."""
    return str(uri).rstrip("/") if is_remote(uri) else str(absolute(uri))
