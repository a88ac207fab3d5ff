"""plan: its figures against counts made another way."""

import json

import pytest

from workflows.cli.main import main
from workflows.config.loading import load_config, recipe_names
from workflows.errors import ConfigError, UserError
from workflows.plan import count as plan_count
from workflows.plan.count import Counted, Training, count
from workflows.plan.plan import RESERVE, notes, plan

SIZES = ["network.width=64", "network.depth=2", "network.heads=4", "distill.ema=true"]


@pytest.fixture(scope="module")
def cifar():
    config = load_config("cifar10", SIZES)
    return config, count(config)


def test_parameters_and_fixed_bytes_are_those_of_the_networks(cifar):
    from mmdistill_core.networks.dit import DiT, DiTConfig

    network = DiT(DiTConfig(image_size=32, channels=3, num_classes=10, patch=2, width=64, depth=2, heads=4))
    count = sum(p.numel() for p in network.parameters())
    figures = plan(*cifar, gpus=4, gib=2)
    assert figures["parameters"] == count
    sizes = {  # in units of one network: weights, gradients, moments, averages, Lambda and nu
        "teacher": (1, 1, 2, 1, 0),
        "alternating": (3, 2, 4, 1, 0),
        "joint": (3, 2, 4, 1, 0),
        "instant": (2, 1, 2, 1, 2),
    }
    for name, wanted in sizes.items():
        *found, buckets = [b / 4 / count for b in figures["memory"][name]["bytes"].values()]
        assert found == pytest.approx(wanted, rel=0.01), name
        assert buckets == 0, name


def test_buckets_between_gpus_are_a_second_copy_of_the_gradients_only_while_these_accumulate(cifar):
    """DDP's gradients are views into its buckets, but those of a part that is not exchanged yet lie beside them."""
    for gpus, gib in ((4, 2), (4, 0.25), (1, 0.25)):
        for name, m in plan(*cifar, gpus=gpus, gib=gib)["memory"].items():
            accumulates = m["accumulate"] > (2 if name == "instant" else 1)
            assert accumulates == (gib < 1), name
            copies = m["bytes"]["buckets between GPUs"] / m["bytes"]["gradients"]
            assert copies == (1 if gpus > 1 and accumulates else 0), name


def test_deep_networks_cost_what_two_shallow_ones_tell(monkeypatch):
    config = load_config("cifar10", [*SIZES, "network.depth=4", "distill.k=[8]"])
    told = count(config, ["joint"])
    monkeypatch.setattr(plan_count, "MORE", 4)
    assert told == count(config, ["joint"])


def test_rollouts_are_counted_with_the_evaluations_that_they_take():
    small = ["network.depth=2", "distill.k=[8]"]
    data, rollout = (
        count(load_config("digits", [*small, f"distill.z_t={z_t}"]), ["joint"]).trainings["joint"]["k8"].evaluations
        for z_t in ("data", "rollout")
    )
    assert rollout - data == pytest.approx(3.5, rel=0.02)


@pytest.mark.parametrize("gpus", [1, 4, 8])
@pytest.mark.parametrize("gib", [1, 2, 80])
def test_the_micro_batch_is_the_largest_that_fits_and_makes_up_the_batch(cifar, gpus, gib):
    for name, m in plan(*cifar, gpus=gpus, gib=gib)["memory"].items():
        free = gib * 2**30 * (1 - RESERVE)
        part = m["batch"] // gpus // (2 if name == "instant" else 1)
        assert m["micro_batch"] * m["accumulate"] * gpus == m["batch"]
        assert part % m["micro_batch"] == 0
        assert m["bytes_in_use"] == m["fixed_bytes"] + m["micro_batch"] * m["bytes_per_image"] <= free
        larger = [n for n in range(m["micro_batch"] + 1, part + 1) if part % n == 0]
        assert not larger or m["fixed_bytes"] + larger[0] * m["bytes_per_image"] > free


def test_evaluations_are_the_recipes():
    config = load_config("digits", ["network.depth=2", "distill.z_t=data"])  # one count instead of two
    figures = plan(config, count(config), gpus=1, gib=2)
    e = figures["evaluations"]
    assert e["evaluate"]["samples"] == (2 * (1 + 2 + 4 + 8 + 16 + 64 + 256) + 1 + 2 + 4 + 8) * (1797 * 3 + 40)
    assert e["teacher"]["training"] == pytest.approx(3 * 512_000, rel=0.02)
    for update, each in (("alternating", 5), ("joint", 7), ("instant", 5)):
        images = {"k1": 160_000, "k2": 128_000, "k4": 128_000, "k8": 76_800}
        for k, n in images.items():
            assert e[update][k] == pytest.approx(each * n, rel=0.02)
        assert e[update]["validation"] == 1797 * ((13 + 6) * 1 + (10 + 6) * 2 + (10 + 6) * 4 + (6 + 6) * 8)
    assert {u: figures["memory"][u]["updates"] for u in ("alternating", "joint", "instant")} == {
        "alternating": 0.5,
        "joint": 1,
        "instant": 1,
    }


