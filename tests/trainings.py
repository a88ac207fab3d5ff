"""Small trainings by every method, for the engine's tests."""

import torch
from oracles import COSINE
from states import create_state, matching
from torch import nn

from mmdistill_core.engine import InMemoryBatches, OptimiserOptions
from mmdistill_core.methods.denoising import Denoising
from mmdistill_core.networks.denoiser import Denoiser
from mmdistill_core.networks.dit import DiT, DiTConfig
from mmdistill_core.networks.preconditioner import Preconditioner
from mmdistill_core.rng import generator

CONFIG = DiTConfig(image_size=8, channels=1, num_classes=3, patch=4, width=16, depth=1, heads=2)
MAKE = {
    "denoising": lambda: Denoising(schedule=COSINE),
    "moment_matching": lambda: matching(schedule=COSINE, k=4, update="joint", ema=True),
    "moment_matching alternating": lambda: matching(schedule=COSINE, k=4, update="alternating", z_t="rollout"),
    "moment_matching instant": lambda: matching(schedule=COSINE, k=4, update="instant", pairing="uniform"),
}


def denoiser(seed=0):
    torch.manual_seed(seed)
    network = Denoiser(backbone=DiT(CONFIG), schedule=COSINE)
    for parameter in network.parameters():  # adaLN-Zero starts at zero output: give every weight a gradient
        nn.init.normal_(parameter, std=0.1)
    return network


def make_state(method, total=64 * 24, batch=64):
    instant = getattr(method, "update", "") == "instant"
    return create_state(
        method=method,
        given={"teacher": denoiser()} | ({"preconditioner": Preconditioner.identity(denoiser())} if instant else {}),
        options=OptimiserOptions(lr=1e-3, warmup_images=128),
        global_batch=batch,
        total_images=total,
        best_role="student" if method.name == "moment_matching" else None,
        ema_half_life_images=512,
    )


def make_batches(rank=0, world=1, batch=64):
    rng = generator(1)
    x, label = torch.randn(150, 1, 8, 8, generator=rng), torch.randint(0, 3, (150,), generator=rng)
    return InMemoryBatches(x=x, label=label, global_batch=batch, seed=0, rank=rank, world=world)


def weights(state):
    return {f"{r}/{n}": p.clone() for r, net in state.networks.items() for n, p in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
