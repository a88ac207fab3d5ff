"""The range of images."""

from __future__ import annotations

import torch
from torch import Tensor


def centred(x: Tensor) -> Tensor:
    """Images in [-1, 1]: bytes of 0 to 255 become x / 127.5 - 1, floats are left as they are."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x
