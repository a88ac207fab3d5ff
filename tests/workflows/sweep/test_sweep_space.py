"""What a sweep may try: spaces from YAML and the command line, the points drawn from them, and mistakes in both."""

import math
import random

import pytest

from workflows.config.loading import load_config
from workflows.errors import ConfigError
from workflows.sweep.options import SweepOptions, check_sweep
from workflows.sweep.space import Domain, read_space, section, shares, space_names, space_of

DIGITS = load_config("digits", ["distill.z_t=data"])


def of(*texts, k=8):
    return read_space([f"k={k}", *texts], DIGITS).of_k[k]


def test_the_command_line():
    assert of("pairing=uniform, grid", "optimiser.lr=1e-4,0.001", "optimisers.auxiliary.lr=loguniform(1e-4, 1e-2)") == {
        "pairing": Domain("choice", ("uniform", "grid")),
        "optimiser.lr": Domain("choice", (1e-4, 1e-3)),
        "optimisers.auxiliary.lr": Domain("loguniform", (1e-4, 1e-2)),
    }


YAML = """
k: [1, 4, 2]
images: 1000
pairing: {grid: [uniform, grid]}
optimiser: {lr: {loguniform: [1e-4, 1.0e-3]}, beta1: 0.5}
auxiliary_updates: {randint: [1, 4]}
delta_power: {quniform: [0.2, 1.0, 0.2]}
overrides:
  1: {pairing: grid, optimiser.lr: [0.01]}
"""


def test_a_file_and_what_the_command_line_says_over_it(tmp_path):
    (tmp_path / "mine.yaml").write_text(YAML)
    space = read_space(["images=2000", str(tmp_path / "mine.yaml")], DIGITS)
    assert space.ks == (4, 2, 1)
    assert space.of_k[4] == {
        "images": Domain("choice", (2000,)),
        "pairing": Domain("choice", ("uniform", "grid")),
        "optimiser.lr": Domain("loguniform", (1e-4, 1e-3)),
        "optimiser.beta1": Domain("choice", (0.5,)),
        "auxiliary_updates": Domain("randint", (1, 4)),
        "delta_power": Domain("quniform", (0.2, 1.0, 0.2)),
    }
    assert space.of_k[1]["pairing"] == Domain("choice", ("grid",))
    assert space.of_k[1]["optimiser.lr"] == Domain("choice", (0.01,))
    assert set(space.fields) == {"pairing", "optimiser.lr", "auxiliary_updates", "delta_power"}


@pytest.mark.parametrize("name", space_names())
def test_every_space_that_is_shipped_is_valid_and_described(name):
    from workflows.sweep.space import SPACES

    space = read_space([name], DIGITS)
    for k in space.ks:
        for point in space.drawn(k, 20, 0):
            section(DIGITS, k, point)
    assert (SPACES / f"{name}.yaml").read_text().startswith("# ")


def test_draws_follow_their_laws_and_a_larger_sweep_has_the_points_of_a_smaller_one():
    space = read_space(
        ["k=8", "optimiser.lr=loguniform(1e-4,1e-2)", "delta_power=uniform(0.2,1)", "ema_ramp=quniform(0.1,0.5,0.1)",
         "auxiliary_updates=randint(1,3)"], DIGITS,
    )  # fmt: skip
    points = space.drawn(8, 400, 0)
    assert points[:16] == space.drawn(8, 16, 0)
    assert points[:16] != space.drawn(8, 16, 1)[:16]
    logs = [math.log10(p["optimiser.lr"]) for p in points]
    assert -4 <= min(logs) < -3.9 < -2.1 < max(logs) <= -2
    assert abs(sum(logs) / 400 + 3) < 4 * 2 / math.sqrt(12 * 400)  # the mean of a uniform law, in four standard errors
    assert {p["ema_ramp"] for p in points} == {0.1, 0.2, 0.3, 0.4, 0.5}
    assert {p["auxiliary_updates"] for p in points} == {1, 2}
    assert all(0.2 <= p["delta_power"] <= 1 for p in points)


def test_draws_from_lists_are_different_points_and_no_more_than_there_are():
    space = read_space(["k=8", "pairing=grid,uniform", "seed=0,1,2"], DIGITS)
    points = space.drawn(8, 16, 0)
    assert sorted(map(str, points)) == sorted(map(str, space.grid(8)))
    assert len(points) == 6


def test_the_trials_are_shared_by_the_ks():
    assert shares((8, 4, 2, 1), 16) == {8: 4, 4: 4, 2: 4, 1: 4}
    assert shares((8, 4, 2), 8) == {8: 3, 4: 3, 2: 2}


def test_a_trial_wins_over_the_recipes_own_setting_for_its_k():
    config = load_config("digits", ["distill.z_t=data", "distill.overrides.8.pairing=uniform"])
    assert section(config, 8, {"k": 8}).pairing == "uniform"
    own = section(config, 8, {"pairing": "grid", "optimiser.lr": 0.5, "seed": 3, "k": 8})
    assert (own.pairing, own.optimiser.lr, own.k) == ("grid", 0.5, (8,))
    assert section(config, 4, {"k": 4, "setting": {"choice": "mine", "eta": 0.5, "optimiser.lr": 0.1}}).eta == 0.5


