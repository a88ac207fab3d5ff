"""The options of `mmdistill prepare`, and the keys that tell whether two preparations are the same."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mmdistill_core.files import sha256_of
from workflows.config.values import digest
from workflows.dataset.readers import Listing
from workflows.errors import ConfigError, expanded
from workflows.storage.code import code_version
from workflows.storage.uri import check_name

CODE = (
    "workflows/ingest/options.py",
    "workflows/ingest/prepare.py",
    "workflows/ingest/summary.py",
    "workflows/ingest/encoders.py",
    "workflows/dataset/readers",
    "workflows/dataset/shards.py",
    "workflows/dataset/manifest.py",
)


@dataclass(frozen=True)
class Preparation:
    """The options of a preparation. Raises ConfigError for invalid values."""

    source: str
    dest: str
    size: int
    channels: int = 3
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    labels: str | None = None
    captions: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    encoding: str = "png"
    holdout: float = 0.1
    limit: int | None = None
    max_bad: float = 0.01
    shard_mb: float = 64
    seed: int = 0
    latents: str | None = None
    text_encoder: str | None = None
    extractor: str | None = None
    extractor_weights: str | None = None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ConfigError(f"--channels: {self.channels} is not one of 1, 3")
        if self.crop not in ("center", "random"):
            raise ConfigError(f"--crop: {self.crop!r} is not one of center, random")
        if self.encoding not in ("png", "uint8"):
            raise ConfigError(f"--encoding: {self.encoding!r} is not one of png, uint8")
        self._check_extractor()
        if self.extractor_weights and not expanded(self.extractor_weights).is_file():
            raise ConfigError(f"--extractor-weights: {self.extractor_weights} is not a file")
        if not 0 <= self.max_bad < 1:
            raise ConfigError(f"--max-bad: {self.max_bad:g} should be a share of the images, from 0 to less than 1")
        check_name("DEST", self.dest)
        if self.latents and self.channels != 3:
            raise ConfigError("--latents: a VAE takes images of 3 channels")

    def _check_extractor(self) -> None:
        needs_weights = False
        if self.extractor is not None:
            from mmdistill_core.artifact import extractor_class

            try:
                needs_weights = extractor_class(self.extractor).needs_weights
            except ValueError as error:
                raise ConfigError(f"--extractor: {error}") from None
        if needs_weights != (self.extractor_weights is not None):
            raise ConfigError("--extractor inception and --extractor-weights, the file of its weights, belong together")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    @property
    def preprocessing(self) -> str:
        square = {"center": "central square", "random": "square at random"}[self.crop]
        return f"upright, over white, {square}, Lanczos" + (", and mirrored" if self.flip else "")

    @property
    def encoded(self) -> bool:
        return bool(self.latents or self.text_encoder)

    @property
    def features(self) -> dict[str, Any]:
        """The options that determine the features of the reference statistics."""
        weights = self.extractor_weights
        content = sha256_of(expanded(weights)) if weights else None
        return {"extractor": self.extractor, "weights": content, "seed": self.seed}

    @property
    def rows(self) -> int:
        """Rows in a shard."""
        return max(1, int(self.shard_mb * 2**20 / math.prod(self.shape)))

    def key(self, listing: Listing, columns: dict[str, Any]) -> str:
        """A hash of everything that determines the output: source, options, code, and `columns` (Encoders.columns)."""
        return digest([self.key_without_code(listing, columns), code_version(*CODE)])

    def key_without_code(self, listing: Listing, columns: dict[str, Any]) -> str:
        """`key` without the code, so that a finished data set stays valid when the code changes."""
        return digest([listing.fingerprint, self._key_options(), columns])

    def key_of_options(self, columns: dict[str, Any]) -> str:
        """`key` without the code and the source."""
        return digest([self._key_options(), columns])

    def _key_options(self) -> dict[str, Any]:
        excluded = ("source", "dest", "max_bad", "latents", "text_encoder", "extractor", "extractor_weights")
        return {name: value for name, value in asdict(self).items() if name not in excluded}


def parse_share(option: str, text: str) -> float:
    """Parses "1%" or "0.01" as 0.01. Raises ConfigError unless it is at least 0 and less than 1."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise ConfigError(f"{option}: {text!r} is not a share, such as 1% or 0.01")
    return share


def parse_split(text: str) -> float:
    """The held-out share of a --split such as "train,holdout=0.1". Raises ConfigError."""
    parts = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if not set(parts) <= {"train", "holdout"} or parts.get("train", "") != "":
        raise ConfigError(f"--split: {text!r} should read train, or train,holdout=0.1")
    return parse_share("--split", parts["holdout"] or "0.1") if "holdout" in parts else 0.0
