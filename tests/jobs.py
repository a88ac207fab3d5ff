"""The training of a small teacher as a job for Ray's workers, on images of noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

NETWORK = {"image_size": 8, "channels": 1, "num_classes": 0, "patch": 4, "width": 16, "depth": 1, "heads": 2}


def noise(n, channels=1, size=4, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, channels, size, size)).astype(np.float32)


def job_of(folder, **fields):
    """Of the data set in `folder`/data."""
    from workflows.training.job import Job

    job = Job(name="rows", output=str(folder / "m"), storage=str(folder / "ray"), data=str(folder / "data"), seed=0,
              method="denoising", arguments={"p_t": "uniform", "w_t": "v"}, network=NETWORK,
              schedule={"name": "cosine"}, prediction="v", options={"teacher": {"lr": 1e-3}}, images=8, batch=4, log_every=4,
              checkpoint_every=8, ks=(1,))  # fmt: skip
    return replace(job, **fields)


def write_data(folder, n=120):
    from workflows.dataset.shards import write_shards

    write_shards(
        folder / "data", source="test", images=(noise(n, size=8) + 1) / 2, labels=np.zeros(n, int), num_classes=1,
        holdout=0.3, rows=40,
    )  # fmt: skip
