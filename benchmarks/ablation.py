"""ablate: varies one choice at a time from the same base, on `gmm` and `digits`, over k and seeds, for the tables of
docs/ablation.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from workflows.config.loading import load_config
from workflows.errors import ConfigError
from workflows.rendering.screen import Screen
from workflows.session.options import RunOptions
from workflows.storage.local import write_json
from workflows.sweep.options import SweepOptions
from workflows.sweep.run import run_sweep
from workflows.sweep.space import space_of
from workflows.sweep.table import summarise

BASE: dict[str, Any] = {
    "update": "joint",
    "pairing": "grid",
    "z_t": "data",
    "delta_power": 0.35,
    "p_s": "uniform",
    "w_s": "flat",
    "pull": True,
    "transition": "conditional",
    "optimisers.auxiliary.lr": 2e-3,
    "optimiser.lr": 3e-4,
}
CHOICES: dict[str, dict[str, Any]] = {
    "base": {},
    "alternating": {"update": "alternating"},
    "instant": {"update": "instant", "optimiser.lr": 1.5e-4},
    "instant, identity": {"update": "instant", "optimiser.lr": 1.5e-4, "preconditioner": "identity"},
    "uniform pairs": {"pairing": "uniform"},
    "delta_power 1": {"delta_power": 1.0},
    "rollout": {"z_t": "rollout"},
    "rollout, delta_power 1": {"z_t": "rollout", "delta_power": 1.0},
    "rollout, delta_power 0.6": {"z_t": "rollout", "delta_power": 0.6},
    "rollout, w sigmoid": {"z_t": "rollout", "w_s": "sigmoid"},
    "4 times in a step": {"times_per_step": 4},
    "unconditional z_s": {"transition": "unconditional"},
    "no pull": {"pull": False},
    "auxiliary sees t": {"pairing": "uniform", "auxiliary_sees_t": True},
    "w snr": {"w_s": "snr"},
    "w v": {"w_s": "v"},
    "w edm": {"w_s": "edm"},
    "w sigmoid": {"w_s": "sigmoid"},
    "w dmd": {"w_s": "dmd"},
    "p(s) karras": {"p_s": "karras"},
    "last weights": {"validate_every": 0},
}
"""name -> what differs from BASE."""
IMAGES = {"gmm": 96_000, "digits": 48_000}
"""Images of the base's trainings, by recipe."""
COST = {"joint": 7.0, "alternating": 5.0, "instant": 7.0}
"""Relative time of an image, so that all kinds of update get the same time. Instant has 5 operations where joint has 7. But on two
CPU cores, with attention written out and forward mode, it takes as long (docs/ablation.md has the seconds).
"""
OF_RECIPE: dict[str, dict[str, Any]] = {"gmm": {"preconditioner": "collected"}, "digits": {}}


def setting(recipe: str, name: str) -> dict[str, Any]:
    """The fields of the distill section for a choice, with as many images as cost the same time as the base's."""
    fields = BASE | OF_RECIPE[recipe] | CHOICES[name]
    if fields["update"] != "instant":
        fields.pop("preconditioner", None)
    images = IMAGES[recipe] * COST["joint"] / COST[fields["update"]]
    return fields | {"images": round(images / 1000) * 1000, "choice": name}


def run_ablation(
    recipes: list[str],
    options: RunOptions,
    screen: Screen,
    *,
    page: Path,
    only: list[str],
    ks: list[int],
    seeds: int,
) -> None:
    """Runs the ablation, and updates the tables in `page` and the rows beside it. Raises ConfigError for an unknown recipe or
    choice.
    """
    for name, given, known in (("recipe", recipes, IMAGES), ("--only", only, CHOICES)):
        for value in given:
            if value not in known:
                raise ConfigError(f"{name}: {value!r} is not one of {', '.join(known)}")
    for recipe in recipes or IMAGES:
        config = load_config(recipe, [f"distill.k={ks}"])
        space = {
            "setting": [setting(recipe, name) for name in only or CHOICES],
            "k": ks,
            "seed": list(range(seeds)),
        }
        kept = page.with_suffix("") / f"{recipe}.json"
        new = kept.with_suffix(".new")
        how = SweepOptions(register=False, reporting=True)
        run_sweep(config, options, screen, space=space_of(space, config), how=how, out=new, name="ablation")
        merge_rows(kept, new)
        write_table(page, recipe, json.loads(kept.read_text())["trials"])
        screen.line(f"{kept}, and the table in {page}")


def merge_rows(kept: Path, new: Path) -> None:
    """Merges new rows into the file of kept ones. They replace rows of the same points, and all rows of another teacher."""
    after = json.loads(new.read_text())
    before = json.loads(kept.read_text()) if kept.exists() else after
    rows = {json.dumps(row["point"], sort_keys=True): row for row in after["trials"]}
    if before["teacher"] == after["teacher"]:
        rows = {json.dumps(row["point"], sort_keys=True): row for row in before["trials"]} | rows
    trials = list(rows.values())
    write_json(
        kept, {"recipe": after["recipe"], "teacher": after["teacher"], "means": summarise(trials), "trials": trials}
    )
    new.unlink()


def write_table(page: Path, recipe: str, trials: list[dict[str, Any]]) -> None:
    """Writes the recipe's table between its marks in the page, or at the end of the page."""
    text = page.read_text() if page.exists() else ""
    begin, end = f"<!-- {recipe} -->", f"<!-- /{recipe} -->"
    block = f"{begin}\n{table(trials)}\n{end}"
    found = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", text, re.DOTALL)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text.replace(found[0], block) if found else f"{text.rstrip()}\n\n{block}\n".lstrip())


def table(trials: list[dict[str, Any]]) -> str:
    """Distance in the main features that report, by choice and k: mean ± standard deviation over seeds. The best of a column is in
    bold. The last column has the mean seconds.
    """
    named = [
        row | {"point": {"choice": row["point"]["setting"]["choice"], **row["point"]} | {"setting": ""}}
        for row in trials
    ]
    main = "frechet_reported"
    lines = {(line["point"]["choice"], line["point"]["k"]): line for line in summarise(named)}
    ks = sorted({k for _, k in lines})
    best = {k: min(line[main]["mean"] for (_, other), line in lines.items() if other == k) for k in ks}
    rows = ["| | " + " | ".join(f"k = {k}" for k in ks) + " | seconds |", "|---" * (len(ks) + 2) + "|"]
    for choice in dict.fromkeys(name for name in CHOICES if any(c == name for c, _ in lines)):
        cells, seconds = [], []
        for k in ks:
            line = lines.get((choice, k))
            if line is None:
                cells.append("")
                continue
            mean, spread = line[main]["mean"], line[main]["spread"]
            cell = f"{mean:.3f} ± {spread:.3f}"
            cells.append(f"**{cell}**" if mean == best[k] else cell)
            seconds.append(line["seconds"]["mean"])
        rows.append(f"| {choice} | " + " | ".join(cells) + f" | {sum(seconds) / len(seconds):.0f} |")
    return "\n".join(rows)
