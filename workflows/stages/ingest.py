"""`mmdistill prepare SOURCE DEST`: images from wherever they are become a data set, by tasks that each write shards of a part.

DEST/shards/<plan>-<part>-<n>.parquet   the rows, 64 MB a shard or so
DEST/.parts/<plan>/<part>.json          a part that is whole; a preparation that goes on skips it. Removed at the end
DEST/manifest.json                      last
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from workflows.config import ConfigError, digest
from workflows.ingest import Listing, Unit, list_source, read_unit
from workflows.runtime import s3, storage
from workflows.runtime.cluster import device_of_task, task_options
from workflows.runtime.errors import UserError
from workflows.runtime.manifest import FEWEST, Manifest, is_data_set, read_manifest, write_manifest
from workflows.runtime.progress import Screen, short
from workflows.runtime.shards import Rows, held_out, manifest_of, save_shard
from workflows.runtime.uri import join, shown
from workflows.runtime.workspace import code_version, git_commit

CODE = (
    "workflows/stages/ingest.py",
    "workflows/ingest",
    "workflows/runtime/shards.py",
    "workflows/runtime/manifest.py",
)
UNIT = 2**20
"""Bytes of the source that are never divided further."""
PARTS, SMALL = 16, 1000
"""A source that would fill few shards is cut into so many parts, of at least so many images, for the sake of those who wait."""
GUESS = 100_000
"""Bytes of an image of a source that doesn't tell its count."""
ENCODED = 16
"""Images or captions that an encoder takes at once."""
LISTED = 1000
"""Skipped images that the manifest names."""


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

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ConfigError(f"--channels: {self.channels} is not one of 1, 3")
        if self.crop not in ("center", "random"):
            raise ConfigError(f"--crop: {self.crop!r} is not one of center, random")
        if self.encoding not in ("png", "uint8"):
            raise ConfigError(f"--encoding: {self.encoding!r} is not one of png, uint8")
        if not 0 <= self.max_bad < 1:
            raise ConfigError(f"--max-bad: {self.max_bad:g} is not a share")
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
    def rows(self) -> int:
        """Of a shard."""
        return max(1, int(self.shard_mb * 2**20 / math.prod(self.shape)))

    def key(self, listing: Listing, columns: dict[str, Any]) -> str:
        """Of all that decides what is written; `columns` of the encoders (Encoders.columns)."""
        apart = ("source", "dest", "max_bad", "latents", "text_encoder")
        ways = {name: value for name, value in asdict(self).items() if name not in apart}
        return digest([listing.fingerprint, ways, columns, code_version(*CODE)])


class Encoders:
    """The models that a preparation runs beside, from folders of the user's: a VAE and a text encoder, or neither."""

    def __init__(self, p: Preparation, device: str = "cpu") -> None:
        from workflows.ingest.encoders import Latents, TextEmbeddings

        self.p = p
        self.latents = Latents(p.latents, device=device) if p.latents else None
        self.text = TextEmbeddings(p.text_encoder, device=device) if p.text_encoder else None

    def columns(self) -> dict[str, dict[str, Any]]:
        """What the manifest says of the columns that they make. Raises UserError for a size that the VAE does not take."""
        out: dict[str, dict[str, Any]] = {}
        if self.latents:
            out["latent"] = {
                "shape": list(self.latents.shape(self.p.size)),
                "dtype": "float16",
                "of": self.latents.fingerprint,
            }
        if self.text:
            one = self.text([""])
            for name, part, dtype in (("text", "embedding", "float16"), ("text_mask", "mask", "bool")):
                out[name] = {"shape": list(one[part].shape[1:]), "dtype": dtype, "of": self.text.fingerprint}
        return out

    def __call__(
        self, images: np.ndarray, keys: Sequence[str], captions: Sequence[str | None]
    ) -> dict[str, np.ndarray]:
        out: dict[str, list[np.ndarray]] = {}
        for first in range(0, len(keys), ENCODED):
            part = slice(first, first + ENCODED)
            if self.latents:
                out.setdefault("latent", []).append(self.latents(images[part], keys[part]).astype(np.float16))
            if self.text:
                text = self.text(captions[part])
                out.setdefault("text", []).append(text["embedding"].astype(np.float16))
                out.setdefault("text_mask", []).append(text["mask"])
        return {name: np.concatenate(parts) for name, parts in out.items()}


@lru_cache(maxsize=1)
def _encoders(p: Preparation, device: str) -> Encoders:
    """A task's process keeps them for the next."""
    return Encoders(p, device)


@dataclass
class Tally:
    """What the parts have come to."""

    parts: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return sum(part["images"] for part in self.parts.values())

    @property
    def bad(self) -> int:
        return sum(part["bad"] for part in self.parts.values())

    def listed(self) -> list[dict[str, str]]:
        return [entry for _, part in sorted(self.parts.items()) for entry in part["listed"]][:LISTED]


