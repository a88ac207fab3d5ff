"""The parts of a sweep, without Ray: its searches, ASHA, the shelf on which the teacher lies, checkpoints of trials, the table."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmdistill_core.artifact import build_denoiser
from mmdistill_core.networks.dit import DiTConfig
from workflows.config.loading import load_config
from workflows.sweep.asha import Asha
from workflows.sweep.search import Listed, Search, Tpe
from workflows.sweep.shelf import Shelf
from workflows.sweep.space import Domain, read_space
from workflows.sweep.table import front, summarise, varied

FINISHED = "FINISHED"


# Searches


def search_of(sources, *, known=(), may_begin=lambda k: True, crashed=lambda name: None):
    """A Search, and the points that it offered; those known have the distance 1."""
    offered = []

    def offer(point):
        offered.append(point)
        return 1.0 if point["p"] in known else {"k": point["k"], "name": f"{point['p']}"}

    return Search(sources, offer=offer, may_begin=may_begin, crashed=crashed), offered


def points(k, *names):
    return [{"k": k, "p": name} for name in names]


def test_the_largest_k_comes_first_and_what_is_known_is_not_run_again():
    search, offered = search_of({8: Listed(points(8, "a", "b")), 4: Listed(points(4, "c"))}, known=("a",))
    assert search.begin()
    assert [search.suggest(str(i)) for i in range(3)] == [
        {"k": 8, "name": "b"},
        {"k": 4, "name": "c"},
        FINISHED,
    ]
    assert [p["p"] for p in offered] == ["a", "b", "c"]
    assert search_of({8: Listed(points(8, "a"))}, known=("a",))[0].begin() is False


def test_students_wait_for_those_that_they_start_from():
    ended = set()
    sources = {8: Listed(points(8, "a", "b")), 4: Listed(points(4, "c"))}
    search, offered = search_of(sources, may_begin=lambda k: k == 8 or ended == {"a", "b"})
    assert search.begin()
    assert [search.suggest(str(i))["name"] for i in range(2)] == ["a", "b"]
    assert search.suggest("2") is None
    ended |= {"a", "b"}
    assert len(offered) == 2  # c is looked at no sooner
    assert search.suggest("3")["name"] == "c"
    assert search.suggest("4") == FINISHED


FIELDS = {
    "x": Domain("uniform", (0.0, 1.0)),
    "lr": Domain("loguniform", (1e-4, 1e-1)),
    "guidance": Domain("choice", ([0, 2], 0)),
    "images": Domain("choice", (1000,)),
}


def asked(tpe, n, distance):
    out = []
    for _ in range(n):
        ticket, point = tpe.next()
        out.append(point)
        tpe.report(ticket, distance(point))
    return out


def distance(point):
    return (point["x"] - 0.3) ** 2 + (math.log10(point["lr"]) + 2) ** 2


def test_tpe_learns_from_the_distances():
    tpe = Tpe(8, FIELDS, 60, seed=0, begun=[])
    found = asked(tpe, 60, distance)
    assert tpe.next() is None
    assert all(p["guidance"] in ([0, 2], 0) and p["images"] == 1000 and p["k"] == 8 for p in found)
    at_random = (1 / 12 + 0.2**2) + (3**2 / 12 + 0.5**2)  # the mean over the laws
    assert np.mean([distance(p) for p in found[-20:]]) < at_random / 4


def test_tpe_goes_on_from_the_points_of_before():
    before = asked(Tpe(8, FIELDS, 20, seed=0, begun=[]), 12, distance)
    tpe = Tpe(8, FIELDS, 20, seed=0, begun=before)
    assert asked(tpe, 12, distance) == before
    assert len(asked(tpe, 8, distance)) == 8
    assert tpe.next() is None


def test_tpe_takes_a_failed_trial_and_all_laws():
    fields = {"a": Domain("quniform", (0.2, 1.0, 0.2)), "b": Domain("randint", (1, 3))}
    found = asked(Tpe(4, fields, 30, seed=1, begun=[]), 30, lambda p: None if p["b"] == 2 else p["a"])
    assert {round(p["a"], 6) for p in found} <= {0.2, 0.4, 0.6, 0.8, 1.0}
    assert {p["b"] for p in found} == {1, 2}


# ASHA


def report(asha, k, name, *curve):
    trial = SimpleNamespace(trial_id=name, config={"k": k, "name": name})
    asha.on_trial_add(None, trial)
    return [asha.on_trial_result(None, trial, {"done_share": s, "score": d}) for s, d in curve]


def test_asha_compares_students_of_as_many_steps_and_by_distance():
    stopped = []
    asha = Asha(stopped.append)
    assert report(asha, 8, "good", (20, 9.0), (25, 0.5), (50, 0.2), (100, 0.1))[:3] == ["CONTINUE"] * 3
    assert report(asha, 1, "few steps", (25, 5.0), (50, 4.0)) == ["CONTINUE"] * 2
    assert report(asha, 8, "worse", (20, 0.1), (25, 0.6)) == ["CONTINUE", "STOP"]
    assert report(asha, 8, "better", (25, 0.4), (50, 0.3)) == ["CONTINUE", "STOP"]
    assert stopped == ["worse", "better"]  # and not the good one, for having come to its end


def test_asha_remembers_trials_of_before():
    stopped = []
    asha = Asha(stopped.append)
    asha.remember(8, "before", [(25, 0.5), (50, 0.2), (100, 0.1)])
    assert report(asha, 8, "worse", (25, 0.6)) == ["STOP"]
    assert report(asha, 4, "another k", (25, 0.6)) == ["CONTINUE"]


# The shelf


def network():
    torch.manual_seed(0)
    config = DiTConfig(image_size=4, channels=1, num_classes=3, patch=2, width=16, depth=1, heads=2)
    return build_denoiser(network=config, prediction="v", schedule={"name": "cosine"}).requires_grad_(False).eval()


def test_a_network_from_the_shelf_answers_alike_and_shares_its_bytes():
    own = network()
    for parameter in own.parameters():
        parameter.normal_(std=0.1)
    shelf = Shelf.of(own)
    assert all(p.is_meta for p in shelf.skeleton.parameters())
    for array in shelf.arrays.values():
        array.setflags(write=False)  # as Ray gives them
    taken = shelf.take()
    z, t, label = torch.randn(5, 1, 4, 4), torch.rand(5), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(taken(z, t, label), own(z, t, label))
    assert not any(p.requires_grad for p in taken.parameters())
    for path, parameter in taken.named_parameters():
        assert parameter.data_ptr() == shelf.arrays[path].ctypes.data


def test_a_held_teacher_is_not_read_from_its_folder():
    from workflows.training.job import Job, build_state

    job = Job(
        name="t", output="", storage="", data="", seed=0, method="moment_matching", arguments={"k": 2},
        given={"teacher": "/nowhere"}, network={}, schedule={"name": "cosine"}, prediction="v",
        options={"student": {}, "auxiliary": {}}, images=10, batch=5, log_every=1, checkpoint_every=1,
        ks=(2,),
    )  # fmt: skip
    teacher = Shelf.of(network()).take()
    state = build_state(job, held={"teacher": teacher})
    assert state.networks["teacher"] is teacher
    student = next(state.networks["student"].parameters())
    assert student.data_ptr() != next(teacher.parameters()).data_ptr()
    with pytest.raises(Exception, match="nowhere"):
        build_state(job)


# The table


def row(k, pairing, seed, frechet):
    rest = dict.fromkeys(("accuracy", "recall", "seconds"), 1.0)
    return {"point": {"k": k, "pairing": pairing, "seed": seed}, "frechet": frechet, **rest}


def test_rows_that_differ_in_the_seed_become_one():
    stopped = {"point": {"k": 8, "pairing": "grid", "seed": 2}, "score": 1.0, "outcome": "stopped"}
    lines = summarise([row(8, "grid", 0, 1.0), row(8, "uniform", 0, 0.5), row(8, "grid", 1, 3.0), stopped])
    assert [line["point"]["pairing"] for line in lines] == ["uniform", "grid"]
    assert lines[1]["frechet"] == {"mean": 2.0, "spread": 1.0}
    assert lines[1]["seeds"] == 2


def test_the_front_is_what_no_smaller_k_beats():
    assert front([(8, 0.1), (1, 0.5), (4, 0.6), (2, 0.3), (2, 0.2), (8, 0.2), (16, 0.1)]) == {1, 4, 0}
    assert front([]) == set()


def test_the_fields_that_vary():
    space = read_space(["k=8,4", "w_s=flat,snr", "images=1000"], load_config("digits"))
    assert varied([p for k in space.ks for p in space.grid(k)]) == ["k", "w_s"]
