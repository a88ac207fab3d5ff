"""What `mmdistill prepare` is asked to make of a source, and what decides that a preparation is the same as another."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from workflows.config.schema import ConfigError, Data, digest
from workflows.dataset.readers import Listing
from workflows.errors import expanded
from workflows.storage.uri import check_name
from workflows.storage.workspace import code_version

EXTRACTORS = get_args(Data.model_fields["extractor"].annotation)
CODE = (
    "workflows/ingest/options.py",
    "workflows/ingest/prepare.py",
    "workflows/ingest/summary.py",
    "workflows/ingest",
    "workflows/dataset/shards.py",
    "workflows/dataset/manifest.py",
)


@dataclass(frozen=True)
class Preparation:
    """What to make of a source. Raises ConfigError for values that can't be."""

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
        if self.extractor not in (None, *EXTRACTORS):
            raise ConfigError(f"--extractor: {self.extractor!r} is not one of {', '.join(EXTRACTORS)}")
        if (self.extractor == "inception") != (self.extractor_weights is not None):
            raise ConfigError("--extractor inception and --extractor-weights, the file of its weights, belong together")
        if self.extractor_weights and not expanded(self.extractor_weights).is_file():
            raise ConfigError(f"--extractor-weights: {self.extractor_weights} is not a file")
        if not 0 <= self.max_bad < 1:
            raise ConfigError(f"--max-bad: {self.max_bad:g} is not a share")
        check_name("DEST", self.dest)
        if self.latents and self.channels != 3:
            raise ConfigError("--latents: a VAE takes images of 3 channels")

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
        """What decides which features statistics are of."""
        weights = self.extractor_weights
        content = hashlib.sha256(expanded(weights).read_bytes()).hexdigest() if weights else None
        return {"extractor": self.extractor, "weights": content, "seed": self.seed}

    @property
    def rows(self) -> int:
        """Of a shard."""
        return max(1, int(self.shard_mb * 2**20 / math.prod(self.shape)))

    def key(self, listing: Listing, columns: dict[str, Any]) -> str:
        """Of all that decides what is written; `columns` of the encoders (Encoders.columns)."""
        return digest([self.same(listing, columns), code_version(*CODE)])

    def same(self, listing: Listing, columns: dict[str, Any]) -> str:
        """As `key`, but for the code: a data set that is there stays what it is."""
        return digest([listing.fingerprint, self._ways(), columns])

    def ways(self, columns: dict[str, Any]) -> str:
        """As `same`, but for the source."""
        return digest([self._ways(), columns])

    def _ways(self) -> dict[str, Any]:
        apart = ("source", "dest", "max_bad", "latents", "text_encoder", "extractor", "extractor_weights")
        return {name: value for name, value in asdict(self).items() if name not in apart}


def parse_share(option: str, text: str) -> float:
    """ "1%" or "0.01" as 0.01. Raises ConfigError."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise ConfigError(f"{option}: {text!r} is no share, such as 1% or 0.01")
    return share


def parse_split(text: str) -> float:
    """ "train,holdout=0.1": the share that is held out. Raises ConfigError."""
    parts = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if not set(parts) <= {"train", "holdout"} or parts.get("train", "") != "":
        raise ConfigError(f"--split: {text!r} should read train, or train,holdout=0.1")
    return parse_share("--split", parts["holdout"] or "0.1") if "holdout" in parts else 0.0
