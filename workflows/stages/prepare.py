"""prepare: images -> shards with a manifest, and the classifier in whose features distances are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from workflows.context import Context, Done, StageRun, identity_of, run_stage
from workflows.runtime.workspace import code_version
from workflows.sources import source_of
from workflows.sources.folder import listing

CODE = (
    "workflows/stages/prepare.py",
    "workflows/sources",
    "workflows/runtime/data.py",
    "mmdistill_core/networks/classifier.py",
)


def prepare(context: Context) -> Done:
    config = context.config
    depends = {"data": config.data.model_dump(), "seed": config.seed, "code": code_version(*CODE)}
    if config.data.source == "folder":
        depends["listing"] = listing(config.data.path)
    return run_stage(context, "prepare", depends=depends, config={"data": config.data.model_dump()}, body=_body)


def _body(run: StageRun) -> dict[str, Any]:
    from mmdistill_core.artifact import save_classifier
    from workflows.runtime.data import read_all, write_shards

    config = run.context.config
    with run.context.screen.bars() as screen:
        bar = screen.bar("prepare", config.data.classifier_epochs, unit="epochs")
        source = source_of(config.data)
        images, labels = source.load(run.context.screen.line)
        manifest = write_shards(
            run.path / "data",
            source=config.data.source,
            images=images,
            labels=labels,
            num_classes=source.num_classes,
            holdout=config.data.holdout,
            rows=config.data.shard_rows,
        )
        arrays = read_all(run.path / "data")

        def tick(epoch: int, loss: float, accuracy: float) -> None:
            run.log(epoch, {"step": epoch, "classifier/loss": loss, "classifier/accuracy": accuracy})
            bar.update(epoch, f"classifier: loss {loss:.3g}, held-out accuracy {accuracy:.1%}")

        classifier, accuracy = train_classifier(
            arrays.images,
            arrays.labels,
            arrays.holdout,
            num_classes=source.num_classes,
            epochs=config.data.classifier_epochs,
            seed=config.seed,
            tick=tick,
        )
    provenance = {
        "data_fingerprint": manifest.fingerprint,
        "held_out_accuracy": accuracy,
        "held_out": int(arrays.holdout.sum()),
    }
    save_classifier(run.path / "classifier", classifier, provenance=provenance)
    run.context.tracker.log_artifact(run.run_id, run.path / "data" / "manifest.json")
    run.context.tracker.log_artifact(run.run_id, run.path / "classifier", "classifier")
    return {
        "identity": identity_of(run.path / "data" / "manifest.json", run.path / "classifier" / "weights.safetensors"),
        "artifacts": ["data/manifest.json", "classifier"],
        "count": manifest.count,
        "shape": list(manifest.shape),
        "num_classes": manifest.num_classes,
        "fingerprint": manifest.fingerprint,
        "classifier_accuracy": accuracy,
        "held_out": int(arrays.holdout.sum()),
        "summary": f"{manifest.count:,} images {'x'.join(map(str, manifest.shape))}, {manifest.num_classes} classes, "
        f"classifier {accuracy:.1%} on {int(arrays.holdout.sum())} held-out images",
    }


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    holdout: np.ndarray,
    *,
    num_classes: int,
    epochs: int,
    seed: int,
    tick: Callable[[int, float, float], None],
) -> tuple[Any, float]:
    """A Classifier trained on the rows not held out (with shifts of a pixel), and its accuracy on those that are.

    tick(epoch, loss, held-out accuracy) after every epoch.
    """
    import torch
    from torch.nn import functional as F

    from mmdistill_core.networks.classifier import Classifier, ClassifierConfig
    from mmdistill_core.rng import generator

    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    held = torch.from_numpy(holdout)
    train_x, train_y = x[~held], y[~held]
    rng, batch = generator(seed, 2), 64
    torch.manual_seed(seed)
    classifier = Classifier(ClassifierConfig(image_size=x.shape[-1], channels=x.shape[1], num_classes=num_classes))
    steps = epochs * (len(train_x) // batch)
    optimiser = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    accuracy = 0.0
    for epoch in range(epochs):
        classifier.train()
        order = torch.randperm(len(train_x), generator=rng)
        for part in order.split(batch)[: len(train_x) // batch]:
            down, right = torch.randint(0, 3, (2,), generator=rng).tolist()
            padded = F.pad(train_x[part], (1, 1, 1, 1), mode="replicate")
            shifted = padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]
            loss = F.cross_entropy(classifier(shifted), train_y[part], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        classifier.eval()
        with torch.inference_mode():
            accuracy = (classifier(x[held]).argmax(1) == y[held]).double().mean().item()
        tick(epoch + 1, loss.item(), accuracy)
    classifier.fit_scale(x)
    return classifier, accuracy
