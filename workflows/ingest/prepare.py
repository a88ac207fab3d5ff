"""`mmdistill prepare SOURCE DEST`: turns images into a data set. Each Ray task writes the shards of one part of the source.

DEST/shards/<plan>-<part>-<n>.parquet   the rows, about 64 MB a shard
DEST/.parts/<plan>/<part>.json          marks a finished part, which a resumed preparation skips. Removed at the end
DEST/manifest.json                      written last
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from rich.markup import escape

from workflows.cluster.session import device_of_task, task_options
from workflows.dataset.extractors import check_extractor
from workflows.dataset.manifest import FEWEST, MANIFEST, Manifest, Sum, is_data_set, read_manifest, write_manifest
from workflows.dataset.readers import Item, Listing, Unit, list_source, read_unit
from workflows.dataset.readers.files import DENIED, LeftOut
from workflows.dataset.shards import Rows, held_out, manifest_of, save_shard
from workflows.errors import UserError
from workflows.ingest.encoders import Encoders
from workflows.ingest.options import Preparation
from workflows.ingest.statistics import statistics_are_whole, statistics_for
from workflows.ingest.summary import UNLABELLED, kind_of, summarise
from workflows.rendering.screen import Screen, short
from workflows.storage import s3, store
from workflows.storage.code import git_commit
from workflows.storage.s3 import explained
from workflows.storage.uri import is_remote, join, resolved, shown

UNIT = 2**20
"""Target bytes of a unit, the smallest piece of the source that is read at once."""
PARTS, SMALL = 16, 1000
"""A small source is still cut into about PARTS parts, of at least SMALL images each, so that tasks run in parallel."""
GUESSED_BYTES = 100_000
"""Assumed bytes of an image, if the source does not state its number of images."""
WRITE_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS))
"""Errors from writing the data set, which the command line explains."""
NO_PERMISSION = frozenset((errno.EACCES, errno.EPERM))
"""Errors from reading a remote source. With a local one they are from writing: its unreadable images are skipped and counted."""
READERS = 8
"""Units that are read concurrently to compare contents."""
LISTED = 1000
"""Maximum number of skipped images that the manifest lists."""


@lru_cache(maxsize=1)
def _encoders(latents: str | None, text: str | None, size: int, device: str) -> Encoders:
    """The encoders, cached for the next task in the same process."""
    return Encoders(latents, text, size=size, device=device)


@dataclass
class Tally:
    """The records of finished parts, by number, and their sums."""

    parts: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return sum(part["images"] for part in self.parts.values())

    @property
    def bad(self) -> int:
        return sum(part["bad"] for part in self.parts.values())

    @property
    def captioned(self) -> int:
        return sum(part["captioned"] for part in self.parts.values())

    @property
    def reasons(self) -> Counter[str]:
        """How many images were left out, by kind of reason."""
        return sum((Counter(part["reasons"]) for part in self.parts.values()), Counter[str]())

    @property
    def left_out(self) -> LeftOut:
        counts = LeftOut()
        for part in self.parts.values():
            counts.update({(what, why): count for what, why, count in part["left_out"]})
        return counts

    @property
    def content(self) -> str:
        """A hash of all items that were read: the sum of their digests."""
        total = Sum()
        for part in self.parts.values():
            total.merge(part["content"])
        return total.hex()

    def listed(self) -> list[dict[str, str]]:
        return [entry for _, part in sorted(self.parts.items()) for entry in part["listed"]][:LISTED]


def prepare_data_set(preparation: Preparation, screen: Screen) -> Manifest:
    """Writes the data set and returns its manifest. Continues an interrupted preparation, and leaves a finished one as it is.

    Needs a running Ray. Raises UserError if the source can't be read, too many images are broken, or DEST holds something else.
    """
    p = replace(preparation, source=resolved(preparation.source), dest=resolved(preparation.dest))
    for outer, inner in ((p.source, p.dest), (p.dest, p.source)):
        if f"{inner}/".startswith(f"{outer}/"):
            raise UserError(f"{shown(inner)}: lies in {shown(outer)}", hint="name a folder beside the source")
    store.check(p.dest)
    with screen.status(f"listing {escape(shown(p.source))}"):
        listing = listing_of(p)
    with screen.status("loading the encoders"):
        columns = Encoders(p.latents, p.text_encoder, size=p.size).columns() if p.encoded else {}
    if p.text_encoder and not listing.captioned:
        raise UserError(f"--text-encoder: {shown(p.source)} has no captions", hint="name them with --captions")
    if p.extractor:
        # How many classes there are is not always known yet.
        classes = int(bool(listing.labelled))
        check_extractor(p.extractor, p.extractor_weights, shape=p.shape, num_classes=classes, option="--extractor")
    plan = p.key(listing, columns)
    if is_data_set(p.dest) and (existing := _existing(p, listing, columns, screen)):
        return existing
    for note in listing.notes:
        screen.line(f"[yellow]![/] {escape(note)}")
    tally = _write_parts(p, listing, plan, screen)
    manifest = _manifest(p, listing, columns, tally)
    if p.extractor:
        manifest = replace(manifest, statistics=statistics_for(p, manifest, screen))
    if is_data_set(p.dest) or not _is_complete(p.dest, manifest):
        raise UserError(f"{shown(p.dest)}: another preparation wrote to it in the meantime", hint="name another folder")
    write_manifest(p.dest, manifest)
    _tidy(p.dest, manifest)
    shards = f"{len(manifest.shards)} shard{'s' if len(manifest.shards) > 1 else ''}"
    left_out = f", {tally.bad:,} left out" if tally.bad else ""
    screen.line(
        f"[green]✓[/] [bold]{shown(p.dest)}[/]  {manifest.count:,} images "
        f"{'x'.join(map(str, manifest.shape))} in {shards}{left_out}  [dim]{manifest.fingerprint}[/]"
    )
    _print_summary(manifest, screen)
    return manifest


def listing_of(p: Preparation) -> Listing:
    """Lists the source. Raises UserError if it can't be used."""
    return list_source(
        p.source,
        labels=p.labels,
        captions=p.captions,
        label_column=p.label_column,
        image_column=p.image_column,
        caption_column=p.caption_column,
        unit_bytes=UNIT,
        limit=p.limit,
        filesystem=s3.reading_filesystem(p.source),
    )


