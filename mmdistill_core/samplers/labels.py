"""The classes of samples that are compared with data."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdistill_core.rng import generator


def data_labels(labels: Tensor, n: int, *seed: int) -> Tensor:
    """n labels in the proportions of the data's labels [m], shuffled: whole copies of them, and a part of a copy drawn without
    replacement. So random class counts do not add to a distance. With n = m the counts are those of the data.
    """
    rng, copies = generator(*seed), -(-n // len(labels))
    order = torch.cat([torch.randperm(len(labels), generator=rng) for _ in range(copies)])
    return labels.cpu()[order[:n]]


def label_weights(labels: Tensor, others: Tensor, drawn: Tensor) -> Tensor:
    """The weight of each label of `drawn` [n], which has the proportions of `labels` [m], so that the weighted ones have those of
    `others`. -1, for none, is a label like others.
    """
    classes = int(max(one.max() for one in (labels, others))) + 2
    share = [torch.bincount(one + 1, minlength=classes).double() / len(one) for one in (labels, others)]
    return (share[1] / share[0].clamp_min(1e-12))[drawn + 1]