def prepare_data_set(preparation: Preparation, screen: Screen) -> Manifest:
    """Writes the data set, or the rest of one that was begun; one that is there is left as it is. Ray is up.

    Raises UserError where the source can't be read, too much of it is broken, or DEST holds something else.
    """
    p = preparation
    storage.check(p.dest)
    with screen.status(f"listing {shown(p.source)}"):
        listing = list_source(
            p.source,
            labels=p.labels,
            captions=p.captions,
            label_column=p.label_column,
            image_column=p.image_column,
            caption_column=p.caption_column,
            unit_bytes=UNIT,
            limit=p.limit,
            filesystem=s3.filesystem(p.source)[0],
        )
    with screen.status("loading the encoders"):
        columns = Encoders(p).columns() if p.encoded else {}
    if p.text_encoder and not listing.captioned:
        raise UserError(f"--text-encoder: {shown(p.source)} has no captions", hint="name them with --captions")
    plan = p.key(listing, columns)
    if is_data_set(p.dest):
        there = read_manifest(p.dest)
        if there.options.get("plan") == plan:
            screen.line(f"[green]✓[/] {shown(p.dest)} is this data set already: {there.count:,} images")
            return there
        raise UserError(
            f"{shown(p.dest)}: holds another data set, of {there.count:,} images from {there.source}",
            hint="name another folder, or remove that one",
        )
    for note in listing.notes:
        screen.line(f"[yellow]![/] {note}")
    tally = _write_parts(p, listing, plan, screen)
    manifest = _manifest(p, listing, plan, columns, tally)
    write_manifest(p.dest, manifest)
    _tidy(p.dest, manifest)
    said = f", {tally.bad:,} could not be read" if tally.bad else ""
    screen.line(
        f"[green]✓[/] [bold]{shown(p.dest)}[/]  {manifest.count:,} images "
        f"{'x'.join(map(str, manifest.shape))} in {len(manifest.shards)} shards{said}  [dim]{manifest.fingerprint}[/]"
    )
    return manifest


def _write_parts(p: Preparation, listing: Listing, plan: str, screen: Screen) -> Tally:
    import ray

    from workflows.runtime.data import spread

    groups = grouped(listing, p.rows)
    folder = join(p.dest, ".parts", plan)
    tally = Tally(_done(folder, p.dest))
    if tally.parts:
        screen.line(f"  goes on: {len(tally.parts)} of {len(groups)} parts are there, {tally.images:,} images")
    bare, resources = replace(listing, units=()), ray.cluster_resources()
    # Encoders run on GPUs where there are any.
    use_gpu = p.encoded and resources.get("GPU", 0) >= 1
    at_once, device = int(resources.get("GPU" if use_gpu else "CPU", 1)), "cuda" if use_gpu else "cpu"
    task = {name: value for name, value in task_options(use_gpu=use_gpu).items() if name != "max_retries"}
    waiting = [(number, units) for number, units in enumerate(groups) if number not in tally.parts]

    def work(item: tuple[int, Sequence[Unit]]) -> Iterator[dict[str, Any]]:
        yield write_part(p, bare, plan, *item, device=device)

    with screen.bars():
        bar = screen.bar("prepare", listing.count or len(groups), unit="images" if listing.count else "parts")

        def show() -> None:
            skipped = f"{short(tally.bad)} skipped" if tally.bad else ""
            bar.update(tally.images + tally.bad if listing.count else len(tally.parts), skipped)

        show()
        for part in spread(waiting, work, at_once=at_once, options=task):
            tally.parts[int(part["number"])] = part
            show()
            _check_bad(p, listing, tally, whole=False)
    _check_bad(p, listing, tally, whole=True)
    return tally


def grouped(listing: Listing, rows: int) -> list[tuple[Unit, ...]]:
    """The units in order, those together that should about fill a shard of `rows`."""
    each = sum(unit.size for unit in listing.units) / listing.count if listing.count else GUESS
    expected = [unit.size / max(each, 1) for unit in listing.units]
    most = min(rows, max(SMALL, sum(expected) / PARTS))
    groups: list[list[Unit]] = []
    filled = math.inf
    for unit, n in zip(listing.units, expected, strict=True):
        if filled + n > most:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += n
    return [tuple(group) for group in groups]


def _done(folder: str, dest: str) -> dict[int, dict[str, Any]]:
    """The parts that are whole, with all their shards, by number."""
    sizes = {name: entry.size for name, entry in storage.listing(join(dest, "shards")).items()}
    done = {}
    for name in storage.listing(folder):
        part = json.loads(storage.read(join(folder, name)))
        shards = [made["shard"] for made in part["made"]]
        if all(sizes.get(s["file"].removeprefix("shards/")) == s["size"] for s in shards):
            done[int(part["number"])] = part
    return done