def test_a_k_with_options_of_its_own_is_counted_with_them():
    own = {"auxiliary_updates": 3, "batch": 256, "guidance": 1.0}
    small = ["network.width=64", "network.depth=2", "network.heads=2", "teacher.label_dropout=0.1", "distill.k=[1,8]"]
    config = load_config("digits", [*small, "distill.z_t=data", f"distill.overrides={{1: {own}}}"])
    counted = count(config, ["joint", "instant"])
    figures = plan(config, counted, gpus=1, gib=2)
    # Of three steps two train the auxiliary alone: 3 forwards and a backward, which counts as 2. The guided teacher takes 2.
    e = figures["evaluations"]["joint"]
    each = {k: e[f"k{k}"] / config.distill.for_k(k).images for k in (1, 8)}
    assert each == {8: pytest.approx(7, rel=0.01), 1: pytest.approx((2 * 5 + 7) / 3 + 1, rel=0.01)}
    joint, teacher = figures["memory"]["joint"], figures["memory"]["teacher"]
    assert (joint["rounds"], joint["batch"], teacher["rounds"]) == (["k1"], 256, ["teacher"])
    assert joint["evaluations_per_image"] == pytest.approx(each[1])
    said = [line for line in notes(figures) if line.startswith("Memory")]
    assert [line.split(",")[0] for line in said] == [
        f"Memory and batch of {u} are those of k1" for u in ("joint", "instant")
    ]
    with pytest.raises(ConfigError, match=r"--gpus: 192 GPUs need a batch of at least 192; that of k8 is 128"):
        plan(
            load_config("digits", [*small, "teacher.batch=192", f"distill.overrides={{1: {own}}}"]),
            counted,
            gpus=192,
            gib=2,
        )


def test_the_k_that_is_shown_is_the_one_that_needs_the_most():
    def training(fixed, per_image):
        return Training({"weights": fixed, "gradients": 0}, per_image, evaluations=7.0, updates=1.0, halves=1)

    def shown(override, one, eight, gib):
        config = load_config("digits", ["distill.k=[1,8]", f"distill.overrides={{8: {override}}}"])
        trainings = {
            "teacher": {"teacher": training(0, 1)},
            "joint": {"k1": one, "k8": eight},
            "instant": {"k1": one, "k8": one},
        }
        return plan(config, Counted(1.0, 1, trainings), gpus=1, gib=gib)["memory"]["joint"]

    same = training(2**20, 2**20)
    column = shown({"batch": 512}, same, same, 2)
    assert (column["rounds"], column["batch"]) == (["k8"], 512)
    column = shown({}, training(0, 1.1e6), training(3 * 2**30, 1e6), 2)
    assert (column["rounds"], column["micro_batch"]) == (["k8"], None)
    assert shown({}, same, same, 2)["rounds"] == ["k1", "k8"]


def test_guided_and_noisier_rows_are_counted_too(cifar):
    config, counted = cifar
    more = {"teacher_noise": (0.5,), "samplers": ("ancestral",), "teacher_steps": (4,)}
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=more)})
    steps = {4, *config.distill.k}
    found = plan(config, counted, gpus=4, gib=2)["evaluations"]["evaluate"]["samples"]
    each = config.evaluate.samples * config.evaluate.seeds + 40
    assert found == (2 * sum(steps) + sum(config.distill.k)) * each


def test_hours_are_operations_over_the_measured_rate(cifar):
    engine = {"seconds_per_pair": {"engine": 0.5}, "flops_per_pair": 1e12, "flops_per_forward": 1e9}
    bench = {"machine": {"device": "a GPU"}, "recipe": "another", "engine": engine}
    figures = plan(*cifar, gpus=4, gib=2, bench=bench)
    hours = figures["hours"]
    assert hours["scaled_by"] == figures["flops_per_forward"] / 1e9
    for name, of in figures["evaluations"].items():
        for what, n in of.items():
            assert hours["of"][name][what] == pytest.approx(n * figures["flops_per_forward"] / 2e12 / 4 / 3600)


def test_what_can_not_be_is_a_line(cifar):
    with pytest.raises(UserError, match=r"cifar10: nothing fits in 0\.001 GiB; .* needs GPUs of") as caught:
        plan(*cifar, gpus=4, gib=0.001)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"--gpus: 513 GPUs need a batch of at least 513; that of teacher is 512"):
        plan(*cifar, gpus=513, gib=2)


def test_gpus_need_not_divide_a_batch(cifar):
    """As workers need not: the one with the most images has to hold them."""
    for name, m in plan(*cifar, gpus=3, gib=80)["memory"].items():
        halves = 2 if name == "instant" else 1
        own = -(-m["batch"] // (3 * halves))
        assert own * 3 * halves >= m["batch"] > (own - 1) * 3 * halves
        assert m["micro_batch"] * m["accumulate"] == own * halves


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "both"], "'both' is not one of alternating, joint, instant"),
        (["--bench", "nowhere.json"], "nowhere.json is not what"),
    ],
)
def test_a_wrong_option_is_a_line(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", "digits", *words])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_the_command_shows_a_table_or_json(capsys):
    words = ["plan", "cifar10", "--gpus", "2", "--gpu-memory", "4", "--bench", "docs/bench/laptop.json"]
    words += [word for text in SIZES for word in ("--set", text)]
    for extra in (["--only", "alternating", "--only", "instant"], ["--json", "--only", "joint"]):
        with pytest.raises(SystemExit) as caught:
            main([*words, *extra])
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        if "--json" in extra:
            assert list(json.loads(shown)["memory"]) == ["teacher", "joint"]
        else:
            for text in (
                "alternating",
                "instant",
                "images at once on a GPU",
                "prepared, and statistics",
                "scaled, not measured",
                "hours: k8",
            ):
                assert text in shown


@pytest.mark.parametrize("name", [n for n in recipe_names() if n not in ("digits", "cifar10")])
def test_every_recipe_has_a_plan(name):
    config = load_config(name)
    figures = plan(config, count(config, ["alternating"]), gpus=8, gib=80)
    assert figures["memory"]["alternating"]["micro_batch"]
    if name.startswith("imagenet"):
        assert figures["parameters"] == pytest.approx(400e6, rel=0.01)
