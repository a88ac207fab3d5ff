"""Copies or parts of the networks on two workers: the same training as on one, whatever is cut, recomputed or in parts."""

import json
import os
import subprocess
import sys

import pytest
import torch
from gloo_workers import train
from small import ROOT
from trainings import MAKE, make_batches, make_state

from mmdistill_core.engine import train_step
from mmdistill_core.engine.checkpoint import load_checkpoint
from workflows.training.parallelize import Autocast, Compute, parallelize

WAYS = {
    "copies": {},
    "copies in parts": {"micro_batch": 8},
    "cut": {"shard": True},
    "cut in parts": {"shard": True, "micro_batch": 8},
    "cut, recomputed": {"shard": True, "recompute": True},
    "recomputed": {"recompute": True},
}


def on_workers(world, place, cases):
    (place / f"cases-{world}.json").write_text(json.dumps(cases))
    paths = str(ROOT / "tests")
    environment = os.environ | {"PYTHONPATH": paths + os.pathsep + str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "tests" / "gloo_workers.py")]
    running = [
        subprocess.Popen(
            [*words, str(rank), str(world), str(place)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(errors)[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of every method on one worker, and in every way on two; and of trainings that went on with other workers, in another way."""
    place = tmp_path_factory.mktemp("gloo")
    for name in MAKE:
        train(name, {}, 0, 1, place / f"{name}-alone")
        train(name, {}, 0, 1, place / f"{name}-alone-on", place / f"{name}-alone")
    cases = [{"name": n, "fields": f, "to": f"{n}-{way}"} for n in MAKE for way, f in WAYS.items()]
    cases += [
        {"name": n, "fields": WAYS[way], "to": f"{n}-{way}-on", "before": str(place / f"{n}-alone")}
        for n in MAKE
        for way in ("copies", "cut")
    ]
    on_workers(2, place, cases)
    for name in MAKE:
        train(name, {}, 0, 1, place / f"{name}-home", place / f"{name}-cut")
    return place


def assert_same(place, a, b):
    for part in ("", "-best"):
        torch.testing.assert_close(tensors(place / f"{a}{part}"), tensors(place / f"{b}{part}"), rtol=1e-3, atol=2e-5)


def tensors(folder):
    found = {}

    def walk(value, path):
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, dict):
            for name, item in value.items():
                walk(item, f"{path}/{name}")

    walk(load_checkpoint(folder), "")
    assert len(found) > 10
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKE)
def test_two_workers_train_what_one_does(results, name, way):
    assert_same(results, f"{name}-{way}", f"{name}-alone")


@pytest.mark.parametrize("name", MAKE)
def test_a_checkpoint_goes_on_with_other_workers_and_in_another_way(results, name):
    for way in ("copies-on", "cut-on", "home"):
        assert_same(results, f"{name}-{way}", f"{name}-alone-on")


def test_bfloat16_is_near_and_weights_stay_float32(tmp_path):
    train("denoising", {}, 0, 1, tmp_path / "exact")
    train("denoising", {"precision": "bfloat16"}, 0, 1, tmp_path / "half")
    exact, half = tensors(tmp_path / "exact"), tensors(tmp_path / "half")
    apart = [(half[n] - v).abs().max().item() for n, v in exact.items() if n.startswith("/networks/teacher/")]
    assert 0 < max(apart) < 5e-3
    assert all(v.dtype != torch.bfloat16 for v in half.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKE)
def test_compiled_it_trains_the_same(tmp_path, name):
    for to, fields in (("plain", {}), ("compiled", {"compile": True})):
        train(name, fields, 0, 1, tmp_path / to)
    torch.testing.assert_close(tensors(tmp_path / "compiled"), tensors(tmp_path / "plain"), rtol=1e-3, atol=2e-5)


def test_autocast_takes_and_gives_float32():
    seen = []

    class Network(torch.nn.Linear):
        def forward(self, x, t):
            seen.append((super().forward(x).dtype, t.dtype))
            return super().forward(x)

    out = Autocast(Network(4, 4), "cpu")(torch.randn(2, 4), torch.rand(2))
    assert seen == [(torch.bfloat16, torch.float32)]  # the times keep their digits
    assert out.dtype == torch.float32


def test_recomputed_blocks_keep_the_names_of_their_weights():
    state = make_state(MAKE["denoising"]())
    names = list(state.networks["teacher"].state_dict())
    parallelize(state, Compute(recompute=True), world=1, device=torch.device("cpu"))
    assert list(state.networks["teacher"].state_dict()) == names
    assert [n for n, _ in state.networks["teacher"].named_parameters()] == names


def test_recomputing_keeps_less_for_the_way_back():
    kept = {}
    for recompute in (False, True):
        state, kept[recompute] = make_state(MAKE["denoising"]()), 0
        parallelize(state, Compute(recompute=recompute), world=1, device=torch.device("cpu"))

        def pack(value, recompute=recompute):
            kept[recompute] += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            train_step(state=state, batches=make_batches(), seed=0)
    assert kept[True] < 0.6 * kept[False]
