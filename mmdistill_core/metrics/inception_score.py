"""Inception score: classes that are certain for each sample and even over all of them (Salimans et al., 1606.03498)."""

from __future__ import annotations

import torch
from torch import Tensor


def inception_score(logits: Tensor, *, splits: int = 10) -> float:
    """Mean over splits of exp(mean KL(p(y | x) || p(y))), p(y) the split's own mean; logits [n, classes].

    The splits are consecutive and differ in size by at most one. Fewer samples in a split give a lower score: compare scores of
    equal counts and splits only.
    """
    if len(logits) < splits:
        raise ValueError(f"splits: {len(logits)} samples do not make {splits}")
    log_p = logits.double().log_softmax(dim=1)
    scores = []
    for part in log_p.tensor_split(splits):
        log_marginal = part.logsumexp(dim=0) - torch.tensor(len(part), dtype=part.dtype).log()
        scores.append((part.exp() * (part - log_marginal)).nansum(dim=1).mean().exp())
    return torch.stack(scores).mean().item()