def write_part(
    p: Preparation, listing: Listing, plan: str, number: int, units: Sequence[Unit], device: str = "cpu"
) -> dict[str, Any]:
    """Reads these units, writes their shards, then the note that the part is whole; gives that note. A Ray task."""
    encoders = _encoders(p, device_of_task(device)) if p.encoded else None
    shards = Shards(p, f"shards/{plan[:8]}-{number:05d}", captioned=bool(listing.captioned), encoders=encoders)
    bad, listed = 0, list[dict[str, str]]()
    fs = s3.filesystem(p.source)[0]
    for unit in units:
        for item in read_unit(listing, unit, fs):
            reason = item.error or ("has no label" if listing.labelled and item.label is None else "")
            if not reason:
                assert item.image is not None
                reason = shards.add(item.key, item.image, item.label or 0, item.caption)
            if reason:
                bad += 1
                listed += [{"path": item.key, "reason": reason}] if len(listed) < LISTED else []
    shards.flush()
    part = {"number": number, "made": shards.made, "images": shards.images, "bad": bad, "listed": listed}
    storage.write(join(p.dest, ".parts", plan, f"{number:05d}.json"), json.dumps(part).encode())
    return part


class Shards:
    """Images as they come, to shards of `rows`."""

    def __init__(self, p: Preparation, name: str, *, captioned: bool, encoders: Encoders | None) -> None:
        self.p, self.name, self.captioned, self.encoders = p, name, captioned, encoders
        self.made: list[dict[str, Any]] = []
        self.images = 0
        self._rows: list[tuple[str, np.ndarray, int, str | None]] = []

    def add(self, key: str, image: bytes, label: int, caption: str | None) -> str:
        """Why it is left out, or nothing."""
        from workflows.ingest.decode import BadImage, decode

        p = self.p
        try:
            pixels = decode(image, size=p.size, channels=p.channels, crop=p.crop, rng_key=f"{p.seed} {key}")
        except BadImage as error:
            return str(error)
        self.images += 1
        self._rows.append((key, pixels, label, caption))
        if p.flip:
            self._rows.append((f"{key} mirrored", np.ascontiguousarray(pixels[:, :, ::-1]), label, caption))
        if len(self._rows) >= p.rows:
            self.flush()
        return ""

    def flush(self) -> None:
        if not self._rows:
            return
        keys, images, labels, captions = zip(*self._rows, strict=True)
        pixels = np.stack(images)
        rows = Rows(
            images=pixels,
            labels=np.array(labels),
            # An image and its mirror are held out together.
            holdout=held_out([key.removesuffix(" mirrored") for key in keys], self.p.holdout),
            keys=keys,
            captions=captions if self.captioned else None,
            columns=self.encoders(pixels, keys, captions) if self.encoders else {},
        )
        self.made.append(save_shard(self.p.dest, f"{self.name}-{len(self.made):03d}.parquet", rows, self.p.encoding))
        self._rows = []


def _check_bad(p: Preparation, listing: Listing, tally: Tally, *, whole: bool) -> None:
    """Raises UserError once it is certain that more than `max_bad` of the images can't be read."""
    of = tally.images + tally.bad if whole else listing.count
    if of and tally.bad > p.max_bad * of:
        first = next(iter(tally.listed()), {"path": "?", "reason": "?"})
        raise UserError(
            f"{shown(p.source)}: {tally.bad:,} of {of:,} images can't be read, more than {p.max_bad:.3%}; "
            f"such as {first['path']}: {first['reason']}",
            hint="mend them, or allow more with --max-bad; the parts that are done are kept",
        )
    if whole and tally.images < FEWEST:
        raise UserError(f"{shown(p.source)}: {tally.images} images that can be read; at least {FEWEST} are needed")


def _manifest(p: Preparation, listing: Listing, plan: str, columns: dict[str, Any], tally: Tally) -> Manifest:
    made = [m for _, part in sorted(tally.parts.items()) for m in part["made"]]
    classes = len(listing.classes)
    if listing.labelled and not classes:  # the source's own numbers
        classes = 1 + max(int(label) for m in made for label in m["labels"])
    return manifest_of(
        made,
        source=shown(p.source),
        shape=p.shape,
        encoding=p.encoding,
        num_classes=classes if listing.labelled else 0,
        classes=listing.classes,
        preprocessing=p.preprocessing,
        columns=columns | ({"caption": {"from": listing.captioned}} if listing.captioned else {}),
        skipped={"count": tally.bad, "listed": tally.listed()},
        options={"plan": plan, "of": listing.fingerprint, "kind": listing.kind, "labels": listing.labelled}
        | {name: value for name, value in asdict(p).items() if name not in ("source", "dest") and value is not None},
        versions=versions(),
    )


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("numpy", "pillow", "pyarrow", "ray")
    return {"python": platform.python_version(), "mmdistill": git_commit()} | {name: version(name) for name in names}


def _tidy(dest: str, manifest: Manifest) -> None:
    """Removes the notes of parts, and shards of attempts that came to nothing."""
    wanted = {shard.file for shard in manifest.shards}
    for name in storage.listing(join(dest, "shards")):
        if f"shards/{name}" not in wanted:
            storage.delete(join(dest, "shards", name))
    storage.delete(join(dest, ".parts"))


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


def shown_manifest(manifest: Manifest) -> dict[str, Any]:
    """The manifest for a screen: how many shards, in place of them all."""
    return asdict(manifest) | {"shards": len(manifest.shards)}
