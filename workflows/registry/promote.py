"""The `promote` command: moves an alias to a version that passes its recipe's gate, and records the move.

The gate reads only the metrics in the registry. The stage `register` moves the champion aliases with the same function.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import re
from dataclasses import dataclass

from workflows.config.schema import Gate
from workflows.errors import ConfigError, UserError, brief
from workflows.registry.versions import MOST_TEXT, Registry, Version

ALIAS = re.compile(r"(?!v[0-9]+$|latest$)[A-Za-z0-9_-]{1,100}")
OF_STEPS = re.compile(r"^k([0-9]+)-")
ALIKE = {"k": "steps", "data_fingerprint": "data", "reference": "reference statistics", "samples": "samples"}
"""Tags that must be equal in two versions for their distances to be comparable."""


@dataclass(frozen=True)
class Verdict:
    """`figures` are the metrics that were judged. `refusals` are the reasons for a refusal; empty means that it passes."""

    figures: str
    refusals: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """`refused`: the gate refused the move. False if the alias points to the version already."""

    moved: bool
    text: str
    refused: bool = False


def judge(new: Version, champion: Version | None, alias: str, *, better: bool = False) -> Verdict:
    """Judges the version by the gate that it was registered with, and against the champion if there is one.

    better  True: the distance must be lower than the champion's. False: it may be higher by `spreads` times the seeds' spread
    """
    figures = _figures(new)
    if figures.get("frechet") is None or "gate" not in new.tags:
        return Verdict("", ("it has no metrics to judge: register it again with `mmdistill run`",))
    try:
        gate, refusals = Gate.model_validate_json(new.tags["gate"]), []
    except ValueError:
        return Verdict(
            "", ("its gate can't be read (another mmdistill wrote it): register it again with `mmdistill run`",)
        )
    distance = figures["frechet"]
    shown = [f"distance {distance:.4g}"]
    if gate.frechet is not None and not distance <= gate.frechet:
        refusals.append(f"distance {distance:.4g} is above {gate.frechet:g}")
    if gate.teacher_ratio is not None:
        teacher = figures.get("teacher_frechet", math.nan)
        ratio, at = distance / teacher if teacher else math.inf, f"its teacher's {teacher:.4g} at {new.tags['k']} steps"
        shown.append(f"{ratio:.3g} of {at}")
        if not ratio <= gate.teacher_ratio:
            refusals.append(f"distance {distance:.4g} is {ratio:.3g} of {at}, at most {gate.teacher_ratio:g} passes")
    if gate.recall:
        recall = figures.get("recall", math.nan)
        shown.append(f"recall {recall:.3g}")
        if not recall >= gate.recall:
            refusals.append(f"recall {recall:.3g} is below {gate.recall:g}")
    steps = OF_STEPS.match(alias)
    if steps and new.tags.get("k") != steps[1]:
        refusals.append(f"it has {new.tags.get('k', '?')} steps, {alias} is for {steps[1]}")
    if champion:
        refusals += _against(new, champion, gate, better)
    return Verdict(", ".join(shown), tuple(refusals))


def _against(new: Version, champion: Version, gate: Gate, better: bool) -> list[str]:
    figures, old = _figures(new), _figures(champion)
    unlike = [
        f"{word} {new.tags.get(tag, '?')} against {champion.tags.get(tag, '?')}"
        for tag, word in ALIKE.items()
        if new.tags.get(tag) != champion.tags.get(tag)
    ]
    if unlike or "frechet" not in old:
        return [
            f"it can't be compared with version {champion.version}: {', '.join(unlike) or 'that one has no distance'}"
        ]
    spread = gate.spreads * math.hypot(figures.get("frechet_spread", 0.0), old.get("frechet_spread", 0.0))
    worse = figures["frechet"] - old["frechet"]
    pair = f"distance {figures['frechet']:.4g} against {old['frechet']:.4g} of version {champion.version}"
    if better:
        return [] if worse < 0 else [f"{pair} is not lower"]
    return [] if worse <= spread else [f"{pair} is higher by more than the seeds' spread {spread:.2g}"]


def _figures(version: Version) -> dict[str, float]:
    """The metrics that a gate reads from the version's tags; only finite numbers."""
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
    """Moves the alias to the version if the version passes the gate, or if `force` is set.

    If someone else sets another champion in the meantime, the version is judged against that one too. If it loses, the alias is
    put back.
    """
    state = registry.alias_state(new.name, alias)
    if state.version == new.version:
        return Outcome(False, f"{alias} already points to {new.title}")
    verdict = judge(new, _version(registry, new.name, state.version), alias, better=better)
    if verdict.refusals and not force:
        return Outcome(False, _refused(new, alias, verdict), refused=True)
    by = "forced" if verdict.refusals else "gate"
    against = f"; against: {'; '.join(verdict.refusals)}" if verdict.refusals else ""
    reason = why[: max(0, MOST_TEXT - len(against))] + against  # the refusals stay, however long `why` is
    move = registry.move(new, alias, state, who=who, why=reason, by=by)
    if move.before not in (state.version, new.version) and not force:
        state = registry.alias_state(new.name, alias)
        rival = _version(registry, new.name, move.before)
        verdict = judge(new, rival, alias, better=better)
        if rival and verdict.refusals and state.version == new.version:
            back = f"put back: someone else moved it at the same time, and {'; '.join(verdict.refusals)}"
            registry.move(rival, alias, state, who=who, why=back, by="gate")
            return Outcome(False, _refused(new, alias, verdict), refused=True)
    before = f" from version {move.before}" if move.before else ""
    forced = f", forced past: {'; '.join(verdict.refusals)}" if by == "forced" else ""
    return Outcome(True, f"{alias}: moved{before} to version {new.version}: {verdict.figures or 'no figures'}{forced}")


def _version(registry: Registry, name: str, version: str | None) -> Version | None:
    return registry.version(name, version) if version else None


def _refused(new: Version, alias: str, verdict: Verdict) -> str:
    return f"{alias}: not moved to {new.title}: {'; '.join(verdict.refusals)}"


def user(given: str | None = None) -> str:
    """The name recorded for a move or an export: `given`, MMDISTILL_USER, or the login name; "unknown" if there is none."""
    name = given or os.environ.get("MMDISTILL_USER")
    if not name:
        try:
            name = getpass.getuser()
        except (KeyError, OSError):  # in a container whose user has no name
            name = "unknown"
    return name[:200]


def run_promote(registry: Registry, model: str, *, alias: str, why: str, who: str | None, force: bool) -> str:
    """`mmdistill promote`: moves the alias and returns a line that says so. Raises UserError if the gate refuses the version."""
    if not ALIAS.fullmatch(alias):
        raise ConfigError(
            f"--alias: {brief(alias)} should be at most 100 letters, digits, _ and -, and neither latest nor v and a number"
        )
    if len(why) > MOST_TEXT:
        raise ConfigError(f"--why: {len(why)} characters, at most {MOST_TEXT} are kept")
    outcome = promote(registry, registry.one(model), alias, who=user(who), why=why, force=force)
    if outcome.refused:
        raise UserError(outcome.text, hint="--force moves it anyway, and is recorded")
    return outcome.text


def gate_tag(gate: Gate) -> str:
    """The JSON value of a version's tag `gate`."""
    return json.dumps(gate.model_dump(exclude={"overrides"}), sort_keys=True)
