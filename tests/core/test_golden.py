"""The losses of the first 20 steps of every kind of training, at fixed seeds, as they were when they were first written down.

golden.json holds them as hexadecimal floats, and the hash of the trained weights. `python tests/core/test_golden.py` says of each
whether it is the same to the last bit, which it is on the kind of processor that wrote them; another one may round differently.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from oracles import COSINE

from mmdistill_core.artifact import build_denoiser
from mmdistill_core.engine import InMemoryBatches, OptimiserOptions, TrainState, train_step
from mmdistill_core.engine.preparation import Preparation
from mmdistill_core.methods import method_class
from mmdistill_core.networks.dit import DiTConfig

NETWORK = DiTConfig(image_size=8, channels=1, num_classes=10, patch=2, width=32, depth=2, heads=4)
PLAIN = {"k": 4, "delta_power": 1.0, "ema": False, "preconditioner": "identity", "auxiliary_lr_ratio": 1.0}
CASES = {
    "denoising": {},
    "denoising, labels dropped": {"label_dropout": 0.2, "p_t": "karras", "w_t": "edm"},
    "joint": {"update": "joint", "ema": True},
    "joint, 2 auxiliary updates": {"update": "joint", "auxiliary_updates": 2, "delta_power": 0.35},
    "alternating": {"update": "alternating"},
    "alternating, 3 auxiliary updates": {"update": "alternating", "auxiliary_updates": 3, "w_s": "dmd", "pull": False},
    "instant": {"update": "instant", "ema": True},
    "instant, double backward": {"update": "instant", "derivative": "double_backward"},
    "joint, guided": {"update": "joint", "guidance": 1.5, "clip_x": True},
    "alternating, told its guidance": {"update": "alternating", "guidance": (0.0, 2.0)},
    "joint, the auxiliary sees t": {"update": "joint", "auxiliary_sees_t": True, "pairing": "uniform", "eta": 0.5},
    "joint, unconditional": {
        "update": "joint",
        "transition": "unconditional",
        "p_s": "karras",
        "logsnr_shift": 0.3,
    },
}
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


def teacher():
    torch.manual_seed(1)
    network = build_denoiser(network=NETWORK, prediction="v", schedule={"name": "cosine"})
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return network


def method_of(name):
    kind = "denoising" if name.startswith("denoising") else "moment_matching"
    return method_class(kind)(schedule=COSINE, **({} if kind == "denoising" else PLAIN) | CASES[name])


def trained(name):
    """(role -> loss of each update, the hash of the resulting network's weights)."""
    torch.manual_seed(3)
    torch.set_num_threads(1)
    method = method_of(name)
    state = TrainState.create(
        method=method,
        given={"teacher": teacher()},
        prepare=lambda networks: method.prepare(Preparation(networks)),
        options=OptimiserOptions(lr=1e-3, warmup_images=64),
        global_batch=16,
        total_images=16 * 40,
        micro_batch=6,
    )
    rng = torch.Generator().manual_seed(7)
    x = torch.rand(96, 1, 8, 8, generator=rng) * 2 - 1
    batches = InMemoryBatches(x=x, label=torch.arange(96) % 10, global_batch=16, seed=5)
    losses = [
        {role: loss.mean().item() for role, loss in log.losses.per_sample.items()}
        for _ in range(20)
        for log in train_step(state=state, batches=batches, seed=11)
    ]
    content = hashlib.sha256()
    wanted = "teacher_ema" if name.startswith("denoising") else "student"
    for key, value in sorted(state.networks[wanted].state_dict().items()):
        content.update(key.encode() + value.numpy().tobytes())
    return losses, content.hexdigest()


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_before(name):
    losses, _ = trained(name)
    expected = [{role: float.fromhex(loss) for role, loss in row.items()} for row in GOLDEN[name]["losses"]]
    assert len(losses) == len(expected) == 20
    for found, wanted in zip(losses, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_every_case_was_written_down():
    assert set(CASES) == set(GOLDEN)


if __name__ == "__main__":
    for name in CASES:
        losses, content = trained(name)
        rows = [{role: loss.hex() for role, loss in row.items()} for row in losses]
        same = rows == GOLDEN[name]["losses"] and content == GOLDEN[name]["weights"]
        print(f"{'the same to the last bit' if same else 'DIFFERENT'}: {name}")