@pytest.mark.parametrize(
    ("low", "high", "step", "values"),
    [
        (0.2, 1, 0.3, [0.2, 0.5, 0.8]),
        (0.1, 0.7, 0.1, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        (0, 1, 0.6, [0, 0.6]),
        (0, 1, 2, [0]),
        (1, 9, 2, [1, 3, 5, 7, 9]),
        (1e-12, 3e-12, 1e-12, [1e-12, 2e-12, 3e-12]),
        (0.1, 0.1 + 3 * 0.7, 0.7, [0.1, 0.8, 1.5, 2.2]),
    ],
)
def test_steps_stay_within_their_bounds_and_reach_them(low, high, step, values):
    domain, rng = Domain("quniform", (low, high, step)), random.Random(0)
    assert sorted({domain.draw(rng) for _ in range(200)}) == pytest.approx(values)
    assert domain.checked == pytest.approx((values[0], values[-1]))
    assert max(domain.checked) <= high


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pairin=grid", "pairin: no such option; did you mean pairing"),
        ("pairing=grid,both", "pairing: 'both' is not one of"),
        ("optimiser.lrr=1", "optimiser.lrr: no such option; did you mean lr"),
        ("optimiser.lr=loguniform(-1,1)", "optimiser.lr: loguniform(-1, 1): low: -1 should be greater than 0"),
        ("optimiser.lr=loguniform(1)", "optimiser.lr: loguniform(1) takes low, high"),
        ("optimiser.lr=loguniforn(1,2)", "did you mean loguniform?"),
        ("optimiser.lr=uniform(2,1)", "low should be below high"),
        ("auxiliary_updates=uniform(1,3)", "auxiliary_updates: 1.6366197723675815 should be a valid integer"),
        ("optimiser.lr=quniform(1,2,0)", "quniform(1, 2, 0): step: 0 should be greater than 0"),
        ("optimiser.lr=uniform(1,2,3)", "uniform(1, 2, 3) takes low, high"),
        ("setting=mine", "setting: should hold fields, such as"),
        ("auxiliary_updates=randint(1,2.5)", "randint(1, 2.5): high: 2.5 should be a valid integer"),
        ("pairing", "'pairing' is neither a space"),
        ("steps-and-weigths", "did you mean steps-and-weights?"),
        ("nowhere.yaml", "no such file nowhere.yaml"),
        ("pairing=[grid", "the values of 'pairing=[grid' are not YAML"),
        ("k=0", "k: [0] should be different whole numbers, at least 1"),
        ("seed=-1", "seed: -1 should be a whole number"),
        ("seed=100000000000000000000000", "seed: 100000000000000000000000 should be a whole number"),
        ("seed=true", "seed: True should be a whole number"),
        ("seed=0.5", "seed: 0.5 should be a whole number"),
        ("k=true", "k: [True] should be different whole numbers"),
        ("k=100000000", "k: [100000000] should be different whole numbers, at least 1 and at most"),
        ("optimiser.lr=.nan,1", "optimiser.lr: nan should be a finite number"),
        ("optimiser.lr=uniform(0.1,.inf)", "uniform(0.1, inf): high: inf should be a finite number"),
        ("images=uniform(1,true)", "uniform(1, True): high: true should be a number"),
        (f"images=randint(1,{10**400})", "is more than a whole number of 64 bits holds"),
        ("images=true", "images: true should be a number"),
        ("images=" + "[" * 1500, "are nested deeper than 20 levels"),
        ("guidance=1", "never learns the null label"),
        ("warm_start=true", "warm_start: is an option of the sweep itself: --warm-start"),
    ],
)
def test_mistakes_are_one_line(text, said):
    with pytest.raises(ConfigError) as caught:
        read_space([text], DIGITS)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pairin: [grid]", "pairin: no such option; did you mean pairing"),
        ("optimiser: {lrr: 1}", "optimiser.lrr: no such option; did you mean lr"),
        ("overrides: {3: {pairing: grid}}", "overrides: 3 is not one of k"),
        ("overrides: {8: {k: 4}}", "overrides: k: can't differ for one k"),
        ("overrides: [1]", "overrides: should hold fields by k"),
        ("pairing: []", "pairing: no value is given"),
        ("- pairing", "should hold fields, not a list"),
        ("pairing: [", "is not YAML"),
        ("pairing: grid\npairing: uniform", "is not YAML: line 2: 'pairing' stands twice"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_space([str(tmp_path / "mine.yaml")], DIGITS)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_how_it_is_searched():
    lists, laws = space_of({"pairing": ["grid", "uniform"]}, DIGITS), read_space(["delta_power=uniform(0.2,1)"], DIGITS)
    assert check_sweep(lists, SweepOptions()).search == "grid"
    assert check_sweep(laws, SweepOptions()).search == "random"
    for space, options, said in (
        (laws, SweepOptions(search="grid"), "grid tries lists, and delta_power (uniform) is none"),
        (laws, SweepOptions(search="bayes"), "'bayes' is not one of grid, random, tpe"),
        (laws, SweepOptions(scheduler="hyperband"), "--scheduler: 'hyperband' is not one of none, asha"),
        (laws, SweepOptions(trials=3), "--trials: 3 are fewer than the 4 values of k"),
        (read_space(["seed=0,1"], DIGITS), SweepOptions(search="tpe"), "seed: tpe would take it for a setting"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_sweep(space, options)
        assert said in str(caught.value)
