"""promote: an alias moves to a version that passes its recipe's gate, from the registry's figures; each move is recorded.

`register` moves the champions' aliases by the same function.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import re
from dataclasses import dataclass

from workflows.config.schema import ConfigError, Gate
from workflows.config.values import brief
from workflows.errors import UserError
from workflows.registry.versions import MOST_TEXT, Registry, Version

ALIAS = re.compile(r"(?!v[0-9]+$|latest$)[A-Za-z0-9_-]{1,100}")
OF_STEPS = re.compile(r"^k([0-9]+)-")
ALIKE = {"k": "steps", "data_fingerprint": "data", "reference": "reference statistics", "samples": "samples"}
"""What two versions must have been measured with alike for their distances to be compared."""


@dataclass(frozen=True)
class Verdict:
    """`figures` is what the version showed, `refusals` why it does not pass: none if it does."""

    figures: str
    refusals: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    moved: bool
    text: str


def judge(new: Version, champion: Version | None, alias: str, *, better: bool = False) -> Verdict:
    """The version's figures against the gate that it was registered with, and against the champion's.

    better  only a lower distance passes the champion; else one that is no higher by more than the gate's spreads does
    """
    own = _figures(new)
    if own.get("frechet") is None or "gate" not in new.tags:
        return Verdict("", ("it carries no figures to judge by: register it anew with `mmdistill run`",))
    try:
        gate, refusals = Gate.model_validate_json(new.tags["gate"]), []
    except ValueError:
        return Verdict(
            "", ("its gate can't be read, another mmdistill wrote it: register it anew with `mmdistill run`",)
        )
    said, distance = [f"distance {own['frechet']:.4g}"], own["frechet"]
    if gate.frechet is not None and not distance <= gate.frechet:
        refusals.append(f"distance {distance:.4g} is above {gate.frechet:g}")
    if gate.teacher_ratio is not None:
        teacher = own.get("teacher_frechet", math.nan)
        ratio, at = distance / teacher if teacher else math.inf, f"its teacher's {teacher:.4g} at {new.tags['k']} steps"
        said.append(f"{ratio:.3g} of {at}")
        if not ratio <= gate.teacher_ratio:
            refusals.append(f"distance {distance:.4g} is {ratio:.3g} of {at}, at most {gate.teacher_ratio:g} passes")
    if gate.recall:
        recall = own.get("recall", math.nan)
        said.append(f"recall {recall:.3g}")
        if not recall >= gate.recall:
            refusals.append(f"recall {recall:.3g} is below {gate.recall:g}")
    steps = OF_STEPS.match(alias)
    if steps and new.tags.get("k") != steps[1]:
        refusals.append(f"it has {new.tags.get('k', '?')} steps, {alias} is of {steps[1]}")
    if champion:
        refusals += _against(new, champion, gate, better)
    return Verdict(", ".join(said), tuple(refusals))


def _against(new: Version, champion: Version, gate: Gate, better: bool) -> list[str]:
    own, old = _figures(new), _figures(champion)
    unlike = [
        f"{word} {new.tags.get(tag, '?')} against {champion.tags.get(tag, '?')}"
        for tag, word in ALIKE.items()
        if new.tags.get(tag) != champion.tags.get(tag)
    ]
    if unlike or "frechet" not in old:
        return [f"it can't be compared with version {champion.version}: {', '.join(unlike) or 'which has no distance'}"]
    spread = gate.spreads * math.hypot(own.get("frechet_spread", 0.0), old.get("frechet_spread", 0.0))
    worse = own["frechet"] - old["frechet"]
    pair = f"distance {own['frechet']:.4g} against {old['frechet']:.4g} of version {champion.version}"
    if better:
        return [] if worse < 0 else [f"{pair} is not lower"]
    return [] if worse <= spread else [f"{pair} is higher by more than the seeds' spread {spread:.2g}"]


def _figures(version: Version) -> dict[str, float]:
    """Those of the version's tags that are finite numbers, of those that a gate reads."""
    out = {}
    for name in ("frechet", "frechet_spread", "recall", "teacher_frechet"):
        try:
            value = float(version.tags[name])
        except (KeyError, ValueError):
            continue
        if math.isfinite(value):
            out[name] = value
    return out


def promote(
    registry: Registry, new: Version, alias: str, *, who: str, why: str, force: bool = False, better: bool = False
) -> Outcome:
    """Moves the alias to the version if it passes, or by force. A champion that somebody else has set in the meantime is judged
    against as well, and put back if it is the better one.
    """
    held = registry.held(new.name, alias)
    if held.version == new.version:
        return Outcome(False, f"{alias}: {new.title} is that already")
    verdict = judge(new, _version(registry, new.name, held.version), alias, better=better)
    if verdict.refusals and not force:
        return Outcome(False, _refused(new, alias, verdict))
    by = "forced" if verdict.refusals else "gate"
    against = f"; against: {'; '.join(verdict.refusals)}" if verdict.refusals else ""
    reason = why[: max(0, MOST_TEXT - len(against))] + against  # which is to be there, however long the other is
    move = registry.move(new, alias, held, who=who, why=reason, by=by)
    if move.before not in (held.version, new.version) and not force:
        held = registry.held(new.name, alias)
        rival = _version(registry, new.name, move.before)
        verdict = judge(new, rival, alias, better=better)
        if rival and verdict.refusals and held.version == new.version:
            back = f"put back, moved by someone else at the same time: {'; '.join(verdict.refusals)}"
            registry.move(rival, alias, held, who=who, why=back, by="gate")
            return Outcome(False, _refused(new, alias, verdict))
    before = f" from version {move.before}" if move.before else ""
    forced = f", forced past: {'; '.join(verdict.refusals)}" if by == "forced" else ""
    return Outcome(True, f"{alias}: moved{before} to version {new.version}: {verdict.figures or 'no figures'}{forced}")


def _version(registry: Registry, name: str, version: str | None) -> Version | None:
    return registry.version(name, version) if version else None


def _refused(new: Version, alias: str, verdict: Verdict) -> str:
    return f"{alias}: not moved to {new.title}: {'; '.join(verdict.refusals)}"


def user(given: str | None = None) -> str:
    """Who moves an alias: as given, MMDISTILL_USER, or the name in the environment."""
    name = given or os.environ.get("MMDISTILL_USER")
    if not name:
        try:
            name = getpass.getuser()
        except (KeyError, OSError):  # a container whose user has no name
            name = "unknown"
    return name[:200]


def run_promote(registry: Registry, model: str, *, alias: str, why: str, who: str | None, force: bool) -> str:
    """`mmdistill promote`: a line that says what was done. Raises UserError, with the figures, where the gate refuses."""
    if not ALIAS.fullmatch(alias):
        raise ConfigError(
            f"--alias: {brief(alias)} should be at most 100 letters, digits, _ and -, and neither latest nor v and a number"
        )
    if len(why) > MOST_TEXT:
        raise ConfigError(f"--why: {len(why)} characters, at most {MOST_TEXT} are kept")
    outcome = promote(registry, registry.one(model), alias, who=user(who), why=why, force=force)
    if not outcome.moved and "is that already" not in outcome.text:
        raise UserError(outcome.text, hint="--force moves it all the same, and is recorded as that")
    return outcome.text


def gate_tag(gate: Gate) -> str:
    """A gate as the tag `gate` of a version."""
    return json.dumps(gate.model_dump(exclude={"overrides"}), sort_keys=True)