def _print_summary(manifest: Manifest, screen: Screen) -> None:
    if manifest.taken:
        screen.line(f"  {escape(manifest.taken['said'])}")


def _is_same(p: Preparation, listing: Listing, columns: dict[str, Any], there: Manifest, screen: Screen) -> bool:
    """Whether the existing data set was made from this source. If only the files' times differ, all contents are compared."""
    if there.options.get("same") == p.key_without_code(listing, columns):
        return True
    alike = p.key_of_options(columns) == there.options.get("ways") and there.classes == listing.classes
    if not alike or there.options.get("names") != listing.content:
        return False
    with screen.status("the files' times differ: comparing their contents"):
        return bool(content_of(p, listing) == there.options.get("content"))


def content_of(p: Preparation, listing: Listing) -> str:
    """The same hash as `Tally.content`, computed by reading the source. Nothing is decoded."""
    fs, total = s3.reading_filesystem(p.source), Sum()

    def digests_of(unit: Unit) -> list[bytes]:
        with explained_reading(p.source):
            return [digest_of(item) for item in read_unit(listing, unit, fs)]

    with ThreadPoolExecutor(READERS) as pool:
        for digests in pool.map(digests_of, listing.units):
            total.add(digests)
    return total.hex()


@contextmanager
def explained_reading(source: str) -> Iterator[None]:
    """Raises UserError for errors of reading the source. Those of writing the data set are raised as they are."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        of_source = (
            number not in WRITE_ERRORS if is_remote(source) else number not in {None, *WRITE_ERRORS, *NO_PERMISSION}
        )
        if isinstance(error, UserError) or not of_source:
            raise
        raise explained(error, source) from error


def digest_of(item: Item) -> bytes:
    """A hash of an item as it was read: key, label, caption, error and bytes."""
    about = json.dumps([item.key, item.label, item.caption, bool(item.error)])
    digest = hashlib.blake2b(about.encode(), digest_size=Sum.BITS // 8)
    digest.update(item.image or b"")
    return digest.digest()


def _existing(p: Preparation, listing: Listing, columns: dict[str, Any], screen: Screen) -> Manifest | None:
    """The manifest of the data set in DEST, with the requested statistics added. None if shards are missing.

    Raises UserError if it is another data set.
    """
    there = read_manifest(p.dest)
    if not _is_same(p, listing, columns, there, screen):
        raise UserError(
            f"{shown(p.dest)}: holds another data set, of {there.count:,} images from {there.source}",
            hint="name another folder, or remove that one",
        )
    if not _is_complete(p.dest, there):
        screen.line(f"[yellow]![/] {shown(p.dest)}: shards are missing, so it is prepared again")
        store.delete(join(p.dest, MANIFEST))
        return None
    screen.line(f"[green]✓[/] {shown(p.dest)} already holds this data set: {there.count:,} images")
    if p.extractor and not (there.statistics.get("options") == p.features and statistics_are_whole(p.dest, there)):
        write_manifest(p.dest, replace(there, statistics={}))  # readers must not use the old statistics meanwhile
        there = replace(there, statistics=statistics_for(p, there, screen))
        write_manifest(p.dest, there)
        screen.line(f"[green]✓[/] added reference statistics in features of {p.extractor}")
    _print_summary(there, screen)
    return there


def _is_complete(dest: str, manifest: Manifest) -> bool:
    """Whether all shards exist, by name and size."""
    there = store.listing(join(dest, "shards"))
    sizes = {f"shards/{name}": entry.size for name, entry in there.items()}
    return all(sizes.get(shard.file) == shard.size for shard in manifest.shards)


def _write_parts(p: Preparation, listing: Listing, plan: str, screen: Screen) -> Tally:
    import ray

    from workflows.dataset.streaming import spread

    groups = grouped(listing, p.rows)
    folder = join(p.dest, ".parts", plan)
    tally = Tally(_finished_parts(folder, p.dest))
    if tally.parts:
        screen.line(f"  continues: {len(tally.parts)} of {len(groups)} parts are done, {tally.images:,} images")
    bare, resources = replace(listing, units=()), ray.cluster_resources()
    # Encoders use GPUs if there are any.
    use_gpu = p.encoded and resources.get("GPU", 0) >= 1
    at_once, device = int(resources.get("GPU" if use_gpu else "CPU", 1)), "cuda" if use_gpu else "cpu"
    task = {name: value for name, value in task_options(use_gpu=use_gpu).items() if name != "max_retries"}
    waiting = [(number, units) for number, units in enumerate(groups) if number not in tally.parts]

    def work(item: tuple[int, Sequence[Unit]]) -> Iterator[dict[str, Any]]:
        number, units = item
        with explained_reading(p.source):
            part = write_part(p, bare, plan, number, units, device)
        yield part

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
    """Groups the units into parts that fill about one shard of `rows` rows each."""
    each = sum(unit.size for unit in listing.units) / listing.count if listing.count else GUESSED_BYTES
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
    if listing.units[0].kind != "images":
        return [tuple(group) for group in groups]
    # Files sorted by name are sorted by class, so each part takes every n-th unit to get all classes.
    return [tuple(listing.units[i :: len(groups)]) for i in range(len(groups))]


def _finished_parts(folder: str, dest: str) -> dict[int, dict[str, Any]]:
    """The records of finished parts whose shards all exist, by number. Parts with denied files are left out, to be tried again."""
    sizes = {name: entry.size for name, entry in store.listing(join(dest, "shards")).items()}
    done = {}
    for name in store.listing(folder):
        if not re.fullmatch(r"[0-9]+\.json", name):
            continue  # a half-written record
        part = json.loads(store.read(join(folder, name)))
        shards = [made["shard"] for made in part["made"]]
        if not part["denied"] and all(sizes.get(s["file"].removeprefix("shards/")) == s["size"] for s in shards):
            done[int(part["number"])] = part
    return done


def write_part(
    p: Preparation, listing: Listing, plan: str, number: int, units: Sequence[Unit], device: str = "cpu"
) -> dict[str, Any]:
    """Reads these units, writes their shards and then the record of the part, and returns that record. Runs as a Ray task."""
    encoders = _encoders(p.latents, p.text_encoder, p.size, device_of_task(device)) if p.encoded else None
    # Whether tars have captions is known only when they are read.
    may_have = bool(listing.captioned or (listing.kind == "webdataset" and listing.caption_columns))
    shards = Shards(p, f"shards/{plan[:8]}-{number:05d}", captioned=may_have, encoders=encoders)
    denied, captioned, listed = 0, 0, list[dict[str, str]]()
    reasons, left_out, content = Counter[str](), LeftOut(), Sum()
    fs = s3.reading_filesystem(p.source)
    for unit in units:
        for item in read_unit(listing, unit, fs, left_out):
            content.add([digest_of(item)])
            reason = item.error or (UNLABELLED if listing.labelled and item.label is None else "")
            if not reason:
                assert item.image is not None
                reason = shards.add(item.key, item.image, item.label or 0, item.caption)
            if reason:
                reasons[kind_of(reason)] += 1
                denied += reason == DENIED
                listed += [{"path": item.key, "reason": reason}] if len(listed) < LISTED else []
            else:
                captioned += item.caption is not None
    shards.flush()
    part = {
        "number": number,
        "made": shards.made,
        "images": shards.images,
        "captioned": captioned,
        "bad": reasons.total(),
        "reasons": reasons,
        "listed": listed,
        "left_out": [[what, why, count] for (what, why), count in left_out.items()],
        "content": content.hex(),
        "denied": denied,
    }
    store.write(join(p.dest, ".parts", plan, f"{number:05d}.json"), json.dumps(part).encode())
    return part


class Shards:
    """Writes images to shards of `rows` rows as they arrive."""

    def __init__(self, p: Preparation, name: str, *, captioned: bool, encoders: Encoders | None) -> None:
        self.p, self.name, self.captioned, self.encoders = p, name, captioned, encoders
        self.made: list[dict[str, Any]] = []
        self.images = 0
        self._rows: list[tuple[str, np.ndarray, int, str | None]] = []

    def add(self, key: str, image: bytes, label: int, caption: str | None) -> str:
        """Adds an image. Returns why it is left out, or an empty string."""
        from workflows.dataset.readers.decode import BadImage, decode

        p = self.p
        try:
            pixels = decode(image, size=p.size, channels=p.channels, crop=p.crop, rng_key=f"{p.seed} {key}", name=key)
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
    """Raises UserError once more than `max_bad` of the images are sure to be left out. `whole`: all parts are done.

    At the end also checks that captions matched and that there are enough images.
    """
    total = tally.images + tally.bad if whole else listing.count
    if total and tally.bad > p.max_bad * total:
        unlabelled = tally.reasons[UNLABELLED]
        lacking = unlabelled > p.max_bad * total
        problem = (
            f"{unlabelled:,} of {total:,} images have no label"
            if lacking
            else f"{tally.bad:,} of {total:,} images can't be read"
        )
        first = next(
            (e for e in tally.listed() if not lacking or e["reason"] == UNLABELLED), {"path": "?", "reason": "?"}
        )
        hint = (
            "use --labels none for a data set without classes, or leave them out with --max-bad"
            if lacking
            else "repair them, or allow more with --max-bad"
        )
        raise UserError(
            f"{shown(p.source)}: {problem}, more than {p.max_bad:.3%}; such as {first['path']}: {first['reason']}",
            hint=f"{hint}; finished parts are kept",
        )
    if whole and listing.caption_file and listing.limit is None and not tally.captioned:
        raise UserError(f"{listing.captioned}: none of its captions belongs to an image of {shown(p.source)}")
    if whole and tally.images < FEWEST:
        raise UserError(f"{shown(p.source)}: only {tally.images} images can be read; at least {FEWEST} are needed")


def _manifest(p: Preparation, listing: Listing, encoded: dict[str, Any], tally: Tally) -> Manifest:
    made = [m for _, part in sorted(tally.parts.items()) for m in part["made"]]
    classes = len(listing.classes)
    if listing.labelled and not classes:  # labels are numbers without names
        classes = 1 + max(int(label) for m in made for label in m["labels"])
    captions = listing.captioned or ("files beside the images" if tally.captioned else "")
    taken = summarise(
        listing,
        images=tally.images,
        captioned=tally.captioned,
        left_out=tally.left_out,
        reasons=tally.reasons,
        classes=classes if listing.labelled else 0,
    )
    return manifest_of(
        made,
        source=shown(p.source),
        shape=p.shape,
        encoding=p.encoding,
        num_classes=classes if listing.labelled else 0,
        classes=listing.classes,
        preprocessing=p.preprocessing,
        columns=encoded | ({"caption": {"from": captions}} if captions else {}),
        taken=taken,
        skipped={"count": tally.bad, "listed": tally.listed()},
        options={
            "same": p.key_without_code(listing, encoded),
            "of": listing.fingerprint,
            "ways": p.key_of_options(encoded),
            "names": listing.content,
            "content": tally.content,
            "kind": listing.kind,
            "labels": listing.labelled,
        }
        | {
            name: value
            for name, value in asdict(p).items()
            if name not in ("source", "dest", "extractor", "extractor_weights") and value is not None
        },
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """The versions of the software that made a data set, for its manifest."""
    from importlib.metadata import version

    names = ("numpy", "pillow", "pyarrow", "ray")
    return {"python": platform.python_version(), "mmdistill": git_commit()} | {name: version(name) for name in names}


def _tidy(dest: str, manifest: Manifest) -> None:
    """Removes the records of parts, and shards that failed attempts left behind."""
    wanted = {shard.file for shard in manifest.shards}
    for name in store.listing(join(dest, "shards")):
        if f"shards/{name}" not in wanted:
            store.delete(join(dest, "shards", name))
    store.delete(join(dest, ".parts"))


def shown_manifest(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON values, with the number of shards in place of their list."""
    return asdict(manifest) | {"shards": len(manifest.shards)}
